"use strict";
// Models and data wrote the texts: they enter the page only as text nodes, and Plotly with its markup escaped.

const PAGE = 10;
const FOLD = 600;
const root = document.documentElement;
root.classList.add("js");

const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function fail(error) {
  byId("failure").hidden = false;
  byId("failure").textContent = `Plots and samples could not be shown: ${error.message ?? error}`;
  throw error;
}

async function unpack(id) {
  if (!window.DecompressionStream) throw new Error("this browser is too old for them. The tables below and the PNG files beside this one are whole.");
  const bytes = Uint8Array.from(atob(byId(id).textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const shown = (value, digits = 3) =>
  value === null || value === undefined ? "–" : value !== 0 && Math.abs(value) < 1e-4 ? value.toExponential(digits - 1)
    : Number(value.toPrecision(digits)).toLocaleString("en-US", { maximumFractionDigits: 6 });

/** An object's own value under a name from the data; every object inherits names such as `constructor`. */
const own = (object, name) => (Object.hasOwn(object, name) ? object[name] : undefined);

// ---------------------------------------------------------------- light and dark

const dark = matchMedia("(prefers-color-scheme: dark)");
const print = matchMedia("print");

function stored(value) {
  try {
    if (value !== undefined) localStorage.setItem("rlhf_recipes-theme", value);
    return localStorage.getItem("rlhf_recipes-theme");
  } catch {
    return null; // a browser may refuse storage to files
  }
}

const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);

function setTheme(theme) {
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  byId("theme").setAttribute("aria-pressed", isDark());
}

setTheme(stored());
byId("theme").addEventListener("click", () => {
  setTheme(isDark() ? "light" : "dark");
  stored(root.dataset.theme);
  drawAll();
});
dark.addEventListener("change", () => { setTheme(); drawAll(); });

// On paper all folded parts are open; plots take the paper's colours and width.
let unfolded = [];
print.addEventListener("change", () => {
  if (print.matches) {
    unfolded = [...document.querySelectorAll("details:not([open]):not(.plot-data)")];
    for (const details of unfolded) details.open = true;
  } else {
    for (const details of unfolded) details.open = false;
  }
  drawAll();
});

/** The colour of a style class, or of a custom property, as the page shows it now. */
function colour(name, property = "--accent") {
  const probe = make("span", { class: name, style: `color: var(${property}, var(--soft))`, hidden: "" });
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

const faint = (rgb, alpha) => rgb.replace("rgb(", "rgba(").replace(")", `, ${alpha})`);

// ---------------------------------------------------------------- plots

const DASHES = { ppo: "solid", rloo: "6px,3px", sft: "2px,3px", "other-0": "9px,3px,2px,3px", "other-1": "12px,3px", "other-2": "4px,2px,1px,2px", "other-3": "1px,2px" };
const plots = {};
let data = null;

/** A name without the tags and entities that Plotly would read in it. */
const plain = (text) => [...text].slice(0, 80).join("").replaceAll("&", "&amp;").replaceAll("<", "&lt;");

const line = (slot, width, alpha = 1) => ({ color: faint(colour(slot), alpha), width, dash: DASHES[slot] });

function layout(x, y) {
  const ink = colour("", "--soft");
  const axis = (title) => ({
    title: { text: plain(title), standoff: 8 }, type: "linear", color: ink, gridcolor: colour("", "--line"), zeroline: false, automargin: true, ticks: "",
  });
  const small = { exponentformat: "e", minexponent: 4 }; // writes a learning rate as 1e-6, not as 1μ
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    hoverlabel: { bgcolor: colour("", "--card"), bordercolor: colour("", "--edge"), font: { color: colour("", "--ink") }, namelength: -1 },
    margin: { l: 8, r: 8, t: 8, b: 8 }, dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    xaxis: axis(x), yaxis: { ...axis(y), ...small },
  };
}

function draw(id) {
  const element = byId(id);
  if (!element || !data || !window.Plotly) return;
  const { traces, layout: arranged, label } = plots[id]();
  const size = print.matches ? { width: element.clientWidth, height: element.clientHeight } : { autosize: true };
  Plotly.react(element, traces, { ...arranged, ...size }, { responsive: true, displayModeBar: false, displaylogo: false });
  element.setAttribute("aria-label", label);
  const table = document.querySelector(`details[data-of="${id}"]`);
  if (table.open) tabulate(table);
}

const drawAll = () => Object.keys(plots).forEach(draw);

/** The numbers of a plot, at most a dozen points of each line. */
function tabulate(details) {
  const { traces, heads } = plots[details.dataset.of]();
  const head = make("tr", {}, ...["line", ...heads].map((text) => make("th", { scope: "col" }, text)));
  const body = make("tbody");
  for (const trace of traces.filter((one) => one.meta)) {
    const every = Math.max(1, Math.ceil((trace.x.length - 1) / 11));
    trace.x.forEach((x, i) => {
      if (i % every === 0 || i === trace.x.length - 1)
        body.append(make("tr", {}, make("th", { scope: "row" }, trace.meta), make("td", {}, shown(x, 6)), make("td", {}, shown(trace.y[i]))));
    });
  }
  details.lastElementChild.replaceChildren(make("table", {}, make("thead", {}, head), body));
}

for (const details of document.querySelectorAll("details[data-of]"))
  details.addEventListener("toggle", () => details.open && tabulate(details));

/** Exponential moving average that starts at the first value; missing values stay missing. */
function smooth(values, weight) {
  let last = null;
  return values.map((value) => {
    if (value === null) return null;
    last = last === null ? value : weight * last + (1 - weight) * value;
    return last;
  });
}

function choices() {
  const form = new FormData(byId("curve-controls"));
  return {
    axis: form.get("axis"), metric: form.get("metric"), show: form.get("show"), weight: Number(form.get("smoothing")),
    runs: new Set(form.getAll("run").map((i) => data.runs[Number(i)])),
  };
}

/** Curves of one metric: means with bands and thin lines of the seeds, or every run, or one seed's runs. */
function curves(metric) {
  const { axis, show, weight, runs } = choices();
  const title = own(data.titles, metric) ?? metric ?? "";
  const bands = new Map(Object.entries((show === "mean" && own(data.bands[axis] ?? {}, metric)) || {}));
  const traces = [];
  const said = [];
  for (const run of data.runs) {
    const values = own(run.curves, metric);
    if (!runs.has(run) || !values || !run.curves[axis] || (show.startsWith("seed") && show !== `seed ${run.seed}`)) continue;
    const behind = bands.has(run.algorithm) && data.runs.filter((other) => other.algorithm === run.algorithm).length > 1;
    const y = smooth(values, weight);
    traces.push({
      type: "scatter", mode: "lines", name: plain(run.name), x: run.curves[axis], y, line: { ...line(run.slot, behind ? 1 : 2, behind ? 0.35 : 1), dash: behind ? "solid" : DASHES[run.slot] },
      hoverinfo: behind ? "skip" : "x+y+name", meta: run.name,
    });
    if (!behind) said.push(`${run.name} ends at ${shown(y.findLast((value) => value !== null))}`);
  }
  const means = []; // drawn above all bands
  for (const [algorithm, band] of bands) {
    const mine = data.runs.filter((run) => run.algorithm === algorithm);
    if (mine.length < 2 || !mine.some((run) => runs.has(run))) continue;
    const mean = smooth(band.mean, weight);
    if (band.low && band.high) {
      const edge = { type: "scatter", mode: "lines", x: band.x, line: { width: 0 }, hoverinfo: "skip" };
      traces.push({ ...edge, y: smooth(band.low, weight) });
      traces.push({ ...edge, y: smooth(band.high, weight), fill: "tonexty", fillcolor: faint(colour(mine[0].slot), 0.18) });
    }
    means.push({
      type: "scatter", mode: "lines", name: plain(`${algorithm}, mean of ${band.seeds}`), x: band.x, y: mean, line: line(mine[0].slot, 3), hoverinfo: "x+y+name",
      meta: `${algorithm}, mean of ${band.seeds}`,
    });
    said.push(`${algorithm} ends at ${shown(mean.findLast((value) => value !== null))}`);
  }
  traces.push(...means);
  const over = data.axes[axis] ?? ""; // without any logged line there is no axis
  return { traces, layout: layout(over, title), heads: [over, weight ? `${title}, smoothed` : title], label: `${title} over ${over}: ${said.join("; ") || "no runs chosen"}.` };
}

plots["plot-curves"] = () => curves(choices().metric);
const smallCurves = [...document.querySelectorAll(".three .plot")].map((element) => element.id);
for (const id of smallCurves) plots[id] = () => {
  const found = curves(id.slice("plot-".length));
  found.layout.yaxis.title.text = ""; // the heading says it
  return found;
};

plots["plot-frontier"] = () => {
  const traces = [];
  const said = [];
  for (const run of data.frontier) {
    const points = run.training.filter((point) => point[0] !== null && point[1] !== null);
    const axes = [0, 1].map((i) => smooth(points.map((point) => point[i]), 0.8));
    traces.push({
      type: "scatter", mode: "lines", name: plain(run.run), x: axes[0], y: axes[1], line: line(run.slot, 1.5, 0.55), hoverinfo: "x+y+name", meta: `${run.run}, training`,
    });
  }
  for (const run of data.frontier.filter((one) => one.held_out)) {
    traces.push({
      type: "scatter", mode: "markers", name: plain(run.run), x: [run.held_out[0]], y: [run.held_out[1]], hoverinfo: "x+y+name", meta: `${run.run}, held out`,
      marker: { size: 13, color: colour(run.slot), symbol: run.slot === "rloo" ? "diamond" : "circle", line: { width: 2, color: colour("", "--paper") } },
    });
    said.push(`${run.run} scores ${shown(run.held_out[1])} at KL ${shown(run.held_out[0])}`);
  }
  return { traces, layout: layout(data.titles.kl, "score"), heads: [data.titles.kl, "score"], label: `Score over KL: ${said.join("; ") || "training only"}.` };
};

plots["plot-lengths"] = () => {
  const { edges, counts } = data.lengths;
  const groups = new Map(); // all models of an algorithm are one line: each has the same number of completions
  for (const [model, heights] of Object.entries(counts)) {
    const name = data.algorithms.includes(data.owners[model]) ? data.owners[model] : model;
    groups.set(name, heights.map((height, i) => height + (groups.get(name)?.[i] ?? 0)));
  }
  const traces = [...groups].map(([name, heights]) => {
    const all = Math.max(1, heights.reduce((sum, height) => sum + height, 0));
    const shares = heights.map((height) => height / all);
    return {
      type: "scatter", mode: "lines", name: plain(name), x: edges, y: [...shares, shares.at(-1) ?? 0], meta: name, hoverinfo: "x+y+name",
      line: { ...line(data.slots[name] ?? "sft", 2, 0.85), shape: "hv" },
    };
  });
  const arranged = layout("tokens", "");
  arranged.yaxis.tickformat = ".0%";
  return { traces, layout: arranged, heads: ["tokens", "share"], label: `Share of completions by length of ${[...groups.keys()].join(", ")}; the table has the numbers.` };
};

for (const key of ["score", "held_out"]) plots[`plot-audit-${key}`] = () => {
  const found = Object.entries(data.audit);
  const over = found.every(([, audit]) => audit.bins.every((bin) => typeof bin.episodes === "number")) ? "episodes" : "step";
  const traces = found.map(([name, audit]) => ({
    type: "scatter", mode: "lines+markers", name: plain(name), x: audit.bins.map((bin) => bin[over]), y: audit.bins.map((bin) => bin[key]),
    line: line(data.slots[name] ?? "sft", 2), marker: { size: 6 }, hoverinfo: "x+y+name", meta: name,
  }));
  const title = key === "score" ? "trained score" : "held-out score";
  return { traces, layout: layout(over, ""), heads: [over, title], label: `${title} over training, one line a run.` };
};

// ---------------------------------------------------------------- samples

let page = 0;

/** A text with every match of the pattern marked. */
function marked(text, pattern) {
  if (!pattern) return [text];
  const parts = [];
  let from = 0;
  for (const match of text.matchAll(pattern)) {
    parts.push(text.slice(from, match.index), make("mark", {}, match[0]));
    from = match.index + match[0].length;
  }
  return [...parts, text.slice(from)];
}

/** A text; a long one starts folded, and shows its first match if there is one. */
function folding(tag, attributes, text, pattern) {
  const element = make(tag, { dir: "auto", ...attributes });
  if (text.length <= FOLD) {
    element.append(...marked(text, pattern));
    return element;
  }
  const match = pattern ? text.search(pattern) : -1;
  const start = match > FOLD - 100 ? match - 200 : 0;
  const more = make("button", { type: "button" }, `Show all ${text.length.toLocaleString("en-US")} characters`);
  more.addEventListener("click", () => {
    element.replaceChildren(...marked(text, pattern));
    element.tabIndex = -1;
    element.focus();
  });
  // Cut between code points, not inside of an emoji.
  const cut = text.slice(start, start + FOLD).replace(/^[\udc00-\udfff]|[\ud800-\udbff]$/g, "");
  element.append(start ? "… " : "", ...marked(cut, pattern), "… ", more);
  return element;
}

function mean(values) {
  const known = values.filter((value) => typeof value === "number");
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function chosenSamples() {
  const form = new FormData(byId("sample-controls"));
  const query = form.get("query").trim();
  const pattern = query ? new RegExp(query.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"), "giu") : null;
  const [low, high] = ["low", "high"].map((name) => (form.get(name) === "" ? null : Number(form.get(name))));
  const names = form.getAll("shown");
  const only = form.get("model");
  const finished = form.get("finished");
  const fits = (found) =>
    (finished === "" || String(found.finished) === finished) &&
    (low === null || (typeof found.score === "number" && found.score >= low)) &&
    (high === null || (typeof found.score === "number" && found.score <= high));
  const candidates = (sample) => Object.entries(sample.models).filter(([name]) => (only ? name === only : names.includes(name))).map(([, found]) => found);
  const matches = (text) => !pattern || text.search(pattern) >= 0;
  const score = (sample, algorithm) =>
    mean((algorithm === undefined ? candidates(sample) : Object.values(sample.models).filter((found) => found.algorithm === algorithm)).map((found) => found.score));
  const ahead = (sample, sign) => {
    const [first, second] = [0, 1].map((i) => score(sample, data.algorithms[i]));
    return first === null || second === null ? null : sign * (first - second);
  };
  const keys = {
    "score-down": (sample) => score(sample), "score-up": (sample) => { const found = score(sample); return found === null ? null : -found; },
    first: (sample) => ahead(sample, 1), second: (sample) => ahead(sample, -1),
    long: (sample) => mean(candidates(sample).map((found) => found.tokens ?? found.completion.length)),
    short: (sample) => -mean(candidates(sample).map((found) => found.tokens ?? found.completion.length)),
  };
  let samples = data.samples.filter((sample) => {
    const fitting = candidates(sample).filter(fits);
    return fitting.length > 0 && (matches(sample.prompt) || fitting.some((found) => matches(found.completion)));
  });
  const key = keys[form.get("sort")];
  if (key) {
    // Samples without a score come last.
    const order = new Map(samples.map((sample) => [sample, key(sample) ?? -Infinity]));
    samples = samples.sort((a, b) => (order.get(a) < order.get(b) ? 1 : order.get(a) > order.get(b) ? -1 : 0));
  }
  return { samples, names, pattern };
}

const signed = (value) => value.toFixed(2).replace("-", "−");

function completionCard(name, found, pattern) {
  const facts = [];
  if (typeof found.score === "number") facts.push(`score\u00a0${signed(found.score)}`);
  if (typeof found.held_out === "number") facts.push(`held\u00a0out\u00a0${signed(found.held_out)}`);
  if (typeof found.tokens === "number") facts.push(`${found.tokens}\u00a0tokens`);
  return make("div", { class: `completion ${data.slots[name] ?? "sft"}` },
    make("h3", {}, make("bdi", {}, name)),
    folding("p", {}, found.completion.replace(/^ /, ""), pattern), // most tokenizers put a blank before each word
    make("small", {}, facts.join(" · "), found.finished === false ? make("span", { class: "cut" }, `${facts.length ? " · " : ""}cut off`) : null));
}

function showSamples() {
  const list = byId("sample-list");
  if (!list || !data) return;
  const { samples, names, pattern } = chosenSamples();
  const pages = Math.max(1, Math.ceil(samples.length / PAGE));
  page = Math.min(Math.max(page, 0), pages - 1);
  list.replaceChildren(...samples.slice(page * PAGE, (page + 1) * PAGE).map((sample) =>
    make("article", { class: "sample", "aria-label": "A prompt and its completions" },
      folding("div", { class: "prompt" }, sample.prompt, pattern),
      make("div", { class: "completions" },
        ...Object.entries(sample.models).filter(([name]) => names.includes(name)).map(([name, found]) => completionCard(name, found, pattern)),
        sample.gold === null ? null : make("div", { class: "completion" }, make("h3", {}, "the data's own"), folding("p", {}, sample.gold, pattern))))));
  byId("found").textContent = `${samples.length} of ${data.samples.length} prompts, page ${page + 1} of ${pages}`;
  for (const button of document.querySelectorAll("[data-turn]")) button.disabled = button.dataset.turn === "1" ? page >= pages - 1 : page <= 0;
}

// ---------------------------------------------------------------- start

for (const id of ["curve-controls", "sample-controls"]) byId(id)?.addEventListener("submit", (event) => event.preventDefault());
byId("curve-controls")?.addEventListener("change", (event) =>
  event.target.name === "metric" ? draw("plot-curves") : ["plot-curves", ...smallCurves].forEach(draw));
byId("sample-controls")?.addEventListener("input", () => { page = 0; showSamples(); });
for (const button of document.querySelectorAll("[data-turn]"))
  button.addEventListener("click", () => {
    page += Number(button.dataset.turn);
    showSamples();
    byId("samples").scrollIntoView();
  });

async function start() {
  data = JSON.parse(await unpack("data"));
  showSamples();
  const script = make("script");
  script.textContent = await unpack("plotly");
  document.head.append(script);
  drawAll();
  root.dataset.ready = "";
}

start().catch(fail);
