// All views, and what is looked at first: what the link says, or the best head of the first score.
async function begin() {
  recolour();
  byId("lead").textContent = [
    `${atlas.layers} layers × ${atlas.heads} heads`, `${tokens.length.toLocaleString("en")} tokens`,
    patterns.size ? `patterns of ${patterns.size} ${patterns.size === 1 ? "head" : "heads"}` : "",
    atlas.compare ? `compared with ${shown(atlas.compare.model)}` : "",
  ].filter(Boolean).join(" · ");
  byId("says").append(...atlas.says.map((say) => make("li", {}, shown(say))));
  await readScores();
  setUpHeads();
  setUpPanel();
  setUpPattern();
  setUpText();
  setUpLines();
  setUpNeurons();
  setUpMap();
  setUpCircuit();
  await setUpFlow();
  const first = { ...bestHead(), score: scoreNames()[0] || null, view: views.find((each) => panels[each]) || "pattern", token: Math.min(12, tokens.length - 1) };
  const link = { ...fromLink(atlas.start), ...fromLink(location.hash) };
  change({ ...first, ...link }, "link");
  if (!atlas.layers) byId("heads").hidden = byId("head").hidden = true;
  else if (!Object.keys(panels).length) byId("head").hidden = true;
  window.addEventListener("hashchange", () => change(fromLink(location.hash), "link"));
  document.documentElement.dataset.ready = "true";
}

// Of the heads whose patterns are there, the highest of the first score; else the first of them.
function bestHead() {
  const held = [patterns, neurons, joints].find((each) => each.size);
  const values = grids.a[atlas.scores[0]?.name];
  const names = held ? [...held.keys()] : cells.map((cell) => nameOf(cell.at));
  const at = (name) => name.split(".").map(Number);
  const score = (name) => (values ? values[at(name)[0] * atlas.heads + at(name)[1]] : 0);
  const best = names.reduce((a, b) => (score(b) > score(a) || Number.isNaN(score(a)) ? b : a), names[0]);
  return best ? { layer: at(best)[0], head: at(best)[1] } : {};
}

begin();
