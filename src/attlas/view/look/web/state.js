// What is looked at: one object, told to all views, kept in the link.
const views = ["pattern", "text", "lines", "neurons", "map"];
const state = { layer: null, head: null, score: null, side: "a", view: "pattern", token: 0, key: null };
const watchers = [];
const byId = (id) => document.getElementById(id);
const watch = (what) => watchers.push(what);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const headName = () => (state.layer === null ? null : `${state.layer}.${state.head}`);

function change(changes, from) {
  const before = { ...state };
  Object.assign(state, changes);
  if (changes.token !== undefined && changes.key === undefined && before.token !== state.token) state.key = null;
  keepInLink();
  for (const each of watchers) each(changes, from, before);
}

function keepInLink() {
  const link = new URLSearchParams();
  if (state.layer !== null) link.set("head", headName());
  if (state.score) link.set("score", state.score);
  if (state.side !== "a") link.set("side", state.side);
  if (state.view !== "pattern") link.set("view", state.view);
  if (state.token) link.set("token", state.token);
  if (state.key !== null) link.set("key", state.key);
  try {
    history.replaceState(null, "", `#${link}`);
  } catch { /* a frame without an address of its own keeps no link */ }
}

// The part of a link that means something here.
function fromLink(text) {
  const link = new URLSearchParams(text.replace(/^#/, ""));
  const found = {};
  const head = /^(\d+)\.(\d+)$/.exec(link.get("head") || "");
  if (head && +head[1] < atlas.layers && +head[2] < atlas.heads) [found.layer, found.head] = [+head[1], +head[2]];
  if (scoreNames().includes(link.get("score"))) found.score = link.get("score");
  if (["a", "b", "difference"].includes(link.get("side")) && atlas.compare) found.side = link.get("side");
  if (views.includes(link.get("view"))) found.view = link.get("view");
  const whole = (name, list) => /^\d+$/.test(link.get(name) || "") && +link.get(name) < list.length;
  if (whole("token", tokens)) found.token = +link.get("token");
  if (whole("key", keyTokens)) found.key = +link.get("key");
  return found;
}

// What a screen reader is told: the last of what comes quickly.
let telling = null;
function tell(text) {
  clearTimeout(telling);
  telling = setTimeout(() => (byId("status").textContent = text), 120);
}

// Elements of HTML and SVG; text is only ever text.
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "rect", "text", "title", "circle", "line"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// The text, to search in: places of its tokens, without regard to case.
const lowered = tokens.map((token) => token.toLowerCase());
const starts = [];
let joined = 0;
for (const token of lowered) {
  starts.push(joined);
  joined += token.length;
}
let hits = [];
const hitSet = new Set();
function search(wanted) {
  hits = [];
  hitSet.clear();
  const text = lowered.join("");
  const word = wanted.toLowerCase();
  for (let at = word ? text.indexOf(word) : -1, token = 0; at >= 0; at = text.indexOf(word, at + 1)) {
    while (token + 1 < starts.length && starts[token + 1] <= at) token++;
    if (hits[hits.length - 1] !== token) hits.push(token);
    hitSet.add(token);
  }
  return hits;
}
