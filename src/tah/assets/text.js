// The depth lens, part 2: the coloured text, the policies above it, and their numbers.

const COLOURS = {
  depth: ["Depth", "number of passes; a stronger shade means a higher continue probability"],
  gain: ["Gain", "change of the loss if the token takes all passes"],
};
const SAMPLES = { // entries of the legend: CSS classes, meaning
  depth: [["", "one pass"], ["l2", "one pass, over half the threshold"], ["l3", "one pass, near the threshold"],
          ["d2", "two passes"], ["d2 l2", "two passes, high probability"], ["d3", "three"], ["d4", "more"],
          ["d2 c", "corrected"], ["d2 b", "broken"], ["u", "not supervised"]],
  gain: [["g3", "loss falls by more than 2 nats"], ["g2", "0.5"], ["g1", "0.05"], ["g4", "rises by more than 0.05"],
         ["g5", "0.5"], ["g6", "2 nats, from depth 1 to the last depth"]],
};

// -- text ------------------------------------------------------------------------------------------------------

/** Returns a text with control characters, and characters that reorder other text, replaced by visible ones. */
function plain(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]/g, (c) =>
    c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : "�");
}

/** Returns the same with visible spaces and line ends. */
const visible = (text) => plain(text).replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "(empty)";

function element(tag, name, ...inside) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...inside);
  return made;
}

const texts = data.strings.map(plain);
const kinds = data.strings.map((text) => (text === "" ? " e" : text.includes("\n") ? " n" : ""));
const rows = data.rows.map((row, text) => {
  const several = data.parts[text] > 1 || data.parts[text + 1] === 2;
  const made = element("section", "row", element("h3", "", `${row}${several ? `.${data.parts[text]}` : ""}`));
  made.setAttribute("aria-label", `Text ${row}${several ? `, part ${data.parts[text]}` : ""}`);
  return made;
});

/** Adds the tokens of a pane, in blocks that end at line ends. The browser lays out only the blocks in view. */
function fill(pane) {
  pane.cells = rows.map((row, text) => {
    const cell = element("div", `cell ${pane.mark}`);
    let block = null, length = 0;
    const close = () => {
      block.style.containIntrinsicSize = `auto ${Math.ceil(length / 70) * 1.95}rem`;
      cell.append(block);
      block = null;
    };
    for (let i = start[text]; i < start[text + 1]; i++) {
      if (!block) { block = element("div", "k"); length = 0; }
      const span = document.createElement("span"), string = pieces[i];
      span.textContent = texts[string];
      span.token = i;
      pane.spans[i] = span;
      pane.named[i] = "";
      block.append(span);
      length += texts[string].length;
      if (length > 600 && kinds[string] === " n") close();
    }
    if (block) close();
    row.append(cell);
    return cell;
  });
}

/** Returns the CSS classes of a token: kind, filter, depth, nearness to the threshold, outcome. */
function classes(pane, i, threshold) {
  const p = at[i], kind = kinds[pieces[i]];
  if (!seen[i]) {
    const gap = i + 1 < start[textOf[i] + 1] && seen[i + 1]; // the last hidden token before a shown one
    return gap ? (leads(i) ? "t o s" : "t o") : "t h";
  }
  let name = `t${kind}${seen[i] === 1 ? " x" : ""}`;
  if (p < 0) return `${name} u`;
  if (!supervised[p]) name += " u";
  if (state.colour === "gain") return name + gain(pane.trace, p);
  const d = pane.depth[p], s = pane.shade[p];
  if (d > 1) {
    const level = Math.min(2, Math.max(0, Math.floor(((s - threshold) / (1 - threshold || 1)) * 3)));
    name += ` d${Math.min(d, 4)}${level ? ` l${level}` : ""}`;
  } else {
    const near = threshold > 0 ? s / threshold : 0, level = (near >= 0.25) + (near >= 0.5) + (near >= 0.8);
    if (level) name += ` l${level}`;
  }
  return name + (pane.outcome[p] === 2 ? " c" : pane.outcome[p] === 3 ? " b" : "");
}

/** Returns whether no token of the text is shown before token i. */
function leads(i) {
  for (let j = i - 1; j >= start[textOf[i]]; j--) if (seen[j]) return false;
  return true;
}

/** Returns the CSS class of the change of the loss from depth 1 to the last depth. */
function gain(trace, p) {
  const last = (trace.max_depth - 1) * N + p;
  const gained = Math.log(Math.max(trace.prob[last], TINY)) - Math.log(Math.max(trace.prob[p], TINY));
  const level = (Math.abs(gained) > 0.05) + (Math.abs(gained) > 0.5) + (Math.abs(gained) > 2);
  return level ? ` g${gained > 0 ? level : level + 3}` : "";
}

let painting = 0;

/** Paints the rows in view first, and the others a few thousand tokens per frame: a moving slider does not wait. */
function paint() {
  const mine = ++painting, left = [];
  rows.forEach((row, text) => {
    row.hidden = !seen.subarray(start[text], start[text + 1]).includes(2);
  });
  const sight = rows.findIndex((row) => !row.hidden && row.getBoundingClientRect().bottom > 0);
  for (let text = 0; text < K; text++) if (!rows[text].hidden) left.push(text);
  left.sort((one, other) => (one < sight) - (other < sight)); // stable
  let next = 0;
  const some = () => {
    if (mine !== painting) return;
    for (let done = 0; next < left.length && done < 4000; next++) done += paintRow(left[next]);
    if (next < left.length) requestAnimationFrame(some);
  };
  some();
}

function paintRow(text) {
  for (const pane of shown()) {
    const [, threshold] = shading(pane), { spans, named } = pane;
    for (let i = start[text]; i < start[text + 1]; i++) {
      const name = classes(pane, i, threshold);
      if (name !== named[i]) spans[i].className = named[i] = name;
    }
  }
  return start[text + 1] - start[text];
}

function update() {
  for (const pane of shown()) {
    decide(pane);
    report(pane);
  }
  flag();
  sift();
  paint();
  count();
  legend();
  if (state.token >= 0) describe(state.token);
}

// -- numbers ---------------------------------------------------------------------------------------------------

const share = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(2)} %` : "–");
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(100 * value).toFixed(2);

function controls(pane) {
  const box = element("div", "pane"), choose = element("div", "choose"), rule = document.createElement("select");
  for (const [name, title] of Object.entries(RULES)) {
    if (!pane.trace.rules.includes(name)) continue; // the trace does not have its outputs
    const option = element("option", "", name === "own" ? `${title}: ${pane.trace.policy}` : title);
    option.value = name;
    rule.append(option);
  }
  rule.setAttribute("aria-label", `Policy${traces.length > 1 || panes.length > 1 ? ` in ${pane.mark}` : ""}`);
  const slider = document.createElement("input"), field = document.createElement("input");
  Object.assign(slider, { type: "range", min: 0, max: 1, step: 0.001 });
  Object.assign(field, { type: "number", min: 0, max: 1, step: 0.001 });
  slider.setAttribute("aria-label", "Threshold");
  field.setAttribute("aria-label", "Threshold as a number");
  const set = (value) => {
    if (!Number.isFinite(value)) return;
    pane.threshold = Math.min(1, Math.max(0, value));
    if (pane.rule === "own" || pane.rule === "oracle") pane.rule = pane.trace.score;
    update();
  };
  rule.addEventListener("change", () => { pane.rule = rule.value; update(); });
  slider.addEventListener("input", () => set(slider.valueAsNumber));
  field.addEventListener("input", () => set(field.valueAsNumber));
  choose.append(element("b", `mark ${pane.mark}`, pane.mark), rule, slider, field);
  pane.numbers = element("dl", "numbers");
  const why = "Approximate: deeper passes attend to each other, and in the run of these outputs every token took all passes.";
  pane.about = element("p", "about", why);
  box.append(choose, pane.numbers, pane.about);
  Object.assign(pane, { box, rule_: rule, slider, field });
  return box;
}

function report(pane) {
  const { sums, trace, numbers } = pane;
  pane.rule_.value = pane.rule;
  const [, threshold] = shading(pane);
  if (document.activeElement !== pane.slider) pane.slider.value = threshold;
  if (document.activeElement !== pane.field) pane.field.value = +threshold.toPrecision(5);
  pane.slider.disabled = pane.field.disabled = !trace.rules.includes(trace.score);
  const facts = [
    ["iterated", share(sums.iterated / scored)],
    ["passes per token", (sums.depth / scored).toFixed(3)],
    ["accuracy", share(sums.right / scored), `${signed((sums.right - sums.first) / scored)} over depth 1`],
    ["loss (nats)", (sums.loss / scored).toFixed(4)],
  ];
  const fact = (title, ...inside) => element("div", "", element("dt", "", title), element("dd", "", ...inside));
  const many = (name) => element("span", name, sums[name].toLocaleString("en"));
  numbers.replaceChildren(
    ...facts.map(([title, value, more = ""]) => fact(title, value, element("small", "", more && ` ${more}`))),
    fact("corrected, broken", many("corrected"), " · ", many("broken")),
  );
  pane.about.hidden = trace.exact || pane.rule === "own";
  mark(pane);
}

/** Moves the ring on the chart of accuracy against compute. If both panes show one trace, the ring is that of A. */
function mark(pane) {
  const ring = document.querySelector(`.now[data-mark="${pane.trace.mark}"]`);
  if (!ring || (traces.length === 1 && pane.number > 0)) return;
  const [x0, x1, y0, y1, left, bottom, right, top] = ring.dataset.scale.split(" ").map(Number);
  const x = pane.sums.depth / scored, y = pane.sums.right / scored;
  ring.setAttribute("cx", left + ((x - x0) / (x1 - x0)) * (right - left));
  ring.setAttribute("cy", Math.min(bottom, Math.max(top, bottom - ((y - y0) / (y1 - y0)) * (bottom - top))));
}

const buttons = {};
function makeButtons() {
  for (const [name, [title, meaning]] of Object.entries(FILTERS)) {
    const button = element("button", "", `${title} `, element("small", ""));
    button.type = "button";
    button.title = meaning;
    button.dataset.filter = name;
    button.addEventListener("click", () => choose(name));
    buttons[name] = button;
    $("filters").append(button);
  }
  for (const [name, [title, meaning]] of Object.entries(COLOURS)) {
    const button = element("button", "", title);
    button.type = "button";
    button.title = meaning;
    button.dataset.colour = name;
    button.addEventListener("click", () => { state.colour = name; update(); });
    $("colours").append(button);
  }
}

function choose(filter) {
  state.filter = filter;
  update();
  if (state.token >= 0 && seen[state.token]) reveal(state.token);
}

function count() {
  const counts = new Uint32Array(64);
  for (let p = 0; p < N; p++) counts[flags[p]]++;
  for (const [name, button] of Object.entries(buttons)) {
    const found = counts.reduce((sum, many, of) => sum + (of & FILTERS[name][2] ? many : 0), 0);
    button.querySelector("small").textContent = found.toLocaleString("en");
    button.setAttribute("aria-pressed", name === state.filter);
    button.hidden = name === "differ" && shown().length < 2;
  }
  for (const button of $("colours").children) {
    button.setAttribute("aria-pressed", button.dataset.colour === state.colour);
  }
}

function legend() {
  const deep = Math.max(...traces.map((trace) => trace.max_depth)) > 2;
  const samples = SAMPLES[state.colour].filter(([name]) => deep || !/^d[34]/.test(name));
  $("legend").replaceChildren(...samples.map(([name, title]) => element("span", `t ${name}`, ` ${title} `)));
}
