"use strict";
const byId = id => document.getElementById(id);
const read = id => JSON.parse(byId(id).textContent);
const make = (tag, text = "", className = "") => Object.assign(document.createElement(tag), { textContent: text, className });

// --- images: each is in the page once, whatever shows it -------------------------------------------------------------
const { explore, images, prompts } = read("data");
for (const image of document.querySelectorAll("img[data-image]")) {
  image.src = images[image.dataset.image][image.dataset.number];
}
document.addEventListener("change", event => {
  if (event.target.name !== "sheet-columns") return;
  for (const sheet of document.querySelectorAll("[data-sheet]")) sheet.hidden = sheet.dataset.sheet !== event.target.value;
});

// --- charts ------------------------------------------------------------------------------------------------------------
let drawings; // read when the first is drawn: slider and table come before them, and before plotly, which is large
const redraw = {};
let budgetLine = null; // {cost, budget} of the slider

function prepared(figure, wanted) {
  const published = figure.data.some(trace => trace.meta === "published");
  const data = figure.data.map(trace => (trace.meta === "published" ? { ...trace, visible: wanted } : trace));
  const layout = { ...figure.layout, xaxis: { ...figure.layout.xaxis }, yaxis: { ...figure.layout.yaxis } };
  if (published && wanted) for (const axis of ["xaxis", "yaxis"]) Object.assign(layout[axis], figure.layout.meta.published[axis]);
  return { data, layout, published };
}

const sharesCost = box => box.querySelector("input[data-cost]") !== null;
function lines(box) {
  const chosen = box.querySelector("input[data-cost]:checked");
  if (!budgetLine || !chosen || chosen.dataset.cost !== budgetLine.cost) return [];
  const line = { color: "#2f4b8f", width: 2, dash: "dash" };
  return [{ type: "line", x0: budgetLine.budget, x1: budgetLine.budget, y0: 0, y1: 1, yref: "paper", line, layer: "below" }];
}

for (const box of document.querySelectorAll("[data-chart]")) {
  const plots = box.querySelector(".plots"), setting = box.querySelector(".setting"), layer = box.querySelector(".published");
  redraw[box.dataset.chart] = () => {
    drawings ??= read("drawings");
    const { drawings: byKey, settings } = drawings[box.dataset.chart];
    const key = [...box.querySelectorAll("input[type=radio]:checked")].map(input => input.value).join("|");
    const shown = (byKey[key] ?? []).map(figure => prepared(figure, layer?.checked));
    while (plots.children.length > shown.length) { Plotly.purge(plots.lastChild); plots.lastChild.remove(); }
    while (plots.children.length < shown.length) plots.append(document.createElement("div"));
    shown.forEach(({ data, layout }, at) => {
      if (sharesCost(box)) layout.shapes = lines(box);
      const plot = plots.children[at];
      Plotly.react(plot, data, layout, { displayModeBar: false, responsive: true });
      plot.setAttribute("role", "img");
      plot.setAttribute("aria-label", `${box.dataset.words}, ${layout.title?.text ?? settings[key]}; the same numbers are in the table of points`);
    });
    if (layer) layer.disabled = !shown.some(one => one.published);
    setting.textContent = shown.length ? settings[key] ?? "" : "Nothing to draw: no point was made or scored so.";
    setting.hidden = !setting.textContent;
  };
  box.addEventListener("change", event => {
    if (!event.target.dataset.cost && !waiting.includes(box.dataset.chart)) redraw[box.dataset.chart]();
  });
}
const waiting = Object.keys(redraw);
function drawNext() { // one chart at a time, so that the page answers meanwhile
  const name = waiting.shift();
  if (name === undefined) { document.documentElement.dataset.ready = "yes"; return; }
  redraw[name]();
  setTimeout(drawNext);
}
function drawAll() { while (waiting.length) redraw[waiting.shift()](); }
addEventListener("beforeprint", () => {
  drawAll();
  document.querySelectorAll(".plots > div").forEach(plot => Plotly.Plots.resize(plot));
});

// --- the cost that slider and chart share --------------------------------------------------------------------------------
let showCost = () => {};
document.addEventListener("change", event => {
  const cost = event.target.dataset.cost;
  if (!cost) return;
  for (const input of document.querySelectorAll("input[data-cost]")) if (input.dataset.cost === cost) input.checked = true;
  showCost(cost);
  for (const box of document.querySelectorAll("[data-chart]")) {
    if (sharesCost(box) && !waiting.includes(box.dataset.chart)) redraw[box.dataset.chart]();
  }
});

// --- the budget ----------------------------------------------------------------------------------------------------------
if (explore) {
  const slider = byId("budget"), number = byId("budget-number"), box = byId("chosen");
  let axis = explore.axes[0];
  const list = (target, facts) => {
    target.replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
  };
  const show = (at, asked) => {
    const stop = axis.stops[Math.max(at, 0)], best = explore.configurations[stop.best];
    const other = stop.runner_up === null ? null : explore.configurations[stop.runner_up];
    const amount = `${asked ?? stop.shown} ${axis.unit}`;
    slider.value = Math.max(at, 0);
    slider.setAttribute("aria-valuetext", `${amount}: ${at < 0 ? "nothing fits" : best.words}`);
    number.value = asked ?? stop.shown;
    budgetLine = { cost: axis.cost, budget: asked === undefined ? stop.budget : Number(asked) };
    const lead = make("p", `For ${amount}:`, "lead");
    if (at < 0) {
      box.replaceChildren(lead, make("p", "nothing fits", "best"), make("p", `The cheapest point costs ${stop.shown} ${axis.unit}.`));
      for (const id of ["chosen-facts", "chosen-origin", "chosen-images"]) byId(id).replaceChildren();
      for (const id of ["chosen-command", "chosen-legend"]) byId(id).textContent = "";
      return;
    }
    const next = axis.stops[at + 1];
    const until = next ? `The same up to ${next.shown} ${axis.unit}.` : "The same for any larger budget: no dearer point is better.";
    box.replaceChildren(
      lead,
      make("p", best.words, "best"),
      make("p", `${explore.metric} ${best.score}`),
      make("span", stop.decided ? "decided" : "undecided", stop.decided ? "chip" : "chip open"),
      make("p", `${stop.verdict[0].toUpperCase()}${stop.verdict.slice(1)}. ${until}`, "verdict"),
      ...stop.notes.map(note => make("p", `Note: ${note}.`, "note")),
    );
    list(byId("chosen-facts"), best.facts);
    list(byId("chosen-origin"), best.origin);
    byId("chosen-command").textContent = best.command;
    const shown = [[best, stop.best, "best"], [other, stop.runner_up, ""]].filter(([one]) => one?.has_images);
    byId("chosen-legend").textContent = !shown.length
      ? "No images were kept of this point."
      : `Framed: ${best.has_images ? best.words : "no image was kept"}.` + (other ? ` Beside it the runner-up: ${other.has_images ? other.words : "no image was kept"}.` : "");
    byId("chosen-images").replaceChildren(...(shown.length ? prompts : []).map((prompt, place) => {
      const figure = make("figure"), pair = make("div"), words = make("figcaption", prompt);
      for (const [one, point, className] of shown) {
        pair.append(Object.assign(make("img", "", className), { src: images[point][place], alt: `${prompt} — ${one.words}`, title: one.words }));
      }
      words.title = prompt;
      figure.append(pair, words);
      return figure;
    }));
  };
  const mark = () => {
    for (const box of document.querySelectorAll("[data-chart]")) {
      const plot = sharesCost(box) ? box.querySelector(".plots > div") : null;
      if (plot?.classList.contains("js-plotly-plot")) Plotly.relayout(plot, { shapes: lines(box) });
    }
  };
  const within = budget => axis.stops.findLastIndex(stop => stop.budget <= budget * (1 + 1e-9));
  showCost = cost => {
    axis = explore.axes.find(one => one.cost === cost);
    slider.max = axis.stops.length - 1;
    byId("budget-unit").textContent = axis.unit;
    show(axis.stops.length >> 1);
  };
  slider.addEventListener("input", () => { show(Number(slider.value)); mark(); });
  number.addEventListener("input", () => {
    if (!(number.valueAsNumber > 0)) return;
    show(within(number.valueAsNumber), number.value);
    mark();
  });
  showCost(axis.cost);
  byId("explorer").hidden = false;
}
addEventListener("load", drawNext);

// --- the table -----------------------------------------------------------------------------------------------------------
const { rows: numRows, columns, sorted_by: sortedBy } = read("rows");
const PAGE = 50, MOST_CHOICES = 60, FILTERED = ["size", "solver", "num_steps", "guidance"];
const table = byId("table"), head = table.tHead.insertRow();
const at = (column, row) => (column.codes ? column.codes[row] : row);
const keyOf = (column, row) => column.keys[at(column, row)];
const classOf = column => [column.numeric ? "number" : "", column.aside ? "aside" : ""].join(" ").trim(); // aside: not in print
const textOf = (column, row) => (column.texts ?? column.keys)[at(column, row)];
let order = Array.from({ length: numRows }, (_, row) => row), found = order, first = 0, haystack = null;
const filters = new Map();

function fill() {
  table.tBodies[0].replaceChildren(...found.slice(first, first + PAGE).map(row => {
    const line = document.createElement("tr");
    line.append(...columns.map(column => make("td", textOf(column, row), classOf(column))));
    return line;
  }));
  const count = value => value.toLocaleString("en");
  byId("count").textContent = found.length === numRows ? `${count(numRows)} points` : `${count(found.length)} of ${count(numRows)} points`;
  byId("shown").textContent = found.length ? `Rows ${count(first + 1)} to ${count(Math.min(first + PAGE, found.length))}` : "No row";
  byId("previous").disabled = first === 0;
  byId("next").disabled = first + PAGE >= found.length;
  byId("export").textContent = `Export ${found.length === 1 ? "this point" : `these ${count(found.length)} points`} as CSV`;
  byId("export").disabled = !found.length;
}
function filter() {
  found = order.filter(row => [...filters.values()].every(keeps => keeps(row)));
  first = 0;
  fill();
}
function sort(column, direction) {
  const collator = new Intl.Collator("en");
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(String(a), String(b)));
  order.sort((a, b) => {
    const one = keyOf(column, a), other = keyOf(column, b);
    if (one === null || other === null) return (one === null) - (other === null);
    return direction * compare(one, other) || a - b;
  });
  filter();
}
columns.forEach((column, place) => {
  const cell = make("th", "", classOf(column)), button = Object.assign(make("button", column.title), { type: "button" });
  cell.scope = "col";
  if (sortedBy && sortedBy[0] === place) cell.setAttribute("aria-sort", sortedBy[1]);
  button.addEventListener("click", () => {
    const down = cell.getAttribute("aria-sort") === "ascending";
    for (const other of head.cells) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", down ? "descending" : "ascending");
    sort(column, down ? -1 : 1);
  });
  cell.append(button);
  head.append(cell);
});
function labelled(words, input, className = "") {
  const label = make("label", "", className);
  label.append(...(className ? [input, words] : [words, input]));
  byId("filters").append(label);
  return input;
}
for (const column of columns.filter(one => FILTERED.includes(one.name))) {
  const sorted = new Map(Array.from({ length: numRows }, (_, row) => [textOf(column, row), keyOf(column, row)]));
  if (sorted.size < 2 || sorted.size > MOST_CHOICES) continue;
  const select = labelled(column.title, Object.assign(document.createElement("select"), { name: `filter-${column.name}` }));
  const values = [...sorted].sort((a, b) => (typeof a[1] === "number" ? a[1] - b[1] : a[1] < b[1] ? -1 : 1));
  select.append(new Option("all", ""), ...values.map(([text]) => new Option(text, `=${text}`)));
  select.addEventListener("change", () => {
    if (select.value) filters.set(column.name, row => `=${textOf(column, row)}` === select.value);
    else filters.delete(column.name);
    filter();
  });
}
const search = labelled("any column holds", Object.assign(document.createElement("input"), { type: "search", name: "filter-words" }));
search.addEventListener("input", () => {
  haystack ??= Array.from({ length: numRows }, (_, row) => columns.map(column => textOf(column, row)).join("\n").toLowerCase());
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  filters.set("words", row => words.every(word => haystack[row].includes(word)));
  filter();
});
const last = columns.find(column => column.name === "is_final");
const finals = labelled("last checkpoints only", Object.assign(document.createElement("input"), { type: "checkbox", name: "filter-final" }), "check");
finals.addEventListener("change", () => {
  filters.set("final", row => !finals.checked || keyOf(last, row) === "yes");
  filter();
});
byId("previous").addEventListener("click", () => { first = Math.max(0, first - PAGE); fill(); });
byId("next").addEventListener("click", () => { first += PAGE; fill(); });
byId("export").addEventListener("click", () => {
  const quoted = value => (/[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const line = values => values.map(value => quoted(value === null ? "" : String(value))).join(",");
  const titles = columns.flatMap(({ name, low }) => (low ? [name, `${name}_low`, `${name}_high`] : [name]));
  const values = row => columns.flatMap(column => {
    const own = column.export === "keys" ? keyOf(column, row) : textOf(column, row);
    return column.low ? [own, column.low[row], column.high[row]] : [own];
  });
  const text = [titles, ...found.map(values)].map(line).join("\r\n") + "\r\n";
  const address = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  Object.assign(document.createElement("a"), { href: address, download: "points.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
});
byId("table-box").hidden = false;
fill();
