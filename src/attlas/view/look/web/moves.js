// How one moves over a pattern, the names at its edges, and the words under it.
function zoomBy(factor, token = state.token, key = state.key ?? state.token) {
  const span = clamp(seen.span * factor, Math.min(8, longest), longest);
  const inside = (x, from) => (x >= from && x < from + seen.span ? (x - from) / seen.span : 0.5);
  const [down, across] = [inside(token, seen.top), inside(key, seen.left)];
  see({ span, top: token - down * span, left: key - across * span });
}

const placeAt = (event) => {
  const box = plot.canvas.getBoundingClientRect();
  const token = Math.floor(seen.top + (event.clientY - box.top - TOP) / plot.px);
  const key = Math.floor(seen.left + (event.clientX - box.left - LEFT) / plot.px);
  return token >= 0 && key >= 0 && token < tokens.length && key < keyTokens.length ? { token, key } : null;
};

function setUpMoves(canvas) {
  let held = null;
  canvas.addEventListener("pointerdown", (event) => {
    held = { x: event.clientX, y: event.clientY, top: seen.top, left: seen.left, moved: false };
    try {
      canvas.setPointerCapture(event.pointerId);
    } catch { /* a pointer that is gone already */ }
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!held) {
      const at = placeAt(event);
      if (at) tellPlace(at.token, at.key);
      return;
    }
    const [dx, dy] = [event.clientX - held.x, event.clientY - held.y];
    held.moved ||= Math.hypot(dx, dy) > 4;
    if (!held.moved) return;
    canvas.classList.add("drags");
    see({ top: held.top - dy / plot.px, left: held.left - dx / plot.px });
  });
  canvas.addEventListener("pointerup", (event) => {
    const at = held && !held.moved && placeAt(event);
    held = null;
    canvas.classList.remove("drags");
    if (at) change(at, "pattern");
  });
  canvas.addEventListener("pointercancel", () => (held = null));
  canvas.addEventListener("pointerleave", () => tellPlace(state.token, state.key));
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas && !event.ctrlKey) return; // the page scrolls
    event.preventDefault();
    const at = placeAt(event);
    if (at) zoomBy(2 ** clamp(event.deltaY / 240, -1, 1), at.token, at.key);
  }, { passive: false });
  canvas.addEventListener("keydown", moveByKey);
}

function moveByKey(event) {
  const step = plot.unit * (event.shiftKey ? 10 : 1);
  const moves = { ArrowUp: [-step, 0], ArrowDown: [step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step] };
  const scroll = { PageUp: -1, PageDown: 1 }[event.key];
  if (moves[event.key]) {
    const [down, across] = moves[event.key];
    const token = clamp(state.token + down, 0, tokens.length - 1);
    const key = clamp((state.key ?? Math.min(token, keyTokens.length - 1)) + across, 0, keyTokens.length - 1);
    change({ token, key }, "pattern");
    const follow = (x, from) => (x < from ? x : x >= from + seen.span ? x - seen.span + 1 : from);
    see({ top: follow(token, seen.top), left: follow(key, seen.left) });
  } else if (scroll) see({ top: seen.top + 0.8 * scroll * seen.span, left: seen.left + 0.8 * scroll * seen.span });
  else if (event.key === "+" || event.key === "=") zoomBy(0.5);
  else if (event.key === "-") zoomBy(2);
  else if (event.key === "0") see({ top: 0, left: 0, span: longest });
  else if (event.key === "Home") change({ key: 0 }, "key");
  else if (event.key === "End") change({ key: Math.min(state.token, keyTokens.length - 1) }, "key");
  else if (event.key === "Enter" && panels.neurons) change({ view: "neurons" }, "key");
  else return;
  event.preventDefault();
}

// Names of tokens where there is room for them, otherwise numbers at round places.
function drawAxes(context, wide, high) {
  const { px, side } = plot;
  context.font = "12px system-ui, sans-serif";
  context.textBaseline = "middle";
  context.fillStyle = styles.soft;
  context.textAlign = "left";
  context.fillText("key →", LEFT, 8);
  context.textAlign = "right";
  context.fillText("query ↓", LEFT - 8, TOP - 10);
  const named = px >= 11.5;
  const round = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000].find((x) => x * px >= 58) || 50000;
  const each = (from, count, draw) => {
    const step = named ? 1 : round;
    for (let i = Math.ceil(from / step) * step; i < from + count; i += step) draw(i, (i - from + (named ? 0.5 : 0)) * px);
  };
  each(seen.top, high, (i, y) => {
    if (y > side) return;
    const text = named ? brief(tokens[i]) : String(i);
    context.fillStyle = i === state.token ? styles.ink : hitSet.has(i) ? styles.key : styles.soft;
    context.textAlign = "right";
    context.fillText(text, LEFT - 8, TOP + Math.max(y, 6), LEFT - 12);
    if (!named) context.fillRect(LEFT - 5, TOP + y, 4, 1);
  });
  each(seen.left, wide, (i, x) => {
    if (x > side) return;
    context.fillStyle = i === state.key ? styles.ink : keyTokens === tokens && hitSet.has(i) ? styles.key : styles.soft;
    context.save();
    context.translate(LEFT + x, TOP - 6);
    if (named) context.rotate(-Math.PI / 3);
    context.textAlign = named ? "left" : x < 10 ? "left" : "center";
    context.fillText(named ? brief(keyTokens[i], 9) : String(i), 0, named ? 0 : -4);
    if (!named) context.fillRect(0, 1, 1, 4);
    context.restore();
  });
  if (named || !hits.length) return;
  context.fillStyle = styles.key; // where the search found something
  for (const hit of hits) {
    if (hit >= seen.top && hit < seen.top + high) context.fillRect(LEFT - 4, TOP + (hit - seen.top) * px, 4, Math.max(1.5, px));
  }
}

// One pair in words; with its cell where one pixel is more than one token.
function pairInWords(pattern, token, key) {
  const pair = `query ${token} “${shown(tokens[token]).trim()}”`;
  const row = rowOf(pattern, token, panels.pattern.draw);
  if (key === null) return pair;
  const both = `${pair} → key ${key} “${shown(keyTokens[key]).trim()}”`;
  if (!row) return both;
  const at = row.keys.indexOf(key);
  if (at >= 0) return `${both}: weight ${number(row.weights[at])}`;
  if (pattern.whole) return `${both}: weight 0`;
  const least = row.weights[row.weights.length - 1] ?? 0;
  return `${both}: below ${number(least)}, not among the ${row.keys.length} strongest (${number(row.rest, 3)} to all others)`;
}

function tellPlace(token, key) {
  const pattern = patterns.get(headName());
  if (!pattern) return;
  const words = pairInWords(pattern, token, key);
  byId("pattern-value").textContent = words[0].toUpperCase() + words.slice(1);
  tell(words);
}

let toldRow = "";
function tellPattern(pattern) {
  const row = rowOf(pattern, state.token, panels.pattern.draw);
  const now = `${headName()} ${state.token} ${state.key} ${Boolean(row)}`;
  if (now === toldRow) return;
  toldRow = now;
  tellPlace(state.token, state.key);
  chips(byId("strongest"), row);
}

function chips(list, row) {
  list.replaceChildren(...(row ? row.keys.slice(0, 10) : []).map((key, i) => {
    const button = make("button", { type: "button" }, make("b", {}, brief(keyTokens[key])), " ", make("small", {}, `${key}`), ` ${number(row.weights[i], 3)}`);
    button.addEventListener("click", () => {
      change({ key }, "chip");
      if (key < seen.left || key >= seen.left + seen.span) see({ left: key - seen.span / 2 });
    });
    return make("li", {}, button);
  }));
}
