"use strict";

// Without this script the page shows everything but the other seeds; with it tables sort and titles filter.

function value(cell) {
  return cell.dataset.value ?? cell.textContent.trim();
}

function isNumeric(cell) {
  return cell.dataset.value !== undefined;
}

// Compares two cells of a column; what has no figure stays at the end in both directions.
function compare(a, b, direction) {
  if (!isNumeric(a)) return direction * value(a).localeCompare(value(b));
  if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === "");
  return direction * (Number(value(a)) - Number(value(b)));
}

function sort(table, header, order) {
  for (const other of header.parentNode.cells) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", order);
  const direction = order === "ascending" ? 1 : -1;
  for (const body of table.tBodies) {
    const rows = [...body.rows];
    rows.sort((a, b) => compare(a.cells[header.cellIndex], b.cells[header.cellIndex], direction));
    body.append(...rows);
  }
}

// Figures start with the highest, names with the first.
function nextOrder(table, header) {
  const row = table.tBodies[0].rows[0];
  const first = row && isNumeric(row.cells[header.cellIndex]) ? "descending" : "ascending";
  const now = header.getAttribute("aria-sort");
  if (now === "none") return first;
  return now === "descending" ? "ascending" : "descending";
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sort(table, header, nextOrder(table, header)));
    header.append(button);
    header.setAttribute("aria-sort", "none");
  }
}

const controls = document.getElementById("controls");
const titles = document.getElementById("titles-table");

function chosen(name) {
  return controls.elements.namedItem(name).value;
}

// Shows the titles of the chosen seed and mode, and gives each cell the mean reward of what it shows.
function showTitles() {
  for (const title of titles.querySelectorAll(".title")) {
    const { seed, mode } = title.dataset;
    title.hidden = (seed !== undefined && seed !== chosen("seed")) || (mode !== undefined && mode !== chosen("mode"));
  }
  for (const cell of titles.querySelectorAll("tbody [data-method]")) {
    const rewards = [...cell.querySelectorAll(".title:not([hidden])")].map((title) => title.dataset.reward);
    const known = rewards.filter((reward) => reward !== "").map(Number);
    cell.dataset.value = known.length ? known.reduce((sum, reward) => sum + reward, 0) / known.length : "";
  }
  const sorted = titles.querySelector('[aria-sort="ascending"], [aria-sort="descending"]');
  if (sorted) sort(titles, sorted, sorted.getAttribute("aria-sort"));
  filterStories();
}

// Shows the stories that have the text in what is shown of them, and a title with the verdict (of the method, if any).
function filterStories() {
  const text = chosen("text").trim().toLowerCase();
  const cells = chosen("method") ? `[data-method="${chosen("method")}"]` : "td:not([hidden])";
  let shown = 0;
  for (const row of titles.tBodies[0].rows) {
    const judged = [...row.querySelectorAll(`${cells} .title:not([hidden])`)];
    const words = [...row.querySelectorAll(".story bdi, td:not([hidden]) .title:not([hidden]) bdi")];
    row.hidden =
      (chosen("verdict") !== "" && !judged.some((title) => title.dataset.verdict === chosen("verdict"))) ||
      !words.some((word) => word.textContent.toLowerCase().includes(text));
    shown += !row.hidden;
  }
  document.getElementById("count").textContent = `${shown} of ${titles.tBodies[0].rows.length} stories`;
}

function showColumns() {
  for (const box of controls.elements.namedItem("columns").elements) {
    for (const cell of titles.querySelectorAll(`[data-method="${box.value}"]`)) cell.hidden = !box.checked;
  }
  filterStories();
}

controls.addEventListener("submit", (event) => event.preventDefault());
controls.addEventListener("input", (event) => {
  if (event.target.type === "checkbox") showColumns();
  else if (["seed", "mode"].includes(event.target.name)) showTitles();
  else filterStories();
});
controls.hidden = false;
showColumns();
showTitles();
