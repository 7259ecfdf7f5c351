// Flow: from layer to layer, the tokens that each token takes most from.
const flow = { index: null, share: null, layer: 0, token: 0 };

async function setUpFlow() {
  if (!atlas.flow) return;
  const section = byId("flow");
  section.hidden = false;
  const draw = framed(() => drawFlow(canvas, chosen));
  const chosen = windowChoice("flow", [24, 32, 48, 64, 96], draw);
  const canvas = make("canvas", { class: "plot", id: "flow-plot", tabindex: 0, role: "application", "aria-label": "Flow: tokens across, layers upwards", "aria-describedby": "flow-keys" });
  const view = make("div", { class: "view" }, chosen.element, canvas);
  section.append(make("p", { class: "note" }, shown(atlas.flow.meaning)), view, make("p", { class: "readout", id: "flow-value" }),
    make("p", { class: "note", id: "flow-keys" }, "Layers run upwards. Point at a place, or move with the arrows, to see what it came from in the layers below."));
  const [layers, , links] = atlas.flow.index.shape;
  flow.index = await tensor(atlas.flow.index);
  flow.share = await tensor(atlas.flow.share);
  Object.assign(flow, { layers, links, none: atlas.flow.index.dtype === "uint16" ? 65535 : 4294967295, layer: layers, token: state.token });
  const move = (layer, token) => {
    flow.layer = clamp(layer, 1, layers);
    flow.token = clamp(token, 0, tokens.length - 1);
    chosen.holds(flow.token);
    draw();
    const from = linksOf(flow.layer - 1, flow.token).map(([key, share]) => `“${shown(tokens[key]).trim()}” (${key}) ${number(share, 2)}`).join(", ");
    const words = `Layer ${flow.layer - 1}, token ${flow.token} “${shown(tokens[flow.token]).trim()}” takes from: ${from || "none"}`;
    byId("flow-value").textContent = words;
    tell(words);
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const [token, layer] = flow.place(event.clientX - box.left, event.clientY - box.top);
    if (layer !== flow.layer || token !== flow.token) move(layer, token);
  });
  canvas.addEventListener("click", () => change({ token: flow.token }, "flow"));
  canvas.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] }[event.key];
    if (to) move(flow.layer + to[0], flow.token + to[1]);
    else if (event.key === "Enter") change({ token: flow.token }, "flow");
    else return;
    event.preventDefault();
  });
  watch((changes, from) => {
    if (!("token" in changes) || from === "flow") return;
    flow.token = state.token;
    chosen.holds(flow.token);
    draw();
  });
  painters.push(draw);
  new ResizeObserver(draw).observe(section);
  chosen.holds(state.token);
}

function linksOf(layer, token) {
  const at = (layer * tokens.length + token) * flow.links;
  const found = [];
  for (let i = at; i < at + flow.links; i++) {
    if (flow.index[i] !== flow.none && flow.share[i] > 0) found.push([flow.index[i], flow.share[i]]);
  }
  return found;
}

// What reaches a place from below, layer by layer: its strongest paths.
function upstream() {
  const lit = new Map();
  let here = new Map([[flow.token, 1]]);
  for (let layer = flow.layer - 1; layer >= 0; layer--) {
    const below = new Map();
    for (const [token, much] of here) {
      for (const [key, share] of linksOf(layer, token)) {
        const part = much * share;
        if (part < 0.02) continue;
        lit.set(`${layer} ${token} ${key}`, part);
        below.set(key, (below.get(key) || 0) + part);
      }
    }
    here = below;
  }
  return lit;
}

function drawFlow(canvas, chosen) {
  const { layers } = flow;
  const { first, count } = chosen;
  const step = layers > 40 ? 11 : layers > 16 ? 15 : 30;
  const [left, foot] = [34, 78];
  const { context, width } = fitted(canvas, layers * step + foot + 14);
  const base = layers * step + 10;
  const x = (token) => left + ((token - first + 0.5) * (width - left - 6)) / count;
  const y = (layer) => base - layer * step;
  flow.place = (px, py) => [Math.round(first - 0.5 + ((px - left) * count) / (width - left - 6)), Math.round((base - py) / step)];
  const lit = upstream();
  context.strokeStyle = styles.soft;
  const line = (layer, token, key) => {
    context.beginPath();
    context.moveTo(x(token), y(layer + 1));
    context.lineTo(x(key), y(layer));
    context.stroke();
  };
  for (let layer = 0; layer < layers; layer++) {
    for (let token = first; token < first + count; token++) {
      for (const [key, share] of linksOf(layer, token)) {
        if (key < first || key >= first + count || share < 0.03) continue;
        context.globalAlpha = 0.08 + 0.32 * share;
        context.lineWidth = 0.5 + 1.5 * share;
        line(layer, token, key);
      }
    }
  }
  context.strokeStyle = styles.accent;
  for (const [name, part] of lit) {
    const [layer, token, key] = name.split(" ").map(Number);
    if ([token, key].some((each) => each < first || each >= first + count)) continue;
    context.globalAlpha = Math.min(1, 0.3 + part);
    context.lineWidth = 1 + 2.5 * part;
    line(layer, token, key);
  }
  context.globalAlpha = 1;
  context.fillStyle = styles.key;
  context.beginPath();
  context.arc(x(flow.token), y(flow.layer), 4, 0, 7);
  context.fill();
  context.font = "12px system-ui, sans-serif";
  context.textBaseline = "middle";
  context.textAlign = "right";
  context.fillStyle = styles.soft;
  const every = Math.ceil(22 / step);
  for (let layer = 0; layer < layers; layer += every) context.fillText(String(layer), left - 10, y(layer + 0.5));
  const room = Math.ceil(13 / ((width - left) / count)); // names that would lie on each other are left out
  for (let token = first; token < first + count; token++) {
    if ((token - first) % room && token !== flow.token) continue;
    context.save();
    context.translate(x(token), base + 10);
    context.rotate(-Math.PI / 3);
    context.fillStyle = token === flow.token ? styles.ink : styles.soft;
    context.fillText(brief(tokens[token], 11), 0, 0);
    context.restore();
  }
}
