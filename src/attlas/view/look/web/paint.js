// Colours and canvases. Colours come from the page's styles, so that both schemes have their own.
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const styles = {};
const lists = { sequential: ["--ramp-0", "--ramp-1", "--ramp-2", "--ramp-3", "--ramp-4"],
                diverging: ["--minus-2", "--minus-1", "--ramp-0", "--plus-1", "--plus-2"] };
const ramps = {};
const painters = [];

function recolour() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ink", "soft", "line", "card", "accent", "track", "query", "key", "bad", "good"]) {
    styles[name] = style.getPropertyValue(`--${name}`).trim();
  }
  for (const [ramp, names] of Object.entries(lists)) {
    const stops = names.map((name) => {
      const hex = parseInt(style.getPropertyValue(name).trim().slice(1), 16);
      return [hex >> 16, (hex >> 8) & 255, hex & 255];
    });
    ramps[ramp] = Uint32Array.from({ length: 256 }, (_, i) => {
      const at = (i / 255) * (stops.length - 1);
      const low = Math.min(Math.floor(at), stops.length - 2);
      const [r, g, b] = stops[low].map((x, c) => Math.round(x + (stops[low + 1][c] - x) * (at - low)));
      return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
    });
  }
}
dark.addEventListener("change", () => {
  recolour();
  for (const each of painters) each();
});

// A colour of a ramp, for a share between 0 and 1.
function rgb(ramp, share) {
  const c = ramps[ramp][clamp(Math.round(share * 255), 0, 255)];
  return `rgb(${c & 255} ${(c >> 8) & 255} ${(c >> 16) & 255})`;
}
// Ink that is legible upon it.
function inkOn(ramp, share) {
  const c = ramps[ramp][clamp(Math.round(share * 255), 0, 255)];
  const light = [c & 255, (c >> 8) & 255, (c >> 16) & 255].map((x) => {
    const y = x / 255;
    return y <= 0.03928 ? y / 12.92 : ((y + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2] > 0.18 ? "#111" : "#fff";
}

// A canvas as many pixels wide as it is shown; returns its context in units of the page.
function fitted(canvas, height) {
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const width = canvas.clientWidth || canvas.parentElement.clientWidth;
  canvas.style.height = `${height}px`;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height, ratio };
}

// Drawn once a frame, however often it was asked for.
function framed(draw) {
  let waits = false;
  return () => {
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => {
      waits = false;
      draw();
    });
  };
}

// One strip of numbers, a pixel each, in colours around zero.
function strip(canvas, numbers, largest) {
  canvas.width = numbers.length;
  canvas.height = 1;
  const context = canvas.getContext("2d");
  const image = context.createImageData(numbers.length, 1);
  const pixels = new Uint32Array(image.data.buffer);
  numbers.forEach((x, i) => (pixels[i] = ramps.diverging[clamp(Math.round(127.5 + (127.5 * x) / (largest || 1)), 0, 255)]));
  context.putImageData(image, 0, 0);
}
