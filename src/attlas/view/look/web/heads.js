// The grid of heads, coloured by a score, and the heads in the order of it.
const SMALL = "patterns, small";
const LISTED = 200; // heads in the ordered list
let grids = {}; // side -> score -> numbers
let cells = [];

const scoreNames = () => [
  ...atlas.scores.map((score) => score.name), ...(patterns.size > 1 ? [SMALL] : []),
];

async function readScores() {
  const read = async (scores) => Object.fromEntries(
    await Promise.all(scores.map(async (score) => [score.name, await tensor(score.values)])));
  grids = { a: await read(atlas.scores), b: atlas.compare ? await read(atlas.compare.scores) : {} };
  grids.difference = {};
  for (const [name, a] of Object.entries(grids.a)) {
    const b = grids.b[name];
    if (b) grids.difference[name] = a.map((x, i) => x - b[i]);
  }
}

const numbers = () => grids[state.side][state.score] || null;
const small = () => state.score === SMALL;

function setUpHeads() {
  const choice = byId("score");
  for (const name of scoreNames()) choice.append(make("option", { value: name }, shown(name)));
  choice.addEventListener("change", () => change({ score: choice.value }, "heads"));
  const side = byId("side");
  byId("sides").hidden = !atlas.compare;
  if (atlas.compare) {
    const names = { a: `A: ${shown(atlas.model)}`, b: `B: ${shown(atlas.compare.model)}`, difference: "A − B" };
    for (const [value, name] of Object.entries(names)) side.append(make("option", { value }, name));
    side.addEventListener("change", () => change({ side: side.value }, "heads"));
  }
  byId("order").addEventListener("change", rankHeads);
  byId("dot-note").hidden = !patterns.size;
  layOut();
  watch((changes) => {
    if ("score" in changes || "side" in changes) colourHeads();
    if ("head" in changes) markHead();
  });
  painters.push(colourHeads);
}

function layOut() {
  const grid = byId("grid");
  const every = Math.ceil(atlas.heads / 16); // heads whose number is told
  const columns = make("colgroup", {}, make("col", { class: "names" }));
  const top = make("tr", {}, make("th", { scope: "col" }, make("span", { class: "unseen" }, "layer")));
  for (let head = 0; head < atlas.heads; head++) {
    columns.append(make("col"));
    top.append(make("th", { scope: "col" }, head % every ? "" : String(head)));
  }
  const body = make("tbody");
  for (let layer = 0; layer < atlas.layers; layer++) {
    const row = make("tr", {}, make("th", { scope: "row" }, String(layer)));
    for (let head = 0; head < atlas.heads; head++) {
      const cell = make("td", { role: "gridcell", tabindex: -1, "aria-selected": "false" });
      cell.at = [layer, head];
      if (patterns.has(nameOf(cell.at))) cell.classList.add("has");
      cells.push(cell);
      row.append(cell);
    }
    body.append(row);
  }
  grid.append(columns, make("thead", {}, top), body);
  grid.style.setProperty("--tall", atlas.layers > 40 ? ".7rem" : atlas.layers > 20 ? ".95rem" : "1.4rem");
  if (atlas.heads > 40) grid.style.minWidth = `${atlas.heads * 9 + 30}px`;
  if (cells.length) cells[0].tabIndex = 0;
  grid.addEventListener("click", (event) => {
    const cell = event.target.closest("td");
    if (cell) openCell(cell);
  });
  const tellOf = (event) => {
    const cell = event.target.closest("td");
    if (!cell) return;
    byId("grid-value").textContent = cell.getAttribute("aria-label");
    if (event.type === "focusin") tell(cell.getAttribute("aria-label"));
  };
  grid.addEventListener("mouseover", tellOf);
  grid.addEventListener("focusin", tellOf);
  grid.addEventListener("keydown", moveInGrid);
}

function openCell(cell) {
  cell.focus({ preventScroll: true });
  change({ layer: cell.at[0], head: cell.at[1] }, "heads");
}

function moveInGrid(event) {
  const cell = event.target.closest("td");
  if (!cell) return;
  const [layer, head] = cell.at;
  const to = {
    ArrowUp: [layer - 1, head], ArrowDown: [layer + 1, head], ArrowLeft: [layer, head - 1],
    ArrowRight: [layer, head + 1], Home: [layer, 0], End: [layer, atlas.heads - 1],
    PageUp: [0, head], PageDown: [atlas.layers - 1, head],
  }[event.key];
  if (event.key === "Enter" || event.key === " ") openCell(cell);
  else if (to) {
    const next = cells[clamp(to[0], 0, atlas.layers - 1) * atlas.heads + clamp(to[1], 0, atlas.heads - 1)];
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  } else return;
  event.preventDefault();
}

// The scale of a grid: from the least to the largest, or as far below zero as above.
function range(values) {
  let [least, most] = [Infinity, -Infinity];
  for (const x of values) if (!Number.isNaN(x)) [least, most] = [Math.min(least, x), Math.max(most, x)];
  if (least > most) return { least: 0, most: 1, ramp: "sequential" };
  if (state.side !== "difference" && least >= 0) return { least: least / (most || 1) > 0.5 ? least : 0, most, ramp: "sequential" };
  const wide = Math.max(-least, most) || 1;
  return { least: -wide, most: wide, ramp: "diverging" };
}

function colourHeads() {
  byId("score").value = state.score || "";
  byId("side").value = state.side;
  byId("grid").classList.toggle("small", small());
  byId("scale").hidden = small() || !numbers();
  const score = atlas.scores.find((each) => each.name === state.score);
  const sign = state.side === "difference" ? " Blue where A has more, red where B has." : "";
  byId("meaning").textContent = small() ? "The recorded patterns: queries down, keys across." : score ? shown(score.meaning) + sign : "";
  for (const cell of cells) cell.querySelector("canvas")?.remove();
  const values = numbers();
  const { least, most, ramp } = range(values || []);
  cells.forEach((cell, i) => {
    const value = values ? values[i] : NaN;
    const told = small() ? (cell.classList.contains("has") ? "pattern" : "no pattern") : number(value);
    cell.classList.toggle("none", Number.isNaN(value) && !small());
    cell.style.backgroundColor = Number.isNaN(value) ? "" : rgb(ramp, (value - least) / (most - least || 1));
    cell.setAttribute("aria-label", `Layer ${cell.at[0]}, head ${cell.at[1]}: ${told}`);
    if (small() && cell.classList.contains("has")) thumbnail(cell);
  });
  byId("least").textContent = number(least, 3);
  byId("most").textContent = number(most, 3);
  const bar = byId("scale-bar").getContext("2d");
  const image = bar.createImageData(256, 1);
  new Uint32Array(image.data.buffer).set(ramps[ramp]);
  bar.putImageData(image, 0, 0);
  rankHeads();
}

// A whole pattern in few pixels: the largest weight of each.
async function thumbnail(cell) {
  const pattern = patterns.get(nameOf(cell.at));
  const side = Math.min(32, pattern.queries);
  const canvas = make("canvas", { "aria-hidden": "true", width: side, height: side });
  cell.append(canvas);
  const most = new Float32Array(side * side);
  const put = (data, rows, columns, width, row0 = 0, column0 = 0) => {
    for (let i = 0; i < data.length; i++) {
      const row = Math.floor((((i / width) | 0) + row0) * side / rows);
      const at = row * side + Math.floor(((i % width) + column0) * side / columns);
      if (data[i] > most[at]) most[at] = data[i];
    }
  };
  if (pattern.whole) put(await raw(pattern.whole).promise, pattern.queries, pattern.keys, pattern.keys);
  else {
    const level = pattern.levels[pattern.levels.length - 1];
    for (const tile of level.tiles) {
      put(await raw(tile.maxima).promise, level.rows, level.columns, tile.maxima.shape[1], tile.row, tile.column);
    }
  }
  const image = canvas.getContext("2d").createImageData(side, side);
  const pixels = new Uint32Array(image.data.buffer);
  most.forEach((x, i) => (pixels[i] = ramps.sequential[Math.round(255 * Math.sqrt(x / 65535))]));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function rankHeads() {
  const list = byId("ranked");
  const values = numbers();
  byId("ranked-title").hidden = byId("order").hidden = list.hidden = !values;
  list.replaceChildren();
  if (!values) return;
  const down = byId("order").value === "down" ? 1 : -1;
  const order = [...values.keys()].filter((i) => !Number.isNaN(values[i])).sort((a, b) => down * (values[b] - values[a]));
  const widest = Math.max(...order.map((i) => Math.abs(values[i])), 1e-12);
  for (const i of order.slice(0, LISTED)) {
    const bar = make("i", { "aria-hidden": "true" });
    bar.style.width = `${(100 * Math.abs(values[i])) / widest}%`;
    if (values[i] < 0) bar.style.background = styles.bad;
    const name = nameOf(cells[i].at);
    const button = make("button", { type: "button" }, make("span", {}, name), bar, make("span", {}, number(values[i])));
    button.addEventListener("click", () => change({ layer: cells[i].at[0], head: cells[i].at[1] }, "ranked"));
    button.dataset.head = name;
    list.append(make("li", {}, button));
  }
  markHead();
}

function markHead() {
  for (const cell of cells) cell.setAttribute("aria-selected", String(nameOf(cell.at) === headName()));
  for (const button of byId("ranked").querySelectorAll("button")) {
    if (button.dataset.head === headName()) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}
