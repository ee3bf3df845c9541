"""Command: rewrite the tables of README.md and docs/ from the files in results/ (``make readme``)."""

import csv
from pathlib import Path

from pipeline.common.folders import RESULTS
from pipeline.comparison.literature import literature
from pipeline.comparison.static_page import static_page
from qwt2.errors import Qwt2Error, guarded
from qwt2.io import write_text
from qwt2.report.compensations import SUBJECT, heading, label, order
from qwt2.report.detection import lines
from qwt2.report.findings import ENGINES
from qwt2.report.metrics import HEADLINE, METRICS
from qwt2.report.results import Method, Results, Row, precision_order, read_rows

BEGIN = "<!-- results:begin (written by `make readme`) -->"
END = "<!-- results:end -->"
_MISSING = "–"


MEANS_BEGIN = "<!-- means:begin (written by `make readme`) -->"
MEANS_END = "<!-- means:end -->"
DETECTION_BEGIN = "<!-- detection:begin (written by `make readme`) -->"
DETECTION_END = "<!-- detection:end -->"
PEERS_BEGIN = "<!-- peers:begin (written by `make readme`) -->"
PEERS_END = "<!-- peers:end -->"
COSTS_BEGIN = "<!-- costs:begin (written by `make readme`) -->"
COSTS_END = "<!-- costs:end -->"
ZOO_BEGIN = "<!-- zoo:begin (written by `make readme`) -->"
ZOO_END = "<!-- zoo:end -->"
PUBLISHED_BEGIN = "<!-- published:begin (written by `make readme`) -->"
PUBLISHED_END = "<!-- published:end -->"
REPORT_BEGIN = "<!-- report:begin (written by `make readme`) -->"
REPORT_END = "<!-- report:end -->"
REAL_BEGIN = "<!-- real:begin (written by `make readme`) -->"
REAL_END = "<!-- real:end -->"


def update_means(readme: Path, summary: Path) -> None:
    """Replace the text between the markers of ``readme`` by the means of ``summary`` over models.

    Raises:
        Qwt2Error: the markers are missing.
    """
    replace_between(readme, MEANS_BEGIN, MEANS_END, means_table(Results(read_rows(summary))))


def update(readme: Path, summary: Path) -> None:
    """Replace the table of classifiers; see :func:`update_means`."""
    replace_between(readme, BEGIN, END, table(Results(read_rows(summary)).of_task("classification")))


def update_static_page(page: Path, summary: Path) -> None:
    """Write the page of the default run, with its plots beside it; see :func:`update`."""
    results = Results(read_rows(summary)).of_task("classification")
    replace_between(page, REPORT_BEGIN, REPORT_END, static_page(results, page))


def update_detection(readme: Path, summary: Path) -> None:
    """Replace the table of detectors, if ``summary`` has any; see :func:`update`."""
    results = Results(read_rows(summary)).of_task("detection")
    if results.rows:
        replace_between(readme, DETECTION_BEGIN, DETECTION_END, detection_table(results))


def update_peers(readme: Path, benchmarks: Path) -> None:
    """Replace the tables that compare other tools, one per machine that measured them; see :func:`update`."""
    files = sorted(benchmarks.glob("peers-*.csv"))
    if files:
        replace_between(readme, PEERS_BEGIN, PEERS_END, "\n\n".join(peers_table(read_dicts(file)) for file in files))


def update_costs(readme: Path, benchmarks: Path) -> None:
    """Replace the tables of calibration costs, one per machine; see :func:`update`."""
    files = sorted(benchmarks.glob("calibration-cost-*.csv"))
    if files:
        replace_between(readme, COSTS_BEGIN, COSTS_END, "\n\n".join(costs_table(read_dicts(file)) for file in files))


def update_zoo(readme: Path, benchmarks: Path) -> None:
    """Replace the tables of models from outside, one per machine; see :func:`update`."""
    files = sorted(benchmarks.glob("zoo-*.csv"))
    if files:
        replace_between(readme, ZOO_BEGIN, ZOO_END, "\n\n".join(zoo_table(read_dicts(file)) for file in files))


def update_real(readme: Path, benchmarks: Path) -> None:
    """Replace the tables of real networks on real data, one pair per machine; see :func:`update`."""
    files = sorted(benchmarks.glob("real-grid-*.csv"))
    pairs = [(file, file.with_name(file.name.replace("real-grid", "real-peers"))) for file in files]
    texts = [real_tables(read_dicts(grid), read_dicts(peers) if peers.is_file() else []) for grid, peers in pairs]
    if texts:
        replace_between(readme, REAL_BEGIN, REAL_END, "\n\n".join(texts))


# Task -> the two figures of its tables: (column, format).
_REAL = {
    "classification": (("top1", "{:.1f}"), ("agreement", "{:.1f}")),
    "retrieval": (("recall1", "{:.1f}"), ("cosine", "{:.4f}")),
}


def real_tables(grid: list[dict[str, str]], peers: list[dict[str, str]]) -> str:
    """Return Markdown: real networks at all precisions, then at 8 bits beside the best setting of each other tool."""
    facts = f"{grid[0]['cpu']} ({grid[0]['instruction_sets']}); {grid[0]['versions']}"
    return "\n\n".join([facts, _real_grid(grid), *([_real_peers(peers)] if peers else [])])


def _real_grid(rows: list[dict[str, str]]) -> str:
    quantized = [row for row in rows if row["method"] != "fp32" and row["engine"] in ENGINES]
    names = sorted({row["method"].partition("+")[2] for row in quantized}, key=order)
    fp32 = {row["model"]: row for row in rows if row["method"] == "fp32"}
    lines = [["Model", "Bits", "Engine", "fp32", *map(heading, names)], ["---"] * 3 + ["---:"] * (1 + len(names))]
    cells = {(r["model"], r["precision"], r["engine"], r["method"].partition("+")[2]): r for r in quantized}
    for model, precision, engine in dict.fromkeys(key[:3] for key in cells):
        found = [cells.get((model, precision, engine, name)) for name in names]
        shown = [_MISSING if row is None else _accuracy(row) for row in found]
        lines.append([model, precision.upper(), ENGINES[engine], _accuracy(fp32[model]), *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _real_peers(rows: list[dict[str, str]]) -> str:
    lines = [["Engine", "Model", "File", "Accuracy", "SQNR, dB", "Latency, ms", "Latency ÷ PTQ", "MB"]]
    lines.append(["---"] * 3 + ["---:"] * 5)
    for engine, model in dict.fromkeys((row["engine"], row["model"]) for row in rows):
        own = [row for row in rows if (row["engine"], row["model"]) == (engine, model)]
        for row in _best_of_each_tool(own):
            sqnr = _MISSING if row["variant"] == "fp32" else f"{float(row['logits_sqnr_db']):.1f}"
            numbers = [f"{float(row['latency_ms']):.2f}", f"{float(row['latency_ratio_to_ptq']):.2f}"]
            size = f"{int(row['file_bytes']) / 1e6:.1f}"
            lines.append([ENGINES[engine], model, row["variant"], _accuracy(row), sqnr, *numbers, size])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _best_of_each_tool(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Leave out all settings of another tool but the one that is nearest to full precision."""

    def nearness(row: dict[str, str]) -> tuple[float, float]:
        return float(row[_REAL[row["task"]][1][0]]), float(row["logits_sqnr_db"])

    tools: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        name = row["variant"]
        tools.setdefault(name if "(this library)" in name else name.partition(" (")[0], []).append(row)
    return [max(own, key=nearness) for own in tools.values()]


def _accuracy(row: dict[str, str]) -> str:
    """Return a row's figures of its task, such as "74.3 / 92.4"; the second is missing in full precision."""
    return " / ".join(shown.format(float(row[name])) for name, shown in _REAL[row["task"]] if row.get(name))


# Heading -> column of the zoo's rows.
_ZOO = {
    "Outcome": "outcome", "Graph against model, dB": "same_db", "Layers": "layers", "Products": "products",
    "Units of QwT": "blocks", "MACs in integers, %": "integer_macs_percent", "Float with 1 % noise, dB": "noise_db",
    "PTQ, dB": "ptq_db", "CWAC, dB": "cwac_db", "QwT, dB": "qwt_db", "NNCF, dB": "nncf_db",
    "quantize_static, dB": "quantize_static_db", "ONNX Runtime against simulation, dB": "onnxruntime_db",
    "OpenVINO against simulation, dB": "openvino_db", "CWAC, float passes": "cwac_passes",
    "QwT, float passes": "qwt_passes",
}  # fmt: skip
_ZOO_TOOLS = {"nncf": "NNCF", "quantize_static": "quantize_static"}
_FEW_PASSES = 3.5  # aim for the cost of CWAC


def zoo_table(rows: list[dict[str, str]]) -> str:
    """Return Markdown: what holds for all models together, then a row per model, with the reason if it failed."""
    lines = [["Family", "Model", *_ZOO], ["---", "---", "---", *["---:"] * (len(_ZOO) - 1)]]
    for row in sorted(rows, key=lambda row: (row["source"], row["family"])):
        figures = [row[column] or _MISSING for column in _ZOO.values()]
        figures[0] += f": {row['reason']}" if row["reason"] else ""
        for tool in _ZOO_TOOLS:
            if row[tool] and row[tool] != "runs":
                figures[list(_ZOO.values()).index(f"{tool}_db")] = row[tool].partition(":")[0]
        lines.append([f"{row['source']}: {row['family']}", row["model"], *figures])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{_zoo_facts(rows)}. {rows[0]['cpu']}; {rows[0]['versions']}\n\n{table}"


def _zoo_facts(rows: list[dict[str, str]]) -> str:
    taken = [row for row in rows if row["outcome"] != "not taken"]
    facts = [
        f"{source}: {sum(r['outcome'] == 'through' for r in own)} of {len(own)}"
        for source in sorted({row["source"] for row in taken})
        for own in [[row for row in taken if row["source"] == source]]
    ]
    text = f"Through, of those taken: {', '.join(facts)}"
    through = [row for row in taken if row["outcome"] == "through"]
    if through:
        shares = [float(row["integer_macs_percent"]) for row in through]
        passes = [float(row["cwac_passes"]) for row in through]
        text += f"; on average {sum(shares) / len(shares):.1f} % of the multiply-accumulates in integers"
        text += f"; QwT has units in {sum(int(row['blocks']) > 0 for row in through)} of {len(through)}; CWAC costs at "
        text += f"most {_FEW_PASSES} float passes in {sum(cost <= _FEW_PASSES for cost in passes)} and "
        text += f"{max(passes)} in all"
    both = [row for row in taken if all(row[tool] for tool in _ZOO_TOOLS)]
    if both:
        runs = [f"{sum(r[tool] == 'runs' for r in both)} through {name}" for tool, name in _ZOO_TOOLS.items()]
        here = sum(row["outcome"] == "through" for row in both)
        text += f". Of {len(both)} models that other tools got too, {here} come through here, {' and '.join(runs)}"
    return text


def costs_table(rows: list[dict[str, str]]) -> str:
    """Return Markdown: a row per step, and how many times that the implementation which stores everything takes."""
    stored = {row["method"]: row for row in rows if row["implementation"] == "stored"}
    lines = [
        ["Step", "Seconds", "CPU seconds", "MB added", "stored ÷ this, CPU seconds", "stored ÷ this, MB"],
        ["---", *["---:"] * 5],
    ]
    for row in (row for row in rows if row["implementation"] == "qwt2"):
        other = stored.get(row["method"])
        times = [
            _MISSING if other is None else f"{float(other[key]) / float(row[key]):.1f}"
            for key in ("cpu_seconds", "added_mb")
        ]
        lines.append([row["method"], row["seconds"], row["cpu_seconds"], row["added_mb"], *times])
    first = rows[0]
    facts = (
        f"{first['model']}, {first['precision']}, {first['images']} images; {first['cpu']}, {first['threads']} threads"
    )
    return f"{facts}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_between(readme: Path, begin: str, end: str, content: str) -> None:
    """Replace the text between two markers.

    Raises:
        Qwt2Error: the file does not have each marker once, in this order.
    """
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise Qwt2Error(f"{readme} must hold the line {begin} once and {end} once after it; put them where it belongs.")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    write_text(readme, f"{before}{begin}\n{content}\n{end}{after}")


def read_dicts(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Engine -> the other tool that makes models for it: the name in the files, and the title.
_TOOLS = {
    "onnxruntime": ("quantize_static", "quantize_static"), "openvino": ("nncf", "NNCF"),
    "inductor": ("torchao", "torchao"),
}  # fmt: skip


def peers_table(rows: list[dict[str, str]]) -> str:
    """Return Markdown: per engine, model and batch, the latencies in multiples of folded CWAC's, and all SQNRs."""
    ratios = {"fp32": "fp32", "bf16": "bf16", "ptq": "PTQ", "cwac_unfolded": "CWAC unfolded", "qwt": "QwT"}
    headings = ["Engine", "Model", "Batch", "CWAC, ms", *(f"{name} ÷ CWAC" for name in ratios.values())]
    headings += ["Other tool, setting", "Other tool ÷ CWAC", "SQNR PTQ, dB", "SQNR CWAC, dB", "SQNR other tool, dB"]
    right = headings.index("Other tool, setting")
    lines = [headings, ["---", "---", *["---:"] * (right - 2), "---", *["---:"] * (len(headings) - right - 1)]]
    cells = {(r["engine"], r["model"], r["batch"], r["variant"]): r for r in rows}
    for engine, model, batch in sorted({key[:3] for key in cells}):
        own = {variant: row for (*key, variant), row in cells.items() if key == [engine, model, batch]}
        tool, title = _TOOLS[engine]
        base = float(own["cwac"]["latency_ratio_to_ptq"])
        times = [_figure(own, variant, "latency_ratio_to_ptq", base, 2) for variant in (*ratios, tool)]
        distances = [_figure(own, variant, "logits_sqnr_db", 1, 1) for variant in ("ptq", "cwac", tool)]
        best = f"{title}: {own[tool]['setting']}" if tool in own else _MISSING
        name = "Inductor" if engine == "inductor" else ENGINES[engine]
        latency = f"{float(own['cwac']['latency_ms']):.1f}"
        lines.append([name, model, batch, latency, *times[:-1], best, times[-1], *distances])
    facts = f"{rows[0]['cpu']} ({rows[0]['instruction_sets']}), {rows[0]['threads']} thread; {rows[0]['versions']}"
    return f"{facts}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(rows: dict[str, dict[str, str]], variant: str, column: str, base: float, digits: int) -> str:
    """Return a variant's figure in multiples of ``base``, or a dash if it was not measured."""
    return f"{float(rows[variant][column]) / base:.{digits}f}" if variant in rows else _MISSING


def means_table(results: Results) -> str:
    """Return Markdown: a row per task and precision with the main figure in percent, as mean over the task's models."""
    headings = ["Models", "Bits", "fp32", *map(heading, results.compensations)]
    headings += [f"Latency of {label(SUBJECT)} ÷ PTQ, {name}" for name in ENGINES.values()]
    lines = [headings, ["---", "---", *["---:"] * (len(headings) - 2)]]
    for task, metric in HEADLINE.items():
        own = results.of_task(task)
        precisions = dict.fromkeys(row.precision for row in own.rows if row.precision != "fp32")
        for precision in sorted(precisions, key=precision_order):
            lines.append(_means_line(own, task, metric, precision, results.compensations))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _means_line(results: Results, task: str, metric: str, precision: str, compensations: list[str]) -> list[str]:
    models = [model for model in results.models if precision in results.precisions(model)]
    plain = {model: _plain(results, model, precision) for model in models}

    def mean(compensation: str, engine: str, metric: str, form: str) -> str:
        methods = {model: f"{ptq}+{compensation}" if compensation else ptq for model, ptq in plain.items()}
        rows = [results.get(model, precision, method, engine, metric) for model, method in methods.items()]
        return form.format(sum(row.value for row in rows if row) / len(rows)) if all(rows) else _MISSING

    exact = [row.value for model in models if (row := results.get(model, "fp32", "fp32", "torch", metric))]
    return [
        f"{len(models)} in {task}: {METRICS[metric].heading.removesuffix(' %')}", precision.upper(),
        f"{sum(exact) / len(exact):.1f}" if exact else _MISSING,
        *(mean(name, "torch", metric, "{:.1f}") for name in compensations),
        *(mean(SUBJECT, engine, "latency_ratio_to_ptq", "{:.2f}") for engine in ENGINES),
    ]  # fmt: skip


def _plain(results: Results, model: str, precision: str) -> str:
    """Return the model's PTQ method that engines run, without compensation."""
    return next(method for method in results.methods(model, precision) if Method.parse(method).is_plain)


def table(results: Results) -> str:
    """Return Markdown: a row per model, precision and default PTQ, with top-1 in percent (mean ± deviation)."""
    headings = ["Model", "Bits", "fp32", *map(heading, results.compensations)]
    headings += [f"{label(SUBJECT)} on {name}" for name in ENGINES.values()]
    headings += [f"Latency ÷ PTQ, {name}" for name in ENGINES.values()]
    lines = [headings, ["---", "---", *["---:"] * (len(headings) - 2)]]
    for model in results.models:
        for precision in results.precisions(model):
            for ptq in results.methods(model, precision):
                if Method.parse(ptq).is_plain:
                    lines.append(_line(results, model, precision, ptq))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _line(results: Results, model: str, precision: str, ptq: str) -> list[str]:
    names = [f"{ptq}+{name}" if name else ptq for name in results.compensations]
    top1 = [results.get(model, precision, name, "torch", "top1") for name in names]
    folded = [results.get(model, precision, f"{ptq}+{SUBJECT}", engine, "top1") for engine in ENGINES]
    ratios = [results.get(model, precision, f"{ptq}+{SUBJECT}", engine, "latency_ratio_to_ptq") for engine in ENGINES]
    return [
        *(f"{model} ({ptq})", precision.upper(), _percent(results.fp32_top1(model))),
        *(_percent(row) for row in (*top1, *folded)),
        *(f"{row.value:.2f}" if row else _MISSING for row in ratios),
    ]


def detection_table(results: Results) -> str:
    """Return Markdown: a row per detector, precision and default PTQ, with box AP / mask AP in percent (means)."""
    headings = ["Model", "Bits", "fp32", *map(heading, results.compensations), f"{label(SUBJECT)} recovers"]
    headings += [f"{label(SUBJECT)} on {name} − simulation" for name in ENGINES.values()]
    headings += [f"Latency ÷ PTQ, {name}" for name in ENGINES.values()]
    table = [headings, ["---", "---", *["---:"] * (len(headings) - 2)]]
    for line in lines(results):
        cells = [_both(line.fp32["bbox_ap"], line.fp32["segm_ap"])]
        cells += [_both(line.box.get(name), line.mask.get(name)) for name in results.compensations]
        cells.append(f"{line.recovered(SUBJECT):.0%}" if SUBJECT in line.box and line.loss >= 1 else _MISSING)
        for metric, form in (("engine_bbox_ap_delta", "{:+.1f}"), ("latency_ratio_to_ptq", "{:.2f}")):
            found = [
                results.get(line.model, line.precision, f"{line.ptq}+{SUBJECT}", engine, metric) for engine in ENGINES
            ]
            cells += [form.format(row.value) if row else _MISSING for row in found]
        table.append([f"{line.model} ({line.ptq})", line.precision.upper(), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def _both(box: Row | None, mask: Row | None) -> str:
    return " / ".join(_MISSING if row is None else f"{row.value:.1f}" for row in (box, mask))


def _percent(row: Row | None) -> str:
    if row is None:
        return _MISSING
    return f"{row.value:.1f} ± {row.std:.1f}" if row.std is not None and row.n > 1 else f"{row.value:.1f}"


def main() -> None:
    """Rewrite every table."""
    update_means(Path("README.md"), RESULTS / "summary.csv")
    update_static_page(Path("docs/report.md"), RESULTS / "summary.csv")
    page = Path("docs/results.md")
    update(page, RESULTS / "summary.csv")
    update_detection(page, RESULTS / "summary.csv")
    update_peers(page, RESULTS / "benchmarks")
    update_costs(page, RESULTS / "benchmarks")
    update_zoo(page, RESULTS / "benchmarks")
    replace_between(Path("docs/published.md"), PUBLISHED_BEGIN, PUBLISHED_END, literature())
    update_real(page, RESULTS / "benchmarks")


if __name__ == "__main__":
    guarded(main)
