"use strict";
const byId = id => document.getElementById(id);
const readJson = id => JSON.parse(byId(id).textContent);
const createElement = (tag, text = "", className = "") => Object.assign(document.createElement(tag), { textContent: text, className });

// --- images: each is embedded once and used in several parts of the page ----------------------------------------------
const { slider: sliderData, images, prompts } = readJson("report-data");
for (const image of document.querySelectorAll("img[data-image]")) {
  image.src = images[image.dataset.image][image.dataset.index];
}
document.addEventListener("change", event => {
  if (event.target.name !== "grid-columns") return;
  for (const grid of document.querySelectorAll("[data-grid]")) grid.hidden = grid.dataset.grid !== event.target.value;
});

// --- charts ------------------------------------------------------------------------------------------------------------
let charts; // parsed when the first chart is rendered: slider and table come first, and plotly is large
const renderChart = {};
let budgetLine = null; // {cost, budget} of the slider

function prepareFigure(figure, showPublished) {
  const hasPublished = figure.data.some(trace => trace.meta === "published");
  const data = figure.data.map(trace => (trace.meta === "published" ? { ...trace, visible: showPublished } : trace));
  const layout = { ...figure.layout, xaxis: { ...figure.layout.xaxis }, yaxis: { ...figure.layout.yaxis } };
  if (hasPublished && showPublished) for (const axis of ["xaxis", "yaxis"]) Object.assign(layout[axis], figure.layout.meta.published[axis]);
  return { data, layout, hasPublished };
}

const hasCostAxis = box => box.querySelector("input[data-cost]") !== null;
function budgetShapes(box) {
  const chosen = box.querySelector("input[data-cost]:checked");
  if (!budgetLine || !chosen || chosen.dataset.cost !== budgetLine.cost) return [];
  const line = { color: "#2f4b8f", width: 2, dash: "dash" };
  return [{ type: "line", x0: budgetLine.budget, x1: budgetLine.budget, y0: 0, y1: 1, yref: "paper", line, layer: "below" }];
}

for (const box of document.querySelectorAll("[data-chart]")) {
  const plots = box.querySelector(".plots"), subtitle = box.querySelector(".subtitle"), published = box.querySelector(".published");
  renderChart[box.dataset.chart] = () => {
    charts ??= readJson("chart-data");
    const { figures, subtitles } = charts[box.dataset.chart];
    const key = [...box.querySelectorAll("input[type=radio]:checked")].map(input => input.value).join("|");
    const prepared = (figures[key] ?? []).map(figure => prepareFigure(figure, published?.checked));
    while (plots.children.length > prepared.length) { Plotly.purge(plots.lastChild); plots.lastChild.remove(); }
    while (plots.children.length < prepared.length) plots.append(document.createElement("div"));
    prepared.forEach(({ data, layout }, index) => {
      if (hasCostAxis(box)) layout.shapes = budgetShapes(box);
      const plot = plots.children[index];
      Plotly.react(plot, data, layout, { displayModeBar: false, responsive: true });
      plot.setAttribute("role", "img");
      plot.setAttribute("aria-label", `${box.dataset.title}, ${layout.title?.text ?? subtitles[key]}; the same numbers are in the table of points`);
    });
    if (published) published.disabled = !prepared.some(figure => figure.hasPublished);
    subtitle.textContent = prepared.length ? subtitles[key] ?? "" : "No data: there is no scored point for this selection.";
    subtitle.hidden = !subtitle.textContent;
  };
  box.addEventListener("change", event => {
    if (!event.target.dataset.cost && !pendingCharts.includes(box.dataset.chart)) renderChart[box.dataset.chart]();
  });
}
const pendingCharts = Object.keys(renderChart);
function renderNextChart() { // one chart at a time, so that the page stays responsive
  const name = pendingCharts.shift();
  if (name === undefined) { document.documentElement.dataset.ready = "yes"; return; }
  renderChart[name]();
  setTimeout(renderNextChart);
}
function renderPendingCharts() { while (pendingCharts.length) renderChart[pendingCharts.shift()](); }
addEventListener("beforeprint", () => {
  renderPendingCharts();
  document.querySelectorAll(".plots > div").forEach(plot => Plotly.Plots.resize(plot));
});

// --- the cost axis, shared by slider and charts ---------------------------------------------------------------------------
let selectCost = () => {};
document.addEventListener("change", event => {
  const cost = event.target.dataset.cost;
  if (!cost) return;
  for (const input of document.querySelectorAll("input[data-cost]")) if (input.dataset.cost === cost) input.checked = true;
  selectCost(cost);
  for (const box of document.querySelectorAll("[data-chart]")) {
    if (hasCostAxis(box) && !pendingCharts.includes(box.dataset.chart)) renderChart[box.dataset.chart]();
  }
});

// --- the budget slider ---------------------------------------------------------------------------------------------------
if (sliderData) {
  const slider = byId("budget"), numberInput = byId("budget-number"), selected = byId("selected");
  let axis = sliderData.axes[0];
  const fillList = (list, facts) => {
    list.replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [createElement("dt", name), createElement("dd", value)]));
  };
  // index: position of the slider, -1 if the budget is below every point; typedBudget: the text of the number input, if it was used
  const showBudget = (index, typedBudget) => {
    const position = axis.values[Math.max(index, 0)], best = sliderData.configurations[position.best];
    const runnerUp = position.runner_up === null ? null : sliderData.configurations[position.runner_up];
    const amount = `${typedBudget ?? position.budget_text} ${axis.unit}`;
    slider.value = Math.max(index, 0);
    slider.setAttribute("aria-valuetext", `${amount}: ${index < 0 ? "nothing fits" : best.label}`);
    numberInput.value = typedBudget ?? position.budget_text;
    budgetLine = { cost: axis.cost, budget: typedBudget === undefined ? position.budget : Number(typedBudget) };
    const lead = createElement("p", `For ${amount}:`, "lead");
    if (index < 0) {
      const cheapest = createElement("p", `The cheapest point costs ${position.budget_text} ${axis.unit}.`);
      selected.replaceChildren(lead, createElement("p", "nothing fits", "best"), cheapest);
      for (const id of ["selected-facts", "selected-sources", "selected-images"]) byId(id).replaceChildren();
      for (const id of ["selected-command", "selected-legend"]) byId(id).textContent = "";
      return;
    }
    const next = axis.values[index + 1];
    const validity = next
      ? `The same configuration is best up to ${next.budget_text} ${axis.unit}.`
      : "The same configuration is best for any larger budget: no more expensive point is better.";
    selected.replaceChildren(
      lead,
      createElement("p", best.label, "best"),
      createElement("p", `${sliderData.metric} ${best.score}`),
      createElement("span", position.decided ? "decided" : "undecided", position.decided ? "chip" : "chip open"),
      createElement("p", `${position.verdict[0].toUpperCase()}${position.verdict.slice(1)}. ${validity}`, "verdict"),
      ...position.notes.map(note => createElement("p", `Note: ${note}.`, "note")),
    );
    fillList(byId("selected-facts"), best.facts);
    fillList(byId("selected-sources"), best.sources);
    byId("selected-command").textContent = best.command;
    const withImages = [
      { configuration: best, point: position.best, className: "best" },
      { configuration: runnerUp, point: position.runner_up, className: "" },
    ].filter(({ configuration }) => configuration?.has_images);
    const imageLabel = configuration => (configuration.has_images ? configuration.label : "no image was saved");
    byId("selected-legend").textContent = !withImages.length
      ? "No images were saved for this point."
      : `Framed: ${imageLabel(best)}.` + (runnerUp ? ` Without a frame: the runner-up, ${imageLabel(runnerUp)}.` : "");
    byId("selected-images").replaceChildren(...(withImages.length ? prompts : []).map((prompt, promptIndex) => {
      const figure = createElement("figure"), pair = createElement("div"), caption = createElement("figcaption", prompt);
      for (const { configuration, point, className } of withImages) {
        const { label } = configuration;
        const image = createElement("img", "", className);
        pair.append(Object.assign(image, { src: images[point][promptIndex], alt: `${prompt} — ${label}`, title: label }));
      }
      caption.title = prompt;
      figure.append(pair, caption);
      return figure;
    }));
  };
  const moveBudgetLine = () => {
    for (const box of document.querySelectorAll("[data-chart]")) {
      const plot = hasCostAxis(box) ? box.querySelector(".plots > div") : null;
      if (plot?.classList.contains("js-plotly-plot")) Plotly.relayout(plot, { shapes: budgetShapes(box) });
    }
  };
  const positionOf = budget => axis.values.findLastIndex(position => position.budget <= budget * (1 + 1e-9));
  selectCost = cost => {
    axis = sliderData.axes.find(candidate => candidate.cost === cost);
    slider.max = axis.values.length - 1;
    byId("budget-unit").textContent = axis.unit;
    showBudget(axis.values.length >> 1);
  };
  slider.addEventListener("input", () => { showBudget(Number(slider.value)); moveBudgetLine(); });
  numberInput.addEventListener("input", () => {
    if (!(numberInput.valueAsNumber > 0)) return;
    showBudget(positionOf(numberInput.valueAsNumber), numberInput.value);
    moveBudgetLine();
  });
  selectCost(axis.cost);
  byId("slider-panel").hidden = false;
}
addEventListener("load", renderNextChart);

// --- the table of points -------------------------------------------------------------------------------------------------
const { rows: numRows, columns, sorted_by: initialSort } = readJson("point-data");
const PAGE_SIZE = 50, MAX_OPTIONS = 60;
const FILTER_COLUMNS = ["size", "solver", "num_steps", "guidance", "guide", "guidance_interval", "guidance_schedule"];
const table = byId("table"), headerRow = table.tHead.insertRow();
const valueIndex = (column, row) => (column.codes ? column.codes[row] : row);
const keyOf = (column, row) => column.keys[valueIndex(column, row)];
const textOf = (column, row) => (column.texts ?? column.keys)[valueIndex(column, row)];
const classOf = column => [column.numeric ? "number" : "", column.screen_only ? "screen-only" : ""].join(" ").trim();
let sortedRows = Array.from({ length: numRows }, (_, row) => row), matchingRows = sortedRows, firstRow = 0, searchTexts = null;
const filters = new Map();

function fillTable() {
  table.tBodies[0].replaceChildren(...matchingRows.slice(firstRow, firstRow + PAGE_SIZE).map(row => {
    const tableRow = document.createElement("tr");
    tableRow.append(...columns.map(column => createElement("td", textOf(column, row), classOf(column))));
    return tableRow;
  }));
  const count = value => value.toLocaleString("en"), numMatching = matchingRows.length;
  byId("count").textContent = numMatching === numRows ? `${count(numRows)} points` : `${count(numMatching)} of ${count(numRows)} points`;
  byId("visible-rows").textContent = numMatching ? `Rows ${count(firstRow + 1)} to ${count(Math.min(firstRow + PAGE_SIZE, numMatching))}` : "No rows";
  byId("previous").disabled = firstRow === 0;
  byId("next").disabled = firstRow + PAGE_SIZE >= numMatching;
  byId("export").textContent = `Export ${numMatching === 1 ? "this point" : `these ${count(numMatching)} points`} as CSV`;
  byId("export").disabled = !numMatching;
}
function applyFilters() {
  matchingRows = sortedRows.filter(row => [...filters.values()].every(matches => matches(row)));
  firstRow = 0;
  fillTable();
}
function sortRows(column, direction) {
  const collator = new Intl.Collator("en");
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(String(a), String(b)));
  sortedRows.sort((rowA, rowB) => {
    const a = keyOf(column, rowA), b = keyOf(column, rowB);
    if (a === null || b === null) return (a === null) - (b === null);
    return direction * compare(a, b) || rowA - rowB;
  });
  applyFilters();
}
columns.forEach((column, index) => {
  const cell = createElement("th", "", classOf(column)), button = Object.assign(createElement("button", column.title), { type: "button" });
  cell.scope = "col";
  if (initialSort && initialSort[0] === index) cell.setAttribute("aria-sort", initialSort[1]);
  button.addEventListener("click", () => {
    const isDescending = cell.getAttribute("aria-sort") === "ascending";
    for (const headerCell of headerRow.cells) headerCell.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
    sortRows(column, isDescending ? -1 : 1);
  });
  cell.append(button);
  headerRow.append(cell);
});
function addFilter(title, input, className = "") {
  const label = createElement("label", "", className);
  label.append(...(className ? [input, title] : [title, input]));
  byId("filters").append(label);
  return input;
}
for (const column of columns.filter(candidate => FILTER_COLUMNS.includes(candidate.name))) {
  const keyByText = new Map(Array.from({ length: numRows }, (_, row) => [textOf(column, row), keyOf(column, row)]));
  if (keyByText.size < 2 || keyByText.size > MAX_OPTIONS) continue;
  const select = addFilter(column.title, Object.assign(document.createElement("select"), { name: `filter-${column.name}` }));
  const options = [...keyByText].sort((a, b) => (typeof a[1] === "number" ? a[1] - b[1] : a[1] < b[1] ? -1 : 1));
  select.append(new Option("all", ""), ...options.map(([text]) => new Option(text || "none", `=${text}`)));
  select.addEventListener("change", () => {
    if (select.value) filters.set(column.name, row => `=${textOf(column, row)}` === select.value);
    else filters.delete(column.name);
    applyFilters();
  });
}
const search = addFilter("search in all columns", Object.assign(document.createElement("input"), { type: "search", name: "filter-text" }));
search.addEventListener("input", () => {
  searchTexts ??= Array.from({ length: numRows }, (_, row) => columns.map(column => textOf(column, row)).join("\n").toLowerCase());
  const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  filters.set("text", row => terms.every(term => searchTexts[row].includes(term)));
  applyFilters();
});
const isFinalColumn = columns.find(column => column.name === "is_final");
const finalOnly = addFilter("only final checkpoints", Object.assign(document.createElement("input"), { type: "checkbox", name: "filter-final" }), "checkbox");
finalOnly.addEventListener("change", () => {
  filters.set("final", row => !finalOnly.checked || keyOf(isFinalColumn, row) === "yes");
  applyFilters();
});
byId("previous").addEventListener("click", () => { firstRow = Math.max(0, firstRow - PAGE_SIZE); fillTable(); });
byId("next").addEventListener("click", () => { firstRow += PAGE_SIZE; fillTable(); });
byId("export").addEventListener("click", () => {
  const quote = value => (/[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const csvLine = values => values.map(value => quote(value === null ? "" : String(value))).join(",");
  const titles = columns.flatMap(({ name, low }) => (low ? [name, `${name}_low`, `${name}_high`] : [name]));
  const csvValues = row => columns.flatMap(column => {
    const value = column.export === "keys" ? keyOf(column, row) : textOf(column, row);
    return column.low ? [value, column.low[row], column.high[row]] : [value];
  });
  const text = [titles, ...matchingRows.map(csvValues)].map(csvLine).join("\r\n") + "\r\n";
  const url = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  Object.assign(document.createElement("a"), { href: url, download: "points.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
});
byId("table-panel").hidden = false;
fillTable();
