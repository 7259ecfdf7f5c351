"use strict";

// Sorting: a click or Enter on a column's button; numbers by value, missing ones always last.
for (const button of document.querySelectorAll("table.data thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const table = button.closest("table");
    const column = [...head.parentNode.children].indexOf(head);
    const first = head.dataset.first || "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const each of head.parentNode.children) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const value = (row) => row.children[column].dataset.value;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const difference = Number(x) - Number(y);
      return sign * (Number.isNaN(difference) ? x.localeCompare(y, "en", { numeric: true }) : difference);
    });
    table.tBodies[0].append(...rows);
    const status = document.getElementById("status");
    status.textContent = `sorted by ${button.textContent.trim()}, ${order}`;
  });
}
