// The text as one query reads it: each token in the colour of its weight.
const NEAR = 300; // tokens that are shown on either side

function setUpText() {
  const panel = panels.text;
  if (!panel) return;
  const place = make("div", { class: "text", id: "reading", role: "application", tabindex: 0,
    "aria-label": "The text as the chosen token reads it", "aria-describedby": "reading-keys" });
  panel.body.append(
    make("p", { class: "readout", id: "reading-value" }), place,
    make("p", { class: "note", id: "reading-keys" }, "Click a token, or move with the arrows, to see what it reads; the outlined token is the query."));
  panel.draw = framed(() => drawText(place));
  place.addEventListener("click", (event) => {
    const token = event.target.dataset?.token;
    if (token) change({ token: +token }, "text");
  });
  place.addEventListener("mouseover", (event) => {
    const token = event.target.dataset?.token;
    if (token) byId("reading-value").textContent = event.target.title;
  });
  place.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -tokens.length, End: tokens.length }[event.key];
    if (!step) return;
    change({ token: clamp(state.token + step, 0, tokens.length - 1) }, "text");
    event.preventDefault();
  });
  watch((changes) => {
    if (state.view === "text" && "token" in changes) panel.draw();
  });
}

function drawText(place) {
  const pattern = patterns.get(headName());
  const row = pattern && rowOf(pattern, state.token, panels.text.draw);
  if (!row) return;
  const weights = new Map(row.keys.map((key, i) => [key, row.weights[i]]));
  const [from, to] = [Math.max(0, state.token - NEAR), Math.min(keyTokens.length, state.token + NEAR)];
  const inside = [];
  let outside = 0;
  row.keys.forEach((key, i) => (outside += key < from || key >= to ? row.weights[i] : 0));
  for (let key = from; key < to; key++) {
    const weight = weights.get(key) || 0;
    const share = Math.sqrt(weight);
    const text = keyTokens[key] === "\n" ? "\\n\n" : /^ /.test(keyTokens[key]) ? ` ${shown(keyTokens[key].slice(1))}` : shown(keyTokens[key]);
    const span = make("span", { "data-token": key, title: `token ${key} “${shown(keyTokens[key])}”: weight ${number(weight)}` }, text);
    if (share > 0.04) {
      span.style.backgroundColor = rgb("sequential", share);
      span.style.color = inkOn("sequential", share);
    }
    if (key === state.token && keyTokens === tokens) span.classList.add("now");
    if (hitSet.has(key)) span.classList.add("hit");
    inside.push(span);
  }
  place.replaceChildren(...inside);
  const now = place.querySelector(".now");
  if (now) place.scrollTop = now.offsetTop - place.offsetTop - place.clientHeight / 2;
  const told = row.keys.slice(0, 3).map((key, i) => `“${shown(keyTokens[key]).trim()}” (${key}) ${number(row.weights[i], 2)}`).join(", ");
  const far = outside > 0.0005 ? `; ${number(outside, 2)} goes to tokens that are not shown here` : "";
  const words = `Token ${state.token} “${shown(tokens[state.token]).trim()}” reads most: ${told}${far}`;
  byId("reading-value").textContent = words;
  if (document.activeElement === place) tell(words);
}
