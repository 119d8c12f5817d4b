// The depth lens, part 1: the data, the tokens that a policy iterates, and the tokens that a filter selects.
//
// T tokens, N predictions, M depths, k alternatives. `at[i]` is the prediction of token i, -1 for the first of a text.
// Columns of a trace are flat: [M, N] is column[d * N + p], [M, N, k] is column[(d * N + p) * k + j].
// The parts rules.js, text.js and token.js are joined into one module. It fetches nothing, and sets text from models
// only as textContent.
const TYPES = { Uint8Array, Uint16Array, Uint32Array, Float32Array };
const AROUND = 12; // tokens of context that a filter shows on each side
const TINY = 1e-38; // lower bound of a probability in a loss, as in tah.tracing.trace_file
const OUTCOMES = ["kept right", "kept wrong", "corrected", "broken"];
const RULES = {
  own: "as run",
  decider: "decider above …",
  confidence: "1 − top probability above …",
  entropy: "1 − exp(−entropy) above …",
  oracle: "oracle: depth 1 is wrong",
};
const SCORES = { decider: "decider's probability", confidence: "1 − top probability", entropy: "1 − exp(−entropy)" };
const FILTERS = { // title, meaning, bit of `flags`
  all: ["All", "every token", 1],
  iterated: ["Iterated", "tokens that took more than one pass", 2],
  corrected: ["Corrected", "wrong after depth 1, right after the last pass", 4],
  broken: ["Broken", "right after depth 1, wrong after the last pass", 8],
  hard: ["Hard", "wrong after depth 1", 16],
  differ: ["Differ", "depth or outcome differs between A and B", 32],
};

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const ids = column(data.ids), pieces = column(data.pieces), supervised = column(data.supervised);
const T = ids.length, K = data.lengths.length, N = T - K;
const at = new Int32Array(T), textOf = new Int32Array(T), start = new Int32Array(K + 1);
for (let text = 0, i = 0, p = 0; text < K; text++) {
  start[text] = i;
  for (let j = 0; j < data.lengths[text]; j++, i++) {
    textOf[i] = text;
    at[i] = j ? p++ : -1;
  }
  start[text + 1] = i;
}
let scored = 0;
for (const one of supervised) scored += one;
const traces = data.traces.map((trace) => ({
  ...trace,
  ...Object.fromEntries(Object.entries(trace.columns).map(([name, packed]) => [name, column(packed)])),
}));
const panes = traces.map((trace, number) => makePane(trace, number));
const state = { filter: "all", colour: "depth", token: -1, pinned: false };
const flags = new Uint8Array(N); // the filters that select a prediction in any pane; 0 if it does not count
const seen = new Uint8Array(T).fill(2); // 2: selected by the filter, 1: context of a selected token, 0: hidden

function column([type, packed]) {
  const text = atob(packed), bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
  return new TYPES[type](bytes.buffer);
}

// -- rules -----------------------------------------------------------------------------------------------------

function makePane(trace, number) {
  const pane = { trace, number, mark: "AB"[number], rule: "own", threshold: trace.decider_threshold };
  pane.depth = new Uint8Array(N);
  pane.outcome = new Uint8Array(N);
  pane.shade = new Float32Array(N); // continue probability after depth 1
  pane.spans = [];
  pane.named = [];
  return pane;
}

/** Returns a function of (d, p): the continue probability of prediction p after depth d + 1, by a score. */
function scoreOf(trace, score) {
  if (score === "decider") return (d, p) => trace.decider[d * N + p];
  if (score === "entropy") return (d, p) => -Math.expm1(-trace.entropy[d * N + p]);
  return (d, p) => 1 - trace.max_prob[d * N + p];
}

/** Returns the score that shades tokens and its threshold: those of the chosen policy, or else those of the trace. */
function shading(pane) {
  const { trace, rule } = pane;
  if (rule !== "own" && rule !== "oracle") return [rule, pane.threshold];
  if (trace.policy === "confidence") return [trace.score, trace.threshold];
  return [trace.score, trace.decider ? trace.decider_threshold : 0.5];
}

/** Computes the depth and outcome of every token under the policy of a pane, and the numbers above the text. */
function decide(pane) {
  const { trace, rule, threshold, depth, outcome, shade } = pane, M = trace.max_depth;
  const [name] = shading(pane), score = M > 1 ? scoreOf(trace, name) : () => 0;
  const sums = { depth: 0, iterated: 0, right: 0, first: 0, loss: 0, corrected: 0, broken: 0 };
  for (let p = 0; p < N; p++) {
    let d = 1;
    if (rule === "own") d = trace.depth[p];
    else if (rule === "oracle") d = trace.rank[p] ? M : 1;
    else while (d < M && score(d - 1, p) > threshold) d++;
    const ran = rule === "own" && trace.final_rank;
    const rank = ran ? trace.final_rank[p] : trace.rank[(d - 1) * N + p];
    const prob = ran ? trace.final_prob[p] : trace.prob[(d - 1) * N + p];
    const before = trace.rank[p] === 0, after = rank === 0;
    depth[p] = d;
    shade[p] = score(0, p);
    outcome[p] = before ? (after ? 0 : 3) : after ? 2 : 1;
    if (!supervised[p]) continue;
    sums.depth += d;
    sums.iterated += d > 1;
    sums.right += after;
    sums.first += before;
    sums.loss -= Math.log(Math.max(prob, TINY));
    sums.corrected += outcome[p] === 2;
    sums.broken += outcome[p] === 3;
  }
  pane.sums = sums;
}

// -- filters ---------------------------------------------------------------------------------------------------

const shown = () => panes.filter((pane) => pane.cells);

const chosen = (filter, p) => p >= 0 && (flags[p] & FILTERS[filter][2]) > 0;

function flag() {
  const [one, two] = shown(), OF_OUTCOME = [0, 0, 4, 8];
  const of = (pane, p) => (pane.depth[p] > 1 ? 2 : 0) | OF_OUTCOME[pane.outcome[p]] | (pane.trace.rank[p] > 0 ? 16 : 0);
  for (let p = 0; p < N; p++) {
    flags[p] = supervised[p];
    if (!supervised[p]) continue;
    flags[p] |= of(one, p);
    if (!two) continue;
    flags[p] |= of(two, p);
    if (one.depth[p] !== two.depth[p] || one.outcome[p] !== two.outcome[p]) flags[p] |= 32;
  }
}

function sift() {
  if (state.filter === "all") return seen.fill(2);
  seen.fill(0);
  for (let text = 0; text < K; text++) {
    for (let i = start[text]; i < start[text + 1]; i++) {
      if (!chosen(state.filter, at[i])) continue;
      const from = Math.max(start[text], i - AROUND), to = Math.min(start[text + 1], i + AROUND + 1);
      for (let j = from; j < to; j++) if (seen[j] === 0) seen[j] = 1;
      seen[i] = 2;
    }
  }
}
