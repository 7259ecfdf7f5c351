// A head's pattern: cells of the whole text where it is seen from afar, each query's keys from near.
const LEFT = 92, TOP = 66; // room for the tokens' names
const seen = { top: 0, left: 0, span: 0 }; // tokens at the edges, and a side's length in tokens
const sheet = document.createElement("canvas"); // a pixel for `unit` tokens
let plot = null;
let measure = "maxima";
const longest = Math.max(tokens.length, keyTokens.length);

function setUpPattern() {
  const panel = panels.pattern;
  if (!panel) return;
  const canvas = make("canvas", { class: "plot", tabindex: 0, role: "application", id: "plot", "aria-roledescription": "pattern",
    "aria-label": "Pattern: queries down, keys across", "aria-describedby": "plot-keys" });
  const choice = make("select", { id: "measure" },
    make("option", { value: "maxima" }, "largest weight"), make("option", { value: "mass" }, "share of attention"));
  choice.addEventListener("change", () => {
    measure = choice.value;
    drawPattern();
  });
  const zoom = (name, label, by) => make("button", { type: "button", "aria-label": label, onclick: () => zoomBy(by) }, name);
  panel.body.append(
    make("div", { class: "steps" }, make("label", { for: "measure" }, "Colour"), choice,
      zoom("+", "Zoom in", 0.5), zoom("−", "Zoom out", 2),
      make("button", { type: "button", onclick: () => see({ top: 0, left: 0, span: longest }) }, "Whole text")),
    canvas, make("p", { class: "readout", id: "pattern-value" }), make("ul", { class: "chips", id: "strongest", "aria-label": "Strongest keys of this query" }),
    make("p", { class: "note", id: "plot-keys" }, "Drag to move; scroll to zoom once the pattern has focus. Arrows move the cursor (with Shift by ten), + and − zoom, 0 shows the whole text, Page Up and Down scroll, Enter opens the neurons."));
  plot = { canvas, side: 0, unit: 1 };
  seen.span = longest;
  panel.draw = framed(drawPattern);
  setUpMoves(canvas);
  watch((changes, from, before) => {
    if ("head" in changes || "token" in changes || "key" in changes) {
      if ("token" in changes && from !== "pattern") showToken(from === "search" || from === "link");
      panel.draw();
    }
  });
}

function see(to) {
  Object.assign(seen, to);
  seen.span = clamp(seen.span, Math.min(8, longest), longest);
  seen.top = clamp(seen.top, 0, Math.max(0, tokens.length - seen.span));
  seen.left = clamp(seen.left, 0, Math.max(0, keyTokens.length - seen.span));
  panels.pattern.draw();
}

// Brings the cursor's query into sight; from near where the whole would hide it.
function showToken(near) {
  const span = near ? Math.min(seen.span, 64) : seen.span;
  if (state.token < seen.top || state.token >= seen.top + seen.span || span !== seen.span) {
    const key = state.key ?? state.token;
    see({ span, top: Math.round(state.token - span / 2), left: Math.round(key - span / 2) });
  }
}

// The most of what stands in each cell of the sheet, of `unit` tokens a side, from (top, left) on.
function fill(pattern, most, side, unit, top, left) {
  const level = pattern.levels.filter((each) => each.cell <= unit).pop();
  if (pattern.whole) return fillWhole(pattern, most, side, unit, top, left);
  if (level) return fillTiles(level, most, side, unit, top, left);
  return fillStrips(pattern, most, side, unit, top, left);
}

function fillWhole(pattern, most, side, unit, top, left) {
  const data = ready(pattern.whole, panels.pattern.draw);
  if (!data) return;
  const [rows, columns] = [Math.min(pattern.queries, top + side * unit), Math.min(pattern.keys, left + side * unit)];
  for (let row = top; row < rows; row++) {
    const to = Math.floor((row - top) / unit) * side;
    for (let key = left; key < columns; key++) put(most, to + Math.floor((key - left) / unit), data[row * pattern.keys + key], unit);
  }
}

function put(most, at, value, unit) {
  if (measure === "mass") most[at] += value / unit;
  else if (value > most[at]) most[at] = value;
}

function fillTiles(level, most, side, unit, top, left) {
  const [rows, columns] = [side * unit, side * unit];
  const per = unit / level.cell; // both are powers of two
  for (const tile of level.tiles) {
    const [height, width] = tile.maxima.shape;
    const [y, x] = [tile.row * level.cell - top, tile.column * level.cell - left];
    if (y >= rows || x >= columns || y + height * level.cell <= 0 || x + width * level.cell <= 0) continue;
    const data = ready(tile[measure], panels.pattern.draw);
    if (!data) continue;
    for (let i = 0; i < height; i++) {
      const to = Math.floor((y / level.cell + i) / per);
      if (to < 0 || to >= side) continue;
      for (let j = 0; j < width; j++) {
        const at = Math.floor((x / level.cell + j) / per);
        if (at >= 0 && at < side) put(most, to * side + at, data[i * width + j], per);
      }
    }
  }
}

function fillStrips(pattern, most, side, unit, top, left) {
  const rows = side * unit;
  for (const strip of pattern.strips) {
    const [height, width] = strip.index.shape;
    if (strip.first >= top + rows || strip.first + height <= top) continue;
    const index = ready(strip.index, panels.pattern.draw);
    const weight = ready(strip.weight, panels.pattern.draw);
    if (!index || !weight) {
      fillTiles(pattern.levels[0], most, side, unit, top, left);
      continue;
    }
    const [from, to] = [Math.max(top, strip.first), Math.min(top + rows, strip.first + height)];
    for (let row = from; row < to; row++) {
      const line = Math.floor((row - top) / unit) * side;
      for (let i = (row - strip.first) * width, end = i + width; i < end; i++) {
        const at = Math.floor((index[i] - left) / unit);
        if (at >= 0 && at < side) put(most, line + at, weight[i], unit);
      }
    }
  }
}

function drawPattern() {
  const pattern = patterns.get(headName());
  if (!pattern || !plot.canvas.clientWidth) return;
  const available = plot.canvas.clientWidth;
  const side = Math.min(available - LEFT, Math.max(300, Math.min(window.innerHeight - 190, 680)));
  const { context, ratio } = fitted(plot.canvas, side + TOP + 2);
  let unit = 1;
  while (seen.span / unit > side * ratio) unit *= 2;
  Object.assign(plot, { side, unit, px: side / seen.span });
  const [top, left] = [Math.floor(seen.top / unit) * unit, Math.floor(seen.left / unit) * unit];
  const count = Math.ceil(seen.span / unit) + 1;
  const most = new Float32Array(count * count);
  fill(pattern, most, count, unit, top, left);
  sheet.width = sheet.height = count;
  const own = sheet.getContext("2d");
  const image = own.createImageData(count, count);
  const pixels = new Uint32Array(image.data.buffer);
  const ramp = ramps.sequential;
  for (let i = 0; i < most.length; i++) pixels[i] = ramp[Math.min(255, (255 * Math.sqrt(most[i] / 65535)) | 0)];
  own.putImageData(image, 0, 0);
  const [wide, high] = [Math.min(keyTokens.length - seen.left, seen.span), Math.min(tokens.length - seen.top, seen.span)];
  context.save();
  context.beginPath();
  context.rect(LEFT, TOP, wide * plot.px, high * plot.px);
  context.clip();
  context.imageSmoothingEnabled = false;
  context.drawImage(sheet, LEFT + (left - seen.left) * plot.px, TOP + (top - seen.top) * plot.px, count * unit * plot.px, count * unit * plot.px);
  drawCursor(context);
  context.restore();
  drawAxes(context, wide, high);
  tellPattern(pattern);
}

function drawCursor(context) {
  const { px, side } = plot;
  const thick = Math.max(px, 1);
  const y = TOP + (state.token - seen.top) * px;
  context.strokeStyle = styles.key;
  context.lineWidth = 1;
  context.globalAlpha = 0.55;
  context.strokeRect(LEFT - 2, y, side + 4, thick);
  if (state.key !== null) {
    const x = LEFT + (state.key - seen.left) * px;
    context.strokeRect(x, TOP - 2, thick, side + 4);
    context.globalAlpha = 1;
    context.lineWidth = 2;
    context.strokeRect(x - 2, y - 2, thick + 4, thick + 4);
  }
  context.globalAlpha = 1;
}
