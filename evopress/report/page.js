// Sort a table by a click on the head of a column, and the other way round by the next one.
// Numbers are compared as numbers; what is none, such as a dash, comes last.
"use strict";

function value(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replace(/,/g, ""));
  return Number.isNaN(number) ? text : number;
}

function sort(head) {
  const table = head.closest("table");
  const descending = head.getAttribute("aria-sort") === "ascending";
  table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows).map((row) => [value(row, head.cellIndex), row]);
  const numbers = rows.filter(([key]) => typeof key === "number");
  const texts = rows.filter(([key]) => typeof key !== "number");
  const sign = descending ? -1 : 1;
  numbers.sort(([a], [b]) => sign * (a - b));
  texts.sort(([a], [b]) => sign * a.localeCompare(b));
  body.append(...numbers.concat(texts).map(([, row]) => row));
}

document.querySelectorAll("thead th").forEach((head) => {
  head.tabIndex = 0;
  head.title = "sort by this column";
  head.addEventListener("click", () => sort(head));
  head.addEventListener("keydown", (event) => {
    if (event.key === "Enter") sort(head);
  });
});
