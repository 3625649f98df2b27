"use strict";
// The page works without this: it chooses a run, opens what a link leads to, sorts and filters tables.

const picker = document.getElementById("run");
function show(run) {
  for (const part of document.querySelectorAll("[data-run]")) part.hidden = part.dataset.run !== run;
  picker.value = run;
}
function follow() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  const run = target.closest("[data-run]");
  if (picker && run && run.hidden) show(run.dataset.run);
  for (let e = target; e; e = e.parentElement) if (e.tagName === "DETAILS") e.open = true;
  target.scrollIntoView();
}
if (picker) {
  show(picker.value);
  picker.addEventListener("change", () => show(picker.value));
}
addEventListener("hashchange", follow);
follow();

// A number as it was printed, or the text. Dashes, which stand for nothing, come last either way.
function value(row, column) {
  const text = row.cells[column].textContent;
  const number = Number(text.replaceAll(",", "").replace("%", ""));
  return text === "–" ? null : Number.isNaN(number) ? text : number;
}
function sort(head) {
  const body = head.closest("table").tBodies[0];
  const up = head.ariaSort !== "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.ariaSort = up ? "ascending" : "descending";
  const order = (a, b) => {
    const [x, y] = [value(a, head.cellIndex), value(b, head.cellIndex)];
    if (x === null || y === null) return (x === null) - (y === null);
    const less = typeof x === typeof y ? x < y : typeof x === "number";
    return x === y ? 0 : less === up ? -1 : 1;
  };
  body.append(...[...body.rows].sort(order));
}
function filter(table, words) {
  for (const row of table.tBodies[0].rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
  }
}
for (const table of document.querySelectorAll(".scroll table:not(.grid, .sides)")) {
  if (table.tBodies[0].rows.length < 8) continue;
  table.classList.add("sortable");
  for (const head of table.tHead.rows[0].cells) {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head));
    head.addEventListener("keydown", e => { if (e.key === "Enter") sort(head); });
  }
  const box = document.createElement("input");
  box.type = "search";
  box.placeholder = "filter";
  box.ariaLabel = "Rows that hold all of these words";
  box.addEventListener("input", () => filter(table, box.value.toLowerCase().split(/\s+/)));
  table.caption.append(box);
}
