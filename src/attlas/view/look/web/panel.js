// The panel of one head: its name and scores, the tabs of its views, the search in its text.
const titles = { pattern: "Pattern", text: "Text", lines: "Lines", neurons: "Neurons", map: "Queries and keys" };
const has = { pattern: () => patterns.size, text: () => patterns.size, lines: () => patterns.size,
              neurons: () => neurons.size, map: () => joints.size };
const holds = { pattern: patterns, text: patterns, lines: patterns, neurons, map: joints };
const panels = {}; // view -> {element, missing, body, draw}

// A view's place: its own body, and a sentence where this head has none.
function panelOf(view) {
  const missing = make("p", { class: "note" });
  const body = make("div");
  const element = make("div", { id: `view-${view}`, class: "view", role: "tabpanel", "aria-labelledby": `tab-${view}`, hidden: true }, missing, body);
  byId("views").append(element);
  return { element, missing, body, draw: () => {} };
}

function setUpPanel() {
  for (const view of views.filter((each) => has[each]())) {
    const tab = make("button", { type: "button", role: "tab", id: `tab-${view}`, "aria-controls": `view-${view}` }, titles[view]);
    tab.addEventListener("click", () => change({ view }, "tabs"));
    byId("tabs").append(tab);
    panels[view] = panelOf(view);
  }
  byId("tabs").addEventListener("keydown", (event) => {
    const tabs = [...byId("tabs").children];
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
    event.preventDefault();
  });
  byId("find").hidden = !Object.keys(panels).length;
  setUpSearch();
  watch((changes) => {
    if ("head" in changes || "view" in changes) showPanel();
    else if ("score" in changes) nameHead();
  });
  painters.push(drawPanel);
  new ResizeObserver(framed(drawPanel)).observe(byId("views"));
}

function nameHead() {
  byId("head-title").textContent = state.layer === null ? "Choose a head" : `Layer ${state.layer}, head ${state.head}`;
  const at = state.layer * atlas.heads + state.head;
  const told = state.layer === null ? [] : Object.entries(grids.a).map(([name, values]) => `${shown(name)} ${number(values[at], 3)}`);
  byId("head-scores").textContent = told.join(" · ");
}

function showPanel() {
  nameHead();
  if (!panels[state.view]) state.view = Object.keys(panels)[0] || "pattern";
  for (const [view, panel] of Object.entries(panels)) {
    const open = view === state.view;
    panel.element.hidden = !open;
    byId(`tab-${view}`).setAttribute("aria-selected", String(open));
    byId(`tab-${view}`).tabIndex = open ? 0 : -1;
    const there = holds[view].has(headName());
    panel.body.hidden = !there;
    panel.missing.hidden = there;
    if (!there && open) tellWhich(panel.missing, holds[view], titles[view].toLowerCase());
  }
  byId("views").hidden = !Object.keys(panels).length;
  drawPanel();
}

// Which heads there are, as buttons, where the chosen one was not recorded.
function tellWhich(place, held, what) {
  const names = [...held.keys()].slice(0, 40);
  const say = state.layer === null ? `Heads whose ${what} was recorded:` : `The ${what} of this head was not recorded. Recorded:`;
  const chips = make("ul", { class: "chips" });
  for (const name of names) {
    const [layer, head] = name.split(".").map(Number);
    chips.append(make("li", {}, make("button", { type: "button", onclick: () => change({ layer, head }, "panel") }, name)));
  }
  place.replaceChildren(say, chips);
}

function drawPanel() {
  const panel = panels[state.view];
  if (panel && !panel.body.hidden) panel.draw();
}

// Search. The match's place is the query that all views look at.
function setUpSearch() {
  const field = byId("search");
  const told = byId("found");
  const go = (step) => {
    if (!hits.length) return;
    const after = hits.findIndex((hit) => hit > state.token);
    const here = hits.indexOf(state.token);
    let to = step > 0 ? (after < 0 ? 0 : after) : (here > 0 ? here - 1 : (after < 0 ? hits.length : after) - 1 - (here === 0));
    to = (to + hits.length) % hits.length;
    told.textContent = `${to + 1} of ${hits.length}`;
    tell(`match ${to + 1} of ${hits.length}, token ${hits[to]}, ${shown(tokens[hits[to]])}`);
    change({ token: hits[to] }, "search");
  };
  const find = () => {
    search(field.value);
    told.textContent = field.value ? (hits.length ? `${hits.length} found` : "not found") : "";
    byId("before").disabled = byId("next").disabled = !hits.length;
    if (field.value && !hits.length) tell("not found");
    if (hits.length && !hits.includes(state.token)) go(1);
    else drawPanel();
  };
  field.addEventListener("input", find);
  byId("find").addEventListener("submit", (event) => event.preventDefault());
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") go(event.shiftKey ? -1 : 1);
  });
  byId("next").addEventListener("click", () => go(1));
  byId("before").addEventListener("click", () => go(-1));
  byId("before").disabled = byId("next").disabled = true;
}

// A row of a few numbers that choose a window of tokens: {element, first, count}.
function windowChoice(name, counts, draw) {
  const start = make("input", { type: "number", min: 0, max: tokens.length - 1, value: 0, id: `${name}-first` });
  const count = make("select", { id: `${name}-count` });
  for (const each of counts) count.append(make("option", { value: each }, String(each)));
  start.addEventListener("input", draw);
  count.addEventListener("change", draw);
  const element = make("div", { class: "steps" },
    make("label", { for: start.id }, "First token"), start, make("label", { for: count.id }, "tokens"), count);
  return {
    element,
    get count() { return Math.min(+count.value, tokens.length); },
    get first() { return clamp(Math.floor(+start.value) || 0, 0, Math.max(0, tokens.length - this.count)); },
    set first(to) { start.value = clamp(to, 0, Math.max(0, tokens.length - this.count)); },
    // So that a token is inside.
    holds(token) {
      if (token < this.first || token >= this.first + this.count) this.first = token - Math.floor(this.count / 2);
    },
  };
}
