// The per-module chart and table: drawn from `modules` for what the selects say, anew when they change.
const moduleRows = modules.rows.map(row => Object.fromEntries(row.map((value, i) => [modules.columns[i], value])));
const moduleForm = document.getElementById("module-choice");
const shares = {sqnr: 1.5, alpha: 1, beta: 1, steps: 1};

function chosenModules() {
  const chosen = [...moduleForm.querySelectorAll("select")];
  return moduleRows.filter(row => chosen.every(select => row[select.name] === select.value));
}

// A panel without a figure is left out; where there is no room for all beside each other, they stand one below the other.
function modulePanels(rows, width) {
  const known = {sqnr: ["before"], alpha: ["alpha_p50"], beta: ["beta_p50"], steps: modules.engines};
  const panels = moduleChart.hconcat.filter(panel => rows.some(row => known[panel.name].some(field => row[field] !== null)));
  const stacked = width < 760;
  const total = panels.reduce((sum, panel) => sum + shares[panel.name], 0);
  const longest = Math.min(230, 7 * Math.max(...rows.map(row => row.module.length)));
  const room = width - longest - 26 * panels.length - 20;
  return {stacked, panels: panels.map((panel, i) => {
    const labels = stacked || i === 0;
    const layer = panel.layer.map(part => part.encoding.y === undefined ? part
      : {...part, encoding: {...part.encoding, y: {...part.encoding.y, axis: {...part.encoding.y.axis, labels}}}});
    return {...panel, layer, width: Math.max(60, stacked ? width - longest - 40 : room * shares[panel.name] / total)};
  })};
}

function drawModules(rows) {
  const element = document.getElementById("modules-chart");
  const {stacked, panels} = modulePanels(rows, element.clientWidth);
  const {hconcat, ...rest} = moduleChart;
  const config = {...rest.config, legend: {...rest.config.legend, columns: stacked ? 1 : 0}};
  const names = rows.map(row => row.module);
  const filled = JSON.parse(JSON.stringify({...rest, config, [stacked ? "vconcat" : "hconcat"]: panels}),
    (key, value) => Array.isArray(value) && value[0] === "MODULES" ? names : value);
  const spec = {...filled, datasets: {modules: rows}};
  vegaEmbed(element, spec, {actions: false, renderer: "svg"}).catch(console.error);
}

const digits = (value, count) => value === null || value === undefined ? "" : String(+value.toPrecision(count));
const range = (row, name) => row[name + "_p50"] === null ? ""
  : `${digits(row[name + "_p50"], 4)} <small>${digits(row[name + "_p05"], 3)} … ${digits(row[name + "_p95"], 3)}</small>`;
const escaped = text => new Option(text).innerHTML;

// [heading, explanation, value to sort by, what to show]
const moduleColumns = [
  ["before dB", "SQNR of the module's output before compensation", row => row.before, row => row.before?.toFixed(2) ?? ""],
  ["after dB", "SQNR after compensation", row => row.after, row => row.after?.toFixed(2) ?? ""],
  ["gain dB", "difference", row => row.before === null ? null : row.after - row.before,
    row => row.before === null ? "" : (row.after - row.before).toFixed(2)],
  ["α", "median over channels, then the 5 % and 95 % quantiles", row => row.alpha_p50, row => range(row, "alpha")],
  ["β %", "the same of beta, in percent of the output's root mean square", row => row.beta_p50, row => range(row, "beta")],
  ...modules.engines.flatMap(name => [
    [`${name} steps`, "largest difference from the simulation, in output steps", row => row[name], row => row[name]?.toFixed(2) ?? ""],
    [`${name} differs`, "share of elements that differ by half a step or more", row => row[name + " differs"],
      row => digits(row[name + " differs"], 2)],
  ]),
  ["gate", "what the held-out images said", row => row.kept, row => escaped(row.gate)],
];

function tabulateModules(rows) {
  const table = document.getElementById("modules-table");
  const columns = moduleColumns.filter(([, , value]) => rows.some(row => value(row) !== null));
  const heading = ([name, explanation]) => `<th title="${explanation}"><button type="button">${name}</button></th>`;
  table.innerHTML = `<thead><tr class="headings"><th class="text"><button type="button">module</button></th>`
    + `<th class="text"><button type="button">kind</button></th>${columns.map(heading).join("")}</tr></thead><tbody>`
    + rows.map((row, i) => `<tr${row.kept === null || row.kept === 1 ? "" : ' class="rejected"'}>`
      + `<th class="text" data-value="${i}">${escaped(row.module)}</th><td class="text" data-value="${row.kind}">${row.kind}</td>`
      + columns.map(([name, , value, show]) =>
        `<td${name === "gate" ? ' class="text"' : ""} data-value="${value(row) ?? ""}">${show(row)}</td>`).join("")
      + "</tr>").join("") + "</tbody>";
  makeSortable(table);
}

function showModules() {
  const rows = chosenModules();
  document.getElementById("no-modules").hidden = rows.length > 0;
  document.getElementById("modules-chart").hidden = rows.length === 0;
  if (rows.length) drawModules(rows);
  tabulateModules(rows);
}

let moduleWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === moduleWidth) return;
  moduleWidth = innerWidth;
  drawModules(chosenModules());
});
moduleForm.addEventListener("input", showModules);
moduleForm.addEventListener("submit", event => event.preventDefault());
showModules();
