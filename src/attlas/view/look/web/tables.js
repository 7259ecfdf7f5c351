// Tables, as they were given; a click on a column's head sorts.
for (const table of atlas.tables) {
  byId("tables").hidden = false;
  const words = table.columns.map((_, c) => table.rows.some((row) => typeof row[c] === "string"));
  const kind = (c) => (words[c] ? "words" : null);
  const head = make("tr", {}, ...table.columns.map((name, c) =>
    make("th", { scope: "col", class: kind(c), "data-first": words[c] ? "ascending" : "descending" }, make("button", { type: "button" }, shown(name)))));
  const rows = table.rows.map((row) => make("tr", {}, ...row.map((value, c) =>
    make("td", { class: kind(c), "data-value": value === null ? "" : String(value) },
      value === null ? "–" : typeof value === "number" && !Number.isInteger(value) ? String(+value.toPrecision(4)) : shown(String(value))))));
  byId("tables").append(make("h2", {}, shown(table.title)),
    make("div", { class: "scroll", role: "region", "aria-label": shown(table.title), tabindex: 0 },
      make("table", { class: "data" }, make("thead", {}, head), make("tbody", {}, ...rows))));
}
