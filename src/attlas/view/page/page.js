"use strict";

// Charts: redrawn when the colour scheme or the choice of what stands upwards changes.
const figures = JSON.parse(document.getElementById("figures").textContent);
const choice = document.getElementById("quality");
const dark = window.matchMedia("(prefers-color-scheme: dark)");

// A curve of points with their spread as bars; or a line with its spread as a band.
function traces(curve, colour) {
  const common = {
    type: "scatter", name: curve.family, x: curve.x, y: curve.y, customdata: curve.hover,
    hovertemplate: "%{customdata}<extra></extra>", line: { color: curve.colour, width: 2 },
  };
  if (curve.line) {
    const edge = (sign, by, more) => ({
      type: "scatter", mode: "lines", x: curve.x, y: curve.y.map((y, i) => y + sign * by[i]),
      line: { width: 0 }, hoverinfo: "skip", ...more,
    });
    const band = curve.up.some((up) => up > 0)
      ? [edge(-1, curve.down, {}), edge(1, curve.up, { fill: "tonexty", fillcolor: curve.colour + "33" })] : [];
    return [...band, { ...common, mode: curve.x.length > 1 ? "lines" : "markers" }];
  }
  return [{
    ...common, mode: "lines+markers+text", text: curve.budget, textposition: "middle right",
    textfont: { size: 11, color: colour("--soft") }, cliponaxis: false,
    marker: { color: curve.colour, size: curve.full ? 15 : 9, symbol: curve.full ? "star" : "circle" },
    error_y: { type: "data", symmetric: false, array: curve.up, arrayminus: curve.down,
               color: curve.colour, thickness: 0.8, width: 3 },
  }];
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  for (const figure of figures.filter((f) => !choice || f.quality === choice.value)) {
    const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true, fixedrange: true };
    Plotly.react(figure.place, figure.curves.flatMap((curve) => traces(curve, colour)), {
      showlegend: false, margin: { l: 50, r: 24, t: 24, b: 50 }, dragmode: false,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 13, color: colour("--ink") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") }, align: "left" },
      xaxis: { ...axis, title: { text: figure.across }, rangemode: figure.zero ? "tozero" : "normal" },
      yaxis: { ...axis, title: { text: figure.upwards }, type: figure.log ? "log" : "linear",
               rangemode: figure.zero ? "tozero" : "normal" },
    }, { displayModeBar: false, responsive: true });
  }
}
if (figures.length) {
  if (choice) choice.addEventListener("change", draw);
  dark.addEventListener("change", draw);
  draw();
}
