// Lines between tokens: queries left, keys right, each line as strong as its weight.
const HEIGHT = 21;

function setUpLines() {
  const panel = panels.lines;
  if (!panel) return;
  const draw = framed(() => drawLines(chosen, place));
  const chosen = windowChoice("lines", [16, 24, 32, 48], () => draw());
  const place = make("div");
  panel.body.append(chosen.element, make("p", { class: "readout", id: "lines-value" }), place,
    make("p", { class: "note" }, "Queries stand left, keys right. Point at a token, or move with the arrows, to see its lines alone; Enter chooses a query."));
  panel.draw = draw;
  watch((changes, from) => {
    if ("token" in changes) {
      if (from !== "lines") chosen.holds(state.token);
      if (state.view === "lines") draw();
    }
  });
}

function drawLines(chosen, place) {
  const pattern = patterns.get(headName());
  if (!pattern) return;
  const { first, count } = chosen;
  const [wide, column] = [640, 190];
  const svg = make("svg", { class: "lines", viewBox: `0 0 ${wide} ${count * HEIGHT + 4}`, role: "group", "aria-label": `Lines of ${count} tokens from ${first} on` });
  const lines = [];
  const y = (token) => (token - first + 0.5) * HEIGHT + 2;
  for (let token = first; token < first + count; token++) {
    const row = rowOf(pattern, token, panels.lines.draw);
    if (!row) return;
    row.keys.forEach((key, i) => {
      if (key < first || key >= first + count || row.weights[i] < 0.01) return;
      const [a, b] = [column + 8, wide - column - 8];
      const line = make("path", { class: "line", d: `M${a} ${y(token)}C${a + 90} ${y(token)} ${b - 90} ${y(key)} ${b} ${y(key)}` });
      line.style.strokeWidth = 0.6 + 3.2 * row.weights[i];
      line.style.strokeOpacity = Math.max(0.06, row.weights[i]);
      lines.push({ line, query: token, key, weight: row.weights[i] });
      svg.append(line);
    });
  }
  const only = (side, token) => {
    for (const each of lines) each.line.classList.toggle("off", token !== null && each[side] !== token);
    if (token === null) return;
    const list = side === "query" ? tokens : keyTokens;
    const other = side === "query" ? "key" : "query";
    const of = side === "query" ? keyTokens : tokens;
    const best = lines.filter((each) => each[side] === token).sort((a, b) => b.weight - a.weight).slice(0, 4);
    const said = best.map((each) => `“${shown(of[each[other]]).trim()}” (${each[other]}) ${number(each.weight, 2)}`).join(", ");
    const words = `${side} ${token} “${shown(list[token]).trim()}” ${side === "query" ? "reads" : "is read by"}: ${said || "no token of this window"}`;
    byId("lines-value").textContent = words[0].toUpperCase() + words.slice(1);
    tell(words);
  };
  for (const side of ["query", "key"]) {
    const list = side === "query" ? tokens : keyTokens;
    for (let token = first; token < Math.min(first + count, list.length); token++) {
      const now = side === "query" && token === state.token;
      const x = side === "query" ? 0 : wide - column;
      const group = make("g", { class: `token${now ? " now" : ""}`, tabindex: now || (side === "query" && token === first && (state.token < first || state.token >= first + count)) ? 0 : -1,
        role: "button", "aria-label": `${side} ${token}, ${shown(list[token]).trim()}` },
        make("rect", { x, y: y(token) - HEIGHT / 2, width: column, height: HEIGHT, rx: 4 }),
        make("text", { x: side === "query" ? column - 6 : x + 6, y: y(token) + 4.5, "text-anchor": side === "query" ? "end" : "start" }, brief(list[token], 22)));
      Object.assign(group, { side, token });
      for (const each of ["mouseenter", "focus"]) group.addEventListener(each, () => only(side, token));
      for (const each of ["mouseleave", "blur"]) group.addEventListener(each, () => only(side, null));
      group.addEventListener("click", () => side === "query" && change({ token }, "lines"));
      svg.append(group);
    }
  }
  svg.addEventListener("keydown", (event) => {
    const here = event.target;
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key] || 0;
    const side = { ArrowLeft: "query", ArrowRight: "key" }[event.key] || here.side;
    if (event.key === "Enter" || event.key === " ") change(here.side === "query" ? { token: here.token } : {}, "lines");
    else if (step || side !== here.side) [...svg.querySelectorAll(".token")].find((g) => g.side === side && g.token === here.token + step)?.focus();
    else return;
    event.preventDefault();
  });
  const again = place.contains(document.activeElement);
  place.replaceChildren(svg);
  if (again) svg.querySelector(".now")?.focus();
}
