// The depth lens, part 3: the details of one token, and the movement from token to token.

// -- one token -------------------------------------------------------------------------------------------------

function describe(i) {
  const p = at[i], box = $("details"), close = element("button", "close", "Close");
  close.addEventListener("click", release);
  const place = `text ${data.rows[textOf[i]]}, token ${i - start[textOf[i]] + 1} · id ${ids[i]}`;
  box.classList.remove("off");
  box.replaceChildren(close, element("h3", "", visible(data.strings[pieces[i]])), element("p", "facts", place));
  if (p < 0) return box.append(element("p", "", "The first token of a text is not predicted."));
  if (!supervised[p]) box.append(element("p", "facts", "This token is not supervised, so it does not count."));
  const of = shown();
  for (const pane of of) box.append(aspects(pane, p, of.length > 1));
}

function aspects(pane, p, several) {
  const { trace } = pane, d = pane.depth[p], [score, threshold] = shading(pane);
  const outcome = pane.outcome[p], made = element("section", "");
  const head = element("p", "");
  if (several) head.append(element("b", `mark ${pane.mark}`, pane.mark), " ");
  head.append(element("span", `outcome ${OUTCOMES[outcome]}`, OUTCOMES[outcome]), d === 1 ? " 1 pass" : ` ${d} passes`);
  const passes = element("div", "passes");
  for (let depth = 0; depth < trace.max_depth; depth++) passes.append(onePass(trace, p, depth, depth < d));
  made.append(head, passes);
  made.append(numbers(pane, p, d));
  const notes = [];
  if (trace.drawn && pane.rule === "own") notes.push("Drawn with the decider's probability.");
  else if (trace.max_depth > 1) notes.push(`Iterates if ${SCORES[score]} > ${+threshold.toPrecision(4)}.`);
  if (trace.final_rank && d > 1) notes.push("The depths are from a run where every token took all passes.");
  made.append(element("small", "", notes.join(" ")));
  return made;
}

/** Returns the table of the true token at each depth, with a column of the model's own run where that can differ. */
function numbers(pane, p, d) {
  const { trace } = pane, M = trace.max_depth, ran = pane.rule === "own" && trace.final_rank && d > 1;
  const depths = [...Array(M).keys()], table = element("table", "facts2");
  const line = (title, value, last) => {
    const values = [...depths.map(value), ...(ran ? [last] : [])];
    table.append(element("tr", "", element("th", "", title), ...values.map((each) => element("td", "num", each))));
  };
  line("depth", (depth) => String(depth + 1), "as run");
  line("true token", (depth) => small(trace.prob[depth * N + p]), ran && small(trace.final_prob[p]));
  const place = (rank) => (rank + 1).toLocaleString("en");
  line("its rank", (depth) => place(trace.rank[depth * N + p]), ran && place(trace.final_rank[p]));
  line("loss, nats", (depth) => loss(trace.prob[depth * N + p]), ran && loss(trace.final_prob[p]));
  const first = (string) => visible(data.strings[string]);
  if (ran) line("first choice", (depth) => first(trace.top[(depth * N + p) * trace.top_k]), first(trace.final[p]));
  line("entropy, nats", (depth) => trace.entropy[depth * N + p].toFixed(2), "");
  const goProb = (depth) => (depth + 1 < M ? trace.decider[depth * N + p].toFixed(4) : "");
  if (trace.decider) line("decider's probability", goProb, "");
  if (trace.output) line("weight in the mixture", (depth) => weight(trace, p, depth, d), "");
  return table;
}

const CERTAIN = ["always", "oracle", "random", "never"]; // policies that continue with probability 1 or not at all

/** Returns the weight of a pass in the output of a prediction with d passes, method.md (15), as text. */
function weight(trace, p, depth, d) {
  if (depth >= d) return "";
  if (trace.output === "even") return (1 / d).toFixed(4);
  const scored = ["decider", "confidence"].includes(trace.policy);
  if (!scored && !CERTAIN.includes(trace.policy)) return ""; // a policy of the caller, whose probabilities are unknown
  const go = scored ? scoreOf(trace, trace.score) : () => 1;
  let rest = 1;
  for (let j = 0; j < depth; j++) rest *= go(j, p);
  return (depth + 1 < d ? rest * (1 - go(depth, p)) : rest).toFixed(4);
}

/** Formats a probability. One that was rounded to 0 is shown as less than the smallest number. */
function small(prob, least = "1e-38") {
  if (prob >= 0.0001) return prob.toFixed(4);
  return prob > 0 ? prob.toPrecision(1) : `<${least}`;
}
const loss = (prob) => (-Math.log(Math.max(prob, TINY))).toFixed(3);

/** Returns the list of the most probable tokens after a pass, with the true token added if it is not among them. */
function onePass(trace, p, d, ran) {
  const k = trace.top_k, here = d * N + p, rank = trace.rank[here], list = element("ol", "tops");
  const entry = (text, value, right) => {
    const bar = element("i", "");
    bar.style.width = `${100 * value}%`;
    const number = element("span", "", small(value, "0.0001"));
    list.append(element("li", right ? "true" : "", bar, element("span", "", text), number));
  };
  for (let j = 0; j < k; j++) {
    const right = j === rank, rounded = trace.top_probs[here * k + j] / 1e4; // the true one has more digits
    entry(visible(data.strings[trace.top[here * k + j]]), right ? trace.prob[here] : rounded, right);
  }
  if (rank >= k) entry(`rank ${(rank + 1).toLocaleString("en")}`, trace.prob[here], true);
  return element("div", "", element("h4", "", `Depth ${d + 1} `, element("small", "", ran ? "" : "(not run)")), list);
}

function hint() {
  const box = $("details");
  box.classList.add("off");
  const how = "Point at a token, tap it, or use the arrow keys. The predictions for the token are shown here.";
  box.replaceChildren(element("p", "empty", how, " Press n for the next broken token and ? for all keys."));
}

function point(i, on) {
  for (const pane of shown()) {
    const span = pane.spans[i];
    if (on) { span.setAttribute("aria-current", "true"); span.setAttribute("role", "button"); span.tabIndex = 0; }
    else for (const name of ["aria-current", "role", "tabindex"]) span.removeAttribute(name);
  }
}

function show(i, pinned) {
  if (state.token >= 0) point(state.token, false);
  Object.assign(state, { token: i, pinned });
  point(i, true);
  describe(i);
}

function release() {
  if (state.token >= 0) point(state.token, false);
  Object.assign(state, { token: -1, pinned: false });
  hint();
}

function reveal(i) {
  const span = shown()[0].spans[i];
  span.scrollIntoView({ block: "center" });
  span.focus({ preventScroll: true });
}

function go(i) {
  if (i < 0 || i >= T) return;
  show(i, true);
  reveal(i);
}

/** Returns the next shown token that passes a test, or -1. A negative step searches backwards. */
function find(step, test) {
  const from = state.token < 0 && step < 0 ? T - 1 : state.token + step;
  for (let i = from; i >= 0 && i < T; i += step) if (seen[i] && test(i)) return i;
  return -1;
}

/** Returns the horizontally nearest token on the line above or below, or -1. */
function line(step) {
  const span = (i) => shown()[0].spans[i].getBoundingClientRect();
  const here = span(state.token), middle = (here.left + here.right) / 2;
  let best = -1, level = null, near = Infinity;
  for (let i = state.token + step; i >= 0 && i < T; i += step) {
    if (!seen[i]) continue;
    const box = span(i);
    if (!box.width || Math.abs(box.bottom - here.bottom) < 6) continue;
    if (level === null) level = box.bottom;
    if (Math.abs(box.bottom - level) > 6) break;
    const away = Math.abs((box.left + box.right) / 2 - middle);
    if (away < near) [near, best] = [away, i];
  }
  return best;
}

// -- events ----------------------------------------------------------------------------------------------------

const tokenOfEvent = ({ target: { token = -1 } }) => (seen[token] ? token : -1);

$("text").addEventListener("pointerover", (event) => {
  const i = tokenOfEvent(event);
  if (i >= 0 && !state.pinned && event.pointerType === "mouse") show(i, false);
});
$("text").addEventListener("click", (event) => {
  const i = tokenOfEvent(event);
  if (i < 0) return;
  if (state.pinned && state.token === i) return release();
  show(i, true);
  event.target.focus({ preventScroll: true });
});

/** Shows two panes (two traces, or one trace under two policies) or one pane. */
function side(on) {
  if (on && panes.length === 1) {
    const second = makePane(traces[0], 1);
    const { rules, score } = second.trace;
    second.rule = rules.includes(score) ? score : rules[rules.length - 1];
    second.threshold = shading(panes[0])[1] / 2;
    panes.push(second);
  }
  if (on && !panes[1].cells) {
    $("panes").append(controls(panes[1]));
    fill(panes[1]);
  } else if (!on && panes[1]) {
    for (const cell of panes[1].cells) cell.remove();
    panes[1].box.remove();
    panes[1].cells = null;
    if (state.filter === "differ") state.filter = "all";
  }
  for (const id of ["panes", "text"]) $(id).classList.toggle("two", on);
  $("compare").setAttribute("aria-pressed", on);
  for (const badge of document.querySelectorAll(".pane .mark")) badge.hidden = !on;
  release();
  update();
  measure();
}

function toggle() {
  if (!$("compare").disabled) side(!panes[1]?.cells);
}

function theme() {
  const root = document.documentElement.style, preferred = matchMedia("(prefers-color-scheme: dark)").matches;
  const dark = root.colorScheme ? root.colorScheme === "dark" : preferred;
  root.colorScheme = dark ? "light" : "dark";
}

const measure = () => document.documentElement.style.setProperty("--controls", `${$("controls").offsetHeight}px`);

const KEYS = {
  ArrowRight: () => go(find(1, () => true)),
  ArrowLeft: () => go(find(-1, () => true)),
  n: () => go(find(1, jumps)),
  p: () => go(find(-1, jumps)),
  c: toggle,
  t: theme,
  "?": () => $("keys").showModal(),
  Escape: release,
};
const jumps = (i) => chosen(state.filter === "all" ? "broken" : state.filter, at[i]);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (event.target.matches("input, select, summary")) return;
  const { key } = event, names = Object.keys(FILTERS);
  let act = KEYS[key];
  if (state.token >= 0 && key === "ArrowUp") act = () => go(line(-1));
  if (state.token >= 0 && key === "ArrowDown") act = () => go(line(1));
  if (key >= "1" && key <= String(names.length) && !buttons[names[key - 1]].hidden) act = () => choose(names[key - 1]);
  if (!act) return;
  event.preventDefault();
  act();
});
$("help").addEventListener("click", () => $("keys").showModal());
$("theme").addEventListener("click", theme);
$("compare").addEventListener("click", toggle);
addEventListener("resize", measure);

$("panes").append(controls(panes[0]));
fill(panes[0]);
makeButtons();
$("text").append(...rows);
$("compare").disabled = traces.length < 2 && traces[0].rules.length < 2; // no other policy to show
side(traces.length > 1);
performance.mark("interactive");
