"use strict";
// Draws the page from the JSON beside it. No library, no request: the page must still open years later, offline.

const data = JSON.parse(document.getElementById("data").textContent);
const [first, second] = data.adapters;
const byId = (id) => document.getElementById(id);
const state = { measure: Object.keys(data.measures)[0], name: null };
const rowOf = data.adapters.map((adapter) => new Map(adapter.columns.name.map((name, row) => [name, row])));

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function figure(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function valueOf(adapter, name, measure) {
  const row = rowOf[adapter].get(name);
  const column = data.adapters[adapter].columns[measure];
  return row === undefined || !column ? null : column[row];
}

// Lightness rises evenly from dark blue to light yellow: it reads the same to every kind of color vision, and in gray.
function color(share) {
  const t = Math.min(1, Math.max(0, share));
  return `oklab(${0.27 + 0.66 * t} ${(-0.015 - 0.03 * t * (1 - t)).toFixed(4)} ${(-0.11 + 0.25 * t).toFixed(4)})`;
}

// ---- the map ---------------------------------------------------------------------------------------------------------

// Blocks from left to right, kinds of module from top to bottom, one group for each stack of blocks.
function layout(adapter) {
  const { name, stack, index, module } = data.adapters[adapter].columns;
  const groups = new Map();
  name.forEach((one, row) => {
    if (!groups.has(stack[row])) groups.set(stack[row], { stack: stack[row], blocks: new Set(), rows: new Map() });
    const group = groups.get(stack[row]);
    group.blocks.add(index[row] ?? 0);
    if (!group.rows.has(module[row])) group.rows.set(module[row], new Map());
    const cells = group.rows.get(module[row]);
    const expert = one.match(/\[(\d+)\]$/);
    if (!expert) cells.set(index[row] ?? 0, one);
    else group.rows.set(`${module[row]}[${expert[1]}]`, (group.rows.get(`${module[row]}[${expert[1]}]`) ?? new Map()).set(index[row] ?? 0, one));
  });
  for (const group of groups.values()) {
    group.blocks = [...group.blocks].sort((a, b) => a - b);
    for (const [module, cells] of group.rows) if (!cells.size) group.rows.delete(module);
  }
  return [...groups.values()];
}

function range(measure) {
  const compared = data.compared.includes(measure);
  const values = data.adapters
    .filter((_, number) => number === 0 || !compared)
    .flatMap((adapter) => adapter.columns[measure] ?? [])
    .filter((value) => typeof value === "number");
  return [Math.min(0, ...values), Math.max(...values)];
}

function drawMaps() {
  const [low, high] = range(state.measure);
  const compared = data.compared.includes(state.measure);
  const shown = second && !compared ? [0, 1] : [0];
  const maps = shown.map((adapter) => {
    const box = element("div", { class: "map" });
    if (second) box.append(element("h3", {}, compared ? `${first.source} against ${second.source}` : data.adapters[adapter].source));
    for (const group of layout(adapter)) box.append(drawGroup(group, adapter, low, high));
    return box;
  });
  const colors = [0, 0.25, 0.5, 0.75, 1].map(color).join(", ");
  const legend = element("div", { class: "legend" }, figure(low));
  legend.append(element("span", { class: "scale", style: `background: linear-gradient(to right in oklab, ${colors})` }), figure(high));
  legend.append(element("span", {}, data.measures[state.measure]));
  byId("maps").replaceChildren(...maps, legend);
  markChosen();
}

function drawGroup(group, adapter, low, high) {
  const columns = `max-content repeat(${group.blocks.length}, minmax(.45rem, 1fr))`;
  const label = `${data.measures[state.measure]}, ${group.stack || "modules"}, ${data.adapters[adapter].source}`;
  const grid = element("div", { class: "grid", role: "grid", "aria-label": label, style: `grid-template-columns: ${columns}` });
  for (const [module, cells] of group.rows) {
    const line = element("div", { role: "row" }, element("span", { class: "head row", role: "rowheader" }, module));
    for (const block of group.blocks) {
      const name = cells.get(block);
      const value = name === undefined ? null : valueOf(adapter, name, state.measure);
      const cell = element("div", { class: "cell", role: "gridcell", tabindex: "-1" });
      cell.setAttribute("aria-label", name === undefined ? `${module}, block ${block}: not adapted` : `${name}: ${figure(value)}`);
      cell.title = cell.getAttribute("aria-label");
      if (typeof value === "number") cell.style.background = color(high > low ? (value - low) / (high - low) : 0);
      else cell.classList.add("none");
      if (name !== undefined) cell.dataset.name = name;
      line.append(cell);
    }
    grid.append(line);
  }
  const line = element("div", { role: "row" }, element("span", { class: "head row", role: "columnheader" }, group.stack));
  const every = Math.ceil(group.blocks.length / (second ? 10 : 20));
  group.blocks.forEach((block, number) =>
    line.append(element("span", { class: "head column", role: "columnheader" }, number % every ? "" : String(block))));
  if (group.stack || group.blocks.length > 1) grid.append(line);
  grid.addEventListener("click", (event) => event.target.dataset?.name && choose(event.target.dataset.name));
  grid.addEventListener("keydown", (event) => move(event, grid, group));
  return grid;
}

function move(event, grid, group) {
  const cells = [...grid.querySelectorAll(".cell")];
  const at = cells.indexOf(document.activeElement);
  const width = group.blocks.length;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: width, ArrowUp: -width, Home: -(at % width), End: width - 1 - (at % width) };
  if (at < 0 || !(event.key in steps)) return;
  event.preventDefault();
  const next = cells[at + steps[event.key]];
  if (!next || (event.key.match(/Left|Right/) && Math.floor((at + steps[event.key]) / width) !== Math.floor(at / width))) return;
  if (next.dataset.name) choose(next.dataset.name);
  cells.forEach((cell) => cell.setAttribute("tabindex", "-1"));
  next.setAttribute("tabindex", "0");
  next.focus();
}

function markChosen() {
  for (const grid of document.querySelectorAll(".grid")) {
    const cells = [...grid.querySelectorAll(".cell")];
    for (const cell of cells) {
      const chosen = cell.dataset.name === state.name;
      cell.classList.toggle("chosen", chosen);
      cell.setAttribute("aria-selected", String(chosen));
      cell.setAttribute("tabindex", chosen ? "0" : "-1");
    }
    if (!cells.some((cell) => cell.tabIndex === 0) && cells.length) cells[0].setAttribute("tabindex", "0");
  }
}

// ---- one layer -------------------------------------------------------------------------------------------------------

function choose(name) {
  state.name = name;
  markChosen();
  byId("layer-title").textContent = name;
  const spectra = data.adapters.map((adapter, number) => adapter.spectra[rowOf[number].get(name)]);
  const charts = [chart("Singular values of the update", spectra)];
  charts.push(chart("Share of the update kept by rank", spectra.map(keptBy), { top: 1 }));
  if (data.cosines[name]?.length) {
    charts.push(chart("Cosines of the principal angles to the other's input directions", [data.cosines[name]], { top: 1 }));
  }
  const tuned = data.adapters.map((adapter, number) => adapter.tunedCosines[rowOf[number].get(name)] ?? undefined);
  if (tuned.some(Boolean)) {
    charts.push(chart(`Tuned weight's leading directions: cosine to the base's nearest (below ${data.intruderCosine}: intruders)`, tuned, { top: 1, line: data.intruderCosine }));
  }
  for (const [title, { steps, layers }] of Object.entries(data.history)) {
    if (layers[name]?.length > 1) charts.push(chart(`${title}, while training`, [layers[name]], { ticks: steps, dots: false }));
  }
  const quantized = data.quantization[name];
  if (quantized) {
    const errors = [spectra[0], quantized.spectrum];
    charts.push(chart("Singular values of the update and of the quantization error", errors, { names: ["update", "quantization error"] }));
    const codes = [quantized.shares, quantized.expected];
    charts.push(chart("How often each 4-bit code is used", codes, { names: ["used", "expected of normal weights"], ticks: quantized.values.map(figure) }));
  }
  byId("charts").replaceChildren(...charts);
  drawFigures(name);
}

function keptBy(values) {
  if (!values) return undefined;
  const squares = values.map((value) => value * value);
  const total = squares.reduce((sum, square) => sum + square, 0);
  let sum = 0;
  return squares.map((square) => (total ? (sum += square) / total : 0));
}

function drawFigures(name) {
  const columns = [...new Set(data.adapters.flatMap((adapter) => Object.keys(adapter.columns)))];
  const skipped = new Set(["name", "stack", "index", "module"]);
  const heads = data.adapters.map((adapter) => element("th", { scope: "col" }, adapter.source));
  byId("figures").tHead.replaceChildren(element("tr", {}, element("th", { scope: "col" }, "figure"), ...heads));
  const rows = columns.filter((column) => !skipped.has(column)).map((column) => {
    const words = data.measures[column] ?? column.replaceAll("_", " ");
    const cells = data.adapters.map((_, number) => element("td", {}, figure(valueOf(number, name, column))));
    return element("tr", { "data-column": column }, element("th", { scope: "row" }, words), ...cells);
  });
  byId("figures").tBodies[0].replaceChildren(...rows);
}

// top: of the scale; line: a value to draw across; ticks: labels below the values; names: of the two series.
function chart(title, series, { top = null, line = null, ticks = null, names = null, dots = true } = {}) {
  const [width, height, left, bottom] = [360, 190, 44, 24];
  const drawn = series.filter((values) => values?.length);
  const longest = Math.max(1, ...drawn.map((values) => values.length));
  const high = top ?? (Math.max(...drawn.flat(), 0) || 1);
  const x = (place) => left + ((place + 0.5) / longest) * (width - left - 6);
  const y = (value) => height - bottom - (value / high) * (height - bottom - 10);
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${describe(drawn)}` });
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(node("line", { class: share ? "gridline" : "axis", x1: left, x2: width, y1: y(share * high), y2: y(share * high) }));
    svg.append(node("text", { x: left - 6, y: y(share * high) + 4, "text-anchor": "end" }, figure(Number((share * high).toPrecision(2)))));
  }
  const every = Math.ceil(longest / 8);
  for (let place = 0; place < longest; place += every) {
    svg.append(node("text", { x: x(place), y: height - 8, "text-anchor": "middle" }, String(ticks ? ticks[place] : place + 1)));
  }
  if (line !== null) svg.append(node("line", { class: "axis", "stroke-dasharray": "4 3", x1: left, x2: width, y1: y(line), y2: y(line) }));
  series.forEach((values, number) => {
    if (!values?.length) return;
    const kind = number ? "second" : "first";
    const points = values.map((value, place) => `${x(place).toFixed(1)},${y(value).toFixed(1)}`);
    svg.append(node("path", { class: `line ${kind}`, d: `M${points.join("L")}` }));
    if (longest > 80 || !dots) return;
    values.forEach((value, place) => svg.append(node("circle", { class: kind, cx: x(place), cy: y(value), r: 2.6 }, node("title", {}, `${place + 1}: ${figure(value)}`))));
  });
  const box = element("figure", {}, element("h3", {}, title), svg);
  if (drawn.length > 1) {
    const words = names ?? [first.source, second.source];
    const spans = words.map((word, number) =>
      element("span", { class: number ? "second-name" : "first-name" }, `${number ? "○" : "●"} ${word} `));
    box.append(element("figcaption", {}, ...spans));
  }
  return box;
}

function node(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function describe(series) {
  return series.map((values) => `${values.length} values from ${figure(values[0])} to ${figure(values.at(-1))}`).join("; ");
}

// ---- the page --------------------------------------------------------------------------------------------------------

function drawTable() {
  if (byId("table").tHead.rows.length) return;
  const columns = Object.keys(first.columns);
  byId("table").tHead.append(element("tr", {}, ...columns.map((column) => element("th", { scope: "col" }, column.replaceAll("_", " ")))));
  first.columns.name.forEach((name, row) => {
    const cells = columns.map((column) => element(column === "name" ? "th" : "td", {}, figure(first.columns[column][row])));
    byId("table").tBodies[0].append(element("tr", {}, ...cells));
  });
}

byId("title").textContent = second ? `${first.source} and ${second.source}` : first.source;
byId("summary").textContent = data.adapters
  .map((adapter) => `${adapter.columns.name.length} layers, ${figure(adapter.parameters)} parameters, norm ${figure(adapter.norm)}`)
  .join("; ") + (data.base ? `; on ${data.base}` : "");
byId("findings").append(...data.findings.map((finding) => element("li", {}, finding)));
byId("measure").append(...Object.entries(data.measures).map(([value, words]) => element("option", { value }, words)));
byId("measure").addEventListener("change", (event) => { state.measure = event.target.value; drawMaps(); });
byId("all").addEventListener("toggle", drawTable);
drawMaps();
choose(first.columns.name[first.columns.norm.indexOf(Math.max(...first.columns.norm))]);
