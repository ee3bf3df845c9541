// Charts: every specification is drawn into the element of its name.
for (const [id, spec] of Object.entries(specs)) {
  vegaEmbed(document.getElementById(id), spec, {actions: false, renderer: "svg"}).catch(console.error);
}

// Tables of figures: filtered all at once.
const filter = document.getElementById("filter");
const tables = document.querySelectorAll("table[data-model]");

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

for (const table of tables) makeSortable(table, rule);
filter.addEventListener("input", show);
filter.addEventListener("submit", event => event.preventDefault());
show();
