// Queries and keys of one head in one plane.
const DOTS = ["#3b82c4", "#d9772b", "#3f9b5f", "#b6539b", "#8a6d3b", "#7a6bd0", "#c0504d", "#2c9aa0"];
const map = { data: null, spots: [], at: 0 };

function setUpMap() {
  const panel = panels.map;
  if (!panel) return;
  const colour = make("select", { id: "map-colour" });
  for (const [value, name] of [["kind", "query or key"], ["position", "position"], ["token", "token"], ["norm", "norm"]]) colour.append(make("option", { value }, name));
  const canvas = make("canvas", { class: "plot", id: "map-plot", tabindex: 0, role: "application", "aria-label": "Queries and keys in one plane", "aria-describedby": "map-keys" });
  const legend = make("div", { class: "legend-row" });
  panel.body.append(make("div", { class: "steps" }, make("label", { for: "map-colour" }, "Colour by"), colour), legend, canvas,
    make("p", { class: "readout", id: "map-value" }),
    make("p", { class: "note", id: "map-keys" }, "Rings are queries, dots are keys: those that lie together attend to each other. Arrows go to the next point in that direction; Enter makes a query the chosen token."));
  const draw = framed(() => drawMap(canvas, colour, legend));
  panel.draw = draw;
  colour.addEventListener("change", draw);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    pick(nearest(event.clientX - box.left, event.clientY - box.top), draw);
  });
  canvas.addEventListener("click", choose);
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (way) pick(towards(way), draw);
    else if (event.key === "Enter") choose();
    else return;
    event.preventDefault();
  });
}

function choose() {
  const { data, at } = map;
  const position = data.position[at];
  if (position < tokens.length) change(data.query[at] ? { token: position } : { key: Math.min(position, keyTokens.length - 1) }, "map");
}

function nearest(x, y) {
  let best = [Infinity, map.at];
  map.spots.forEach(([a, b], i) => {
    const far = (a - x) ** 2 + (b - y) ** 2;
    if (far < best[0]) best = [far, i];
  });
  return best[1];
}

function towards([dx, dy]) {
  const [x, y] = map.spots[map.at];
  let best = [Infinity, map.at];
  map.spots.forEach(([a, b], i) => {
    const along = (a - x) * dx + (b - y) * dy;
    const aside = Math.abs((a - x) * dy) + Math.abs((b - y) * dx);
    if (i !== map.at && along > 0.5 && along + 3 * aside < best[0]) best = [along + 3 * aside, i];
  });
  return best[1];
}

function pick(at, draw) {
  if (!map.data || at === undefined) return;
  map.at = at;
  const { data } = map;
  const words = `${data.query[at] ? "Query" : "Key"} ${data.position[at]} “${shown(data.token[at]).trim()}”${data.norm ? `, norm ${number(data.norm[at], 2)}` : ""}`;
  byId("map-value").textContent = words;
  tell(words);
  draw();
}

async function drawMap(canvas, colour, legend) {
  const name = headName();
  const held = joints.get(name);
  if (!held) return;
  if (map.data?.name !== name) {
    const [points, query, position, norm] = await Promise.all(
      [held.points, held.query, held.position].map(tensor).concat(held.norm ? tensor(held.norm) : null));
    Object.assign(map, { data: { name, points, query, position, norm, token: held.token }, at: 0 });
  }
  const { data } = map;
  colour.querySelector('[value="norm"]').hidden = !data.norm;
  const side = Math.min(canvas.clientWidth, Math.max(320, window.innerHeight - 260), 640);
  const { context, width } = fitted(canvas, side);
  const count = data.query.length;
  const bounds = [0, 1].map((axis) => {
    let [low, high] = [Infinity, -Infinity];
    for (let i = 0; i < count; i++) [low, high] = [Math.min(low, data.points[2 * i + axis]), Math.max(high, data.points[2 * i + axis])];
    return [low, high - low || 1];
  });
  map.spots = Array.from({ length: count }, (_, i) => [
    14 + ((data.points[2 * i] - bounds[0][0]) / bounds[0][1]) * (width - 28),
    side - 14 - ((data.points[2 * i + 1] - bounds[1][0]) / bounds[1][1]) * (side - 28)]);
  const { paint, told } = coloured(colour.value, data);
  legend.replaceChildren(...told.map(([ink, words]) => {
    const dot = make("i");
    dot.style.background = ink;
    return make("span", {}, dot, words);
  }));
  const large = count > 2000 ? 1.8 : 3.2;
  map.spots.forEach(([x, y], i) => {
    context.beginPath();
    context.arc(x, y, large, 0, 7);
    context.globalAlpha = 0.8;
    if (data.query[i]) {
      context.strokeStyle = paint(i);
      context.lineWidth = 1.4;
      context.stroke();
    } else {
      context.fillStyle = paint(i);
      context.fill();
    }
  });
  context.globalAlpha = 1;
  const [x, y] = map.spots[map.at];
  context.strokeStyle = styles.ink;
  context.lineWidth = 2;
  context.beginPath();
  context.arc(x, y, large + 4, 0, 7);
  context.stroke();
}

// How points are coloured: {paint(i), told: [colour, words]}.
function coloured(what, data) {
  if (what === "token") {
    const often = new Map();
    for (const token of data.token) often.set(token, (often.get(token) || 0) + 1);
    const first = [...often].sort((a, b) => b[1] - a[1]).slice(0, DOTS.length).map(([token]) => token);
    return { paint: (i) => DOTS[first.indexOf(data.token[i])] || styles.soft,
             told: [...first.map((token, i) => [DOTS[i], brief(token)]), [styles.soft, "others"]] };
  }
  const values = { position: data.position, norm: data.norm }[what];
  if (!values) return { paint: (i) => (data.query[i] ? styles.query : styles.key), told: [[styles.query, "queries"], [styles.key, "keys"]] };
  let [low, high] = [Infinity, -Infinity];
  for (const x of values) [low, high] = [Math.min(low, x), Math.max(high, x)];
  const ink = (share) => rgb("sequential", 0.25 + 0.75 * share);
  return { paint: (i) => ink((values[i] - low) / (high - low || 1)),
           told: [[ink(0), `${what} ${number(low, 2)}`], [ink(1), `${what} ${number(high, 2)}`]] };
}
