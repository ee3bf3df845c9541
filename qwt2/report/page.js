// Charts: every specification is drawn into the element of its name.
for (const [id, spec] of Object.entries(specs)) {
  vegaEmbed(document.getElementById(id), spec, {actions: false, renderer: "svg"}).catch(console.error);
}

// Tables: sort by a heading, filter all of them at once. Figures not measured sort last either way.
const filter = document.getElementById("filter");
const tables = document.querySelectorAll("table[data-model]");

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
  rule(table);
}

// fp32 stays beside whatever is left, as what to compare with.
function matches(row, precision, kind) {
  return row.dataset.kind === "fp32"
    || ((!precision || row.dataset.precision === precision) && (!kind || row.dataset.kind === kind));
}

// A line between precisions, as long as the rows are in their order.
function rule(table) {
  const sorted = table.querySelector("[aria-sort]");
  let last;
  for (const row of table.tBodies[0].rows) {
    if (row.hidden) continue;
    row.classList.toggle("break", last !== undefined && last !== row.dataset.precision
      && (!sorted || sorted.cellIndex === 0));
    last = row.dataset.precision;
  }
}

function show() {
  const {precision, kind, secondary} = filter.elements;
  for (const table of tables) {
    table.classList.toggle("all", secondary.checked);
    for (const row of table.tBodies[0].rows) {
      row.hidden = !matches(row, precision.value, kind.value);
    }
    for (const group of table.querySelectorAll(".group")) {
      group.dataset.some ??= group.colSpan;
      group.colSpan = secondary.checked ? group.dataset.all : group.dataset.some;
    }
    rule(table);
  }
}

for (const heading of document.querySelectorAll(".headings th")) {
  heading.firstElementChild.addEventListener("click", () => sort(heading.closest("table"), heading));
}
filter.addEventListener("input", show);
filter.addEventListener("submit", event => event.preventDefault());
show();
