// Tables sort by a heading that is clicked, and back to front when clicked again. Figures not measured sort last either way.
function compare(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  return sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
}

function sort(table, heading) {
  const descending = heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const key = row => row.cells[heading.cellIndex].dataset.value;
  const rows = [...table.tBodies[0].rows].sort((a, b) => compare(key(a), key(b), descending ? -1 : 1));
  table.tBodies[0].append(...rows);
}

function makeSortable(table, after = () => {}) {
  for (const heading of table.querySelectorAll(".headings th")) {
    heading.firstElementChild.addEventListener("click", () => { sort(table, heading); after(table); });
  }
}
