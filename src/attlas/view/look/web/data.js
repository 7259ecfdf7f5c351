"use strict";

// The data: JSON for words and sizes, and tensors that are unpacked when they are asked for.
const atlas = JSON.parse(document.getElementById("data").textContent);
const tokens = atlas.tokens;
const keyTokens = atlas.keys || atlas.tokens;
const kinds = { uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array };
const known = new Map();

function bytesOf(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

async function unpacked(reference) {
  const packed = bytesOf(document.getElementById(`blob-${reference.blob}`).textContent);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const kind = kinds[reference.dtype];
  const width = kind.BYTES_PER_ELEMENT;
  const count = planes.length / width;
  const bytes = new Uint8Array(planes.length);
  for (let plane = 0; plane < width; plane++) {
    for (let i = 0, at = plane * count; i < count; i++) bytes[i * width + plane] = planes[at + i];
  }
  return new kind(bytes.buffer);
}

// What is stored: numbers of a share are times 1/65535; the largest number of an index is none.
function raw(reference) {
  const name = `${reference.blob} ${reference.dtype}`;
  if (!known.has(name)) {
    const entry = { data: null };
    entry.promise = unpacked(reference).then((data) => (entry.data = data));
    known.set(name, entry);
  }
  return known.get(name);
}

// A tensor's numbers, when they are there.
async function tensor(reference) {
  const data = await raw(reference).promise;
  return reference.scale === 1 ? data : Float32Array.from(data, (x) => x * reference.scale);
}

// Data that is there now; otherwise null, and `then` is called when it is.
function ready(reference, then) {
  const entry = raw(reference);
  if (entry.data === null && !entry.waits) {
    entry.waits = true;
    entry.promise.then(then);
  }
  return entry.data;
}

const nameOf = (at) => `${at[0]}.${at[1]}`;
const by = (list) => new Map(list.map((each) => [nameOf(each.at), each]));
const patterns = by(atlas.patterns);
const neurons = by(atlas.neurons);
const joints = by(atlas.joint);

// One query's keys in the order of their weights: {keys, weights, rest}; null while it is unpacked.
function rowOf(pattern, query, then) {
  const found = [];
  let rest = 0;
  if (pattern.whole) {
    const data = ready(pattern.whole, then);
    if (!data) return null;
    for (let key = 0; key < pattern.keys; key++) {
      const weight = data[query * pattern.keys + key];
      if (weight) found.push([key, weight / 65535]);
    }
  } else {
    const strip = pattern.strips[Math.floor(query / pattern.strips[0].index.shape[0])];
    const [index, weight, left] = [strip.index, strip.weight, strip.rest].map((x) => ready(x, then));
    if (!index || !weight || !left) return null;
    const width = strip.index.shape[1];
    const none = strip.index.dtype === "uint16" ? 65535 : 4294967295;
    const at = query - strip.first;
    for (let i = at * width; i < (at + 1) * width; i++) {
      if (index[i] !== none) found.push([index[i], weight[i] / 65535]);
    }
    rest = left[at] / 65535;
  }
  found.sort((a, b) => b[1] - a[1]);
  return { keys: found.map((x) => x[0]), weights: found.map((x) => x[1]), rest };
}

// Text as it is shown: what cannot be seen is written as an escape.
function shown(text) {
  if (/^ +$/.test(text)) return "␣".repeat(text.length);
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu, (c) =>
    ({ "\n": "\\n", "\t": "\\t", "\r": "\\r" })[c] || `\\u{${c.codePointAt(0).toString(16)}}`);
}
const brief = (text, length = 14) => {
  const whole = [...shown(text).trim()];
  return whole.length > length ? whole.slice(0, length - 1).join("") + "…" : whole.join("");
};
const number = (x, digits = 4) =>
  Number.isNaN(x) || x === null ? "none" : x !== 0 && Math.abs(x) < 10 ** (1 - digits) ? x.toExponential(1)
    : Math.abs(x) >= 1000 ? x.toFixed(0) : x.toFixed(digits);
