// Sorting and filtering of the claims. Without it, the whole table is there as it is.
"use strict";

const table = document.querySelector("table.claims");
const form = document.querySelector("form.filters");
const rows = [...table.tBodies[0].rows];
const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

// A row's value in a column: a number where the column has numbers, null where there is none (always last).
function key(row, column, numeric) {
  const cell = row.cells[column];
  if (!numeric) return cell.textContent.trim();
  return cell.dataset.key === undefined ? null : Number(cell.dataset.key);
}

function sort(header, column) {
  const up = header.getAttribute("aria-sort") !== "ascending";
  const numeric = header.classList.contains("number");
  const keys = new Map(rows.map((row) => [row, key(row, column, numeric)]));
  rows.sort((first, second) => {
    const [a, b] = [keys.get(first), keys.get(second)];
    if (a === null || b === null) return (a === null) - (b === null);
    const order = numeric ? a - b : a.localeCompare(b, "en", { numeric: true });
    return up ? order : -order;
  });
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  table.tBodies[0].append(...rows);
}

function filter() {
  const words = form.elements.text.value.toLowerCase().split(/\s+/);
  const paper = form.elements.paper?.value ?? "";
  const verdict = form.elements.verdict.value;
  let shown = 0;
  for (const row of rows) {
    const { paper: slug, verdict: kind, group } = row.dataset;
    row.hidden = !(
      (!paper || paper === slug) &&
      (!verdict || verdict === kind || verdict === group) &&
      words.every((word) => text.get(row).includes(word))
    );
    shown += !row.hidden;
  }
  form.querySelector("output").textContent = `${shown} of ${rows.length} claims`;
}

[...table.tHead.rows[0].cells].forEach((header, column) => {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...header.childNodes);
  button.addEventListener("click", () => sort(header, column));
  header.append(button);
});
for (const event of ["input", "change"]) form.addEventListener(event, filter); // not every browser sends both
form.addEventListener("reset", () => setTimeout(filter)); // the event comes before the reset itself
form.addEventListener("submit", (event) => event.preventDefault());
for (const link of document.querySelectorAll("a[data-show]")) {
  link.addEventListener("click", () => {
    form.reset();
    form.elements.verdict.value = link.dataset.show;
    filter();
  });
}
form.hidden = false;
filter();
