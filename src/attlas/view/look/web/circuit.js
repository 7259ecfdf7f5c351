// A circuit as a graph: layers upwards, heads left to right, edges as thick as their weights.
function setUpCircuit() {
  if (!atlas.circuit) return;
  const section = byId("circuit");
  section.hidden = false;
  const { nodes, edges, meaning } = atlas.circuit;
  const rows = [...new Set(nodes.map((node) => node[1]))].sort((a, b) => a - b);
  const [wide, step, width, height] = [880, 56, 58, 26];
  const places = new Map();
  for (const layer of rows) {
    // Heads in their order, the MLP behind them.
    const here = nodes.map((node, i) => [node, i]).filter(([node]) => node[1] === layer)
      .sort(([a], [b]) => (a[2] ?? 1e9) - (b[2] ?? 1e9));
    here.forEach(([, i], at) => places.set(i, [
      44 + ((at + 1) * (wide - 44)) / (here.length + 1), (rows.length - rows.indexOf(layer) - 0.5) * step]));
  }
  const named = (node) => (node[0] === "head" ? nameOf([node[1], node[2]]) : node[0] === "mlp" ? `MLP ${node[1]}` : node[0]);
  const svg = make("svg", { viewBox: `0 0 ${wide} ${rows.length * step}`, role: "group", "aria-label": `Circuit of ${nodes.length} nodes and ${edges.length} edges` });
  const widest = Math.max(...edges.map((edge) => Math.abs(edge[2])), 1e-12);
  const drawn = edges.map(([from, to, weight]) => {
    const [[x0, y0], [x1, y1]] = [places.get(from), places.get(to)];
    const path = make("path", { class: `edge${weight < 0 ? " minus" : ""}`, d: `M${x0} ${y0 - height / 2}C${x0} ${y0 - step * 0.6} ${x1} ${y1 + step * 0.6} ${x1} ${y1 + height / 2}` },
      make("title", {}, `${named(nodes[from])} → ${named(nodes[to])}: ${number(weight, 3)}`));
    path.style.strokeWidth = 0.7 + (4 * Math.abs(weight)) / widest;
    svg.append(path);
    return { path, from, to, weight };
  });
  const value = make("p", { class: "readout", id: "circuit-value" });
  const groups = nodes.map((node, i) => {
    const [x, y] = places.get(i);
    const joined = drawn.filter((edge) => edge.from === i || edge.to === i);
    const best = [...joined].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)).slice(0, 4)
      .map((edge) => `${edge.from === i ? "to" : "from"} ${named(nodes[edge.from === i ? edge.to : edge.from])} ${number(edge.weight, 3)}`);
    const words = `${node[0] === "head" ? "Head " : ""}${named(node)}, weight ${number(node[3], 3)}${best.length ? `; ${best.join(", ")}` : ""}`;
    const wideBox = Math.max(width, 9 * named(node).length);
    const group = make("g", { class: "node", tabindex: i ? -1 : 0, role: "button", "aria-label": words },
      make("rect", { x: x - wideBox / 2, y: y - height / 2, width: wideBox, height, rx: node[0] === "head" ? 13 : 5 }),
      make("text", { x, y: y + 4.5 }, named(node)));
    const light = (on) => {
      for (const edge of drawn) {
        const own = edge.from === i || edge.to === i;
        edge.path.classList.toggle("lit", on && own);
        edge.path.classList.toggle("dim", on && !own);
      }
      if (!on) return;
      value.textContent = words;
      tell(words);
    };
    for (const each of ["mouseenter", "focus"]) group.addEventListener(each, () => light(true));
    for (const each of ["mouseleave", "blur"]) group.addEventListener(each, () => light(false));
    group.addEventListener("click", () => open(i));
    svg.append(group);
    return group;
  });
  const open = (i) => {
    const [kind, layer, head] = nodes[i];
    if (kind === "head" && layer < atlas.layers && head < atlas.heads) change({ layer, head }, "circuit");
  };
  svg.addEventListener("keydown", (event) => {
    const i = groups.indexOf(event.target);
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Enter" || event.key === " ") open(i);
    else if (way) {
      const [x, y] = places.get(i);
      let best = [Infinity, i];
      for (const [j, [a, b]] of places) {
        const along = (a - x) * way[0] + (b - y) * way[1];
        const aside = Math.abs((a - x) * way[1]) + Math.abs((b - y) * way[0]);
        const far = along + (way[0] ? 20 : 0.3) * aside;
        if (along > 1 && far < best[0]) best = [far, j];
      }
      groups[i].setAttribute("tabindex", -1);
      groups[best[1]].setAttribute("tabindex", 0);
      groups[best[1]].focus();
    } else return;
    event.preventDefault();
  });
  const layers = rows.filter((layer) => layer >= 0 && layer < atlas.layers);
  for (const layer of layers) svg.append(make("text", { class: "soft", x: 2, y: (rows.length - rows.indexOf(layer) - 0.5) * step + 4 }, `layer ${layer}`));
  watch((changes) => {
    if ("head" in changes) nodes.forEach((node, i) => groups[i].classList.toggle("lit", node[0] === "head" && nameOf([node[1], node[2]]) === headName()));
  });
  section.append(make("p", { class: "note" }, shown(meaning)), svg, value,
    make("p", { class: "note" }, "Point at a node, or move with the arrows, to see its edges; Enter opens a head. Red edges are negative."));
}
