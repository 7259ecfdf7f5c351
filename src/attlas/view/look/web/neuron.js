// One query and its keys, neuron by neuron: q, k, their products, the score and the weight.
let neuronData = { name: null };

function setUpNeurons() {
  const panel = panels.neurons;
  if (!panel) return;
  const query = make("select", { id: "neuron-query" });
  query.addEventListener("change", () => change({ token: +query.value, key: null }, "neurons"));
  const bars = make("div", { class: "bars" });
  for (const name of ["q", "k", "q ∘ k"]) bars.append(make("span", {}, name), make("canvas", { role: "img", "data-name": name }));
  const body = make("tbody");
  const table = make("table", { class: "neurons" }, make("thead", {}, make("tr", {},
    ...["key", "q ∘ k, neuron by neuron", "score", "weight"].map((name) => make("th", { scope: "col" }, name)))), body);
  panel.body.append(make("div", { class: "steps" }, make("label", { for: "neuron-query" }, "Query"), query),
    bars, make("p", { class: "readout", id: "neuron-value" }),
    make("div", { class: "scroll plain tall", role: "region", "aria-label": "Keys of this query", tabindex: 0 }, table),
    make("p", { class: "note" }, "Blue is positive, red negative. The products of all neurons sum up, times the scaling, to the score before softmax; the weight is after softmax over all keys."));
  panel.draw = framed(() => drawNeurons(query, bars, body));
  watch((changes) => {
    if (state.view === "neurons" && ("token" in changes || "key" in changes)) panel.draw();
  });
}

async function neuronOf(name) {
  const held = neurons.get(name);
  const [q, k, weights] = await Promise.all([held.q, held.k, held.weights].map(tensor));
  const dim = held.q.shape[1];
  const row = (x, at) => x.subarray(at * dim, (at + 1) * dim);
  return { name, held, dim, first: held.first, queries: held.q.shape[0], keys: held.k.shape[0],
    q: (i) => row(q, i), k: (j) => row(k, j), weight: (i, j) => weights[i * held.weights.shape[1] + j] };
}

// The products of a pair and the score before softmax.
function pairOf(data, i, j) {
  const [q, k] = [data.q(i), data.k(j)];
  const products = q.map((x, c) => x * k[c]);
  let sum = 0;
  for (let c = 0; c < data.dim; c++) sum += q[c] * k[c];
  return { q, k, products, sum, score: sum * data.held.scaling, weight: data.weight(i, j) };
}

async function drawNeurons(query, bars, body) {
  const name = headName();
  if (!neurons.has(name)) return;
  if (neuronData.name !== name) neuronData = await neuronOf(name);
  const data = neuronData;
  if (name !== headName()) return;
  query.replaceChildren(...Array.from({ length: data.queries }, (_, i) =>
    make("option", { value: data.first + i }, `${data.first + i} ${brief(tokens[data.first + i])}`)));
  const token = clamp(state.token, data.first, data.first + data.queries - 1);
  query.value = token;
  const i = token - data.first;
  const last = data.held.causal ? Math.min(i, data.keys - 1) : data.keys - 1;
  const pairs = Array.from({ length: last + 1 }, (_, j) => pairOf(data, i, j));
  let best = 0;
  pairs.forEach((pair, j) => (best = pair.weight > pairs[best].weight ? j : best));
  const wanted = state.key === null ? best : state.key - data.first;
  const at = wanted >= 0 && wanted <= last ? wanted : best;
  let largest = 0;
  for (const pair of pairs) for (const x of pair.products) largest = Math.max(largest, Math.abs(x));
  body.replaceChildren(...pairs.map((pair, j) => {
    const canvas = make("canvas", { "aria-hidden": "true" });
    strip(canvas, pair.products, largest);
    const key = data.first + j;
    const button = make("button", { type: "button", "aria-pressed": String(j === at), "aria-label": `key ${key} ${shown(keyTokens[key]).trim()}, score ${number(pair.score, 3)}, weight ${number(pair.weight, 3)}` }, `${key} ${brief(keyTokens[key])}`);
    button.addEventListener("click", () => change({ key, token }, "neurons"));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      body.rows[clamp(j + step, 0, last)].querySelector("button").focus();
      event.preventDefault();
    });
    return make("tr", { class: j === at ? "now" : "" }, make("th", { scope: "row" }, button), make("td", { class: "wide" }, canvas),
      make("td", {}, number(pair.score, 3)), make("td", {}, number(pair.weight, 3)));
  }));
  drawPair(pairs[at], token, data.first + at, bars, data);
}

function drawPair(pair, token, key, bars, data) {
  const shownOf = { q: pair.q, k: pair.k, "q ∘ k": pair.products };
  for (const canvas of bars.querySelectorAll("canvas")) {
    const values = shownOf[canvas.dataset.name];
    const { context, width, height } = fitted(canvas, 52);
    const most = Math.max(...values.map(Math.abs), 1e-9);
    const step = width / values.length;
    values.forEach((x, c) => {
      context.fillStyle = x < 0 ? styles.key : styles.query;
      const tall = (Math.abs(x) / most) * (height / 2 - 2);
      context.fillRect(c * step, x < 0 ? height / 2 : height / 2 - tall, Math.max(1, step - 1), tall);
    });
    context.fillStyle = styles.line;
    context.fillRect(0, height / 2, width, 1);
    const order = [...values.keys()].sort((a, b) => Math.abs(values[b]) - Math.abs(values[a])).slice(0, 3);
    canvas.setAttribute("aria-label", `${canvas.dataset.name}: largest at ${order.map((c) => `neuron ${c}, ${number(values[c], 2)}`).join("; ")}`);
  }
  const words = `Query ${token} “${shown(tokens[token]).trim()}”, key ${key} “${shown(keyTokens[key]).trim()}”: Σ q∘k = ${number(pair.sum, 3)}, × ${number(data.held.scaling, 4)} = score ${number(pair.score, 4)}, weight ${number(pair.weight, 4)}`;
  byId("neuron-value").textContent = words;
  tell(words);
}
