"""Markdown of the grid's figures: means over models, classifiers and detectors."""

from pipeline.comparison.markdown import MISSING, table
from qwt2.report.compensations import SUBJECT, heading, label
from qwt2.report.detection import lines
from qwt2.report.findings import ENGINES
from qwt2.report.metrics import HEADLINE, METRICS
from qwt2.report.results import Method, Results, Row, precision_order


def means_table(results: Results) -> str:
    """Return Markdown: a row per task and precision with the main figure in percent, as mean over the task's models."""
    headings = ["Models", "Bits", "fp32", *map(heading, results.compensations)]
    headings += [f"Latency of {label(SUBJECT)} ÷ PTQ, {name}" for name in ENGINES.values()]
    found = []
    for task, metric in HEADLINE.items():
        own = results.of_task(task)
        precisions = dict.fromkeys(row.precision for row in own.rows if row.precision != "fp32")
        for precision in sorted(precisions, key=precision_order):
            found.append(_means_line(own, task, metric, precision, results.compensations))
    return table(headings, found, words=("Models", "Bits"))


def _means_line(results: Results, task: str, metric: str, precision: str, compensations: list[str]) -> list[str]:
    models = [model for model in results.models if precision in results.precisions(model)]
    plain = {model: _plain(results, model, precision) for model in models}

    def mean(compensation: str, engine: str, metric: str, form: str) -> str:
        methods = {model: f"{ptq}+{compensation}" if compensation else ptq for model, ptq in plain.items()}
        rows = [results.get(model, precision, method, engine, metric) for model, method in methods.items()]
        return form.format(sum(row.value for row in rows if row) / len(rows)) if all(rows) else MISSING

    exact = [row.value for model in models if (row := results.get(model, "fp32", "fp32", "torch", metric))]
    return [
        f"{len(models)} in {task}: {METRICS[metric].heading.removesuffix(' %')}", precision.upper(),
        f"{sum(exact) / len(exact):.1f}" if exact else MISSING,
        *(mean(name, "torch", metric, "{:.1f}") for name in compensations),
        *(mean(SUBJECT, engine, "latency_ratio_to_ptq", "{:.2f}") for engine in ENGINES),
    ]  # fmt: skip


def _plain(results: Results, model: str, precision: str) -> str:
    """Return the model's PTQ method that engines run, without compensation."""
    return next(method for method in results.methods(model, precision) if Method.parse(method).is_plain)


def classifiers_table(results: Results) -> str:
    """Return Markdown: a row per model, precision and default PTQ, with top-1 in percent (mean ± deviation)."""
    headings = ["Model", "Bits", "fp32", *map(heading, results.compensations)]
    headings += [f"{label(SUBJECT)} on {name}" for name in ENGINES.values()]
    headings += [f"Latency ÷ PTQ, {name}" for name in ENGINES.values()]
    found = [
        _line(results, model, precision, ptq)
        for model in results.models
        for precision in results.precisions(model)
        for ptq in results.methods(model, precision)
        if Method.parse(ptq).is_plain
    ]
    return table(headings, found, words=("Model", "Bits"))


def _line(results: Results, model: str, precision: str, ptq: str) -> list[str]:
    names = [f"{ptq}+{name}" if name else ptq for name in results.compensations]
    top1 = [results.get(model, precision, name, "torch", "top1") for name in names]
    folded = [results.get(model, precision, f"{ptq}+{SUBJECT}", engine, "top1") for engine in ENGINES]
    ratios = [results.get(model, precision, f"{ptq}+{SUBJECT}", engine, "latency_ratio_to_ptq") for engine in ENGINES]
    return [
        *(f"{model} ({ptq})", precision.upper(), _percent(results.fp32_top1(model))),
        *(_percent(row) for row in (*top1, *folded)),
        *(f"{row.value:.2f}" if row else MISSING for row in ratios),
    ]


def detectors_table(results: Results) -> str:
    """Return Markdown: a row per detector, precision and default PTQ, with box AP / mask AP in percent (means)."""
    headings = ["Model", "Bits", "fp32", *map(heading, results.compensations), f"{label(SUBJECT)} recovers"]
    headings += [f"{label(SUBJECT)} on {name} − simulation" for name in ENGINES.values()]
    headings += [f"Latency ÷ PTQ, {name}" for name in ENGINES.values()]
    rows = []
    for line in lines(results):
        cells = [_both(line.fp32["bbox_ap"], line.fp32["segm_ap"])]
        cells += [_both(line.box.get(name), line.mask.get(name)) for name in results.compensations]
        cells.append(f"{line.recovered(SUBJECT):.0%}" if SUBJECT in line.box and line.loss >= 1 else MISSING)
        for metric, form in (("engine_bbox_ap_delta", "{:+.1f}"), ("latency_ratio_to_ptq", "{:.2f}")):
            found = [
                results.get(line.model, line.precision, f"{line.ptq}+{SUBJECT}", engine, metric) for engine in ENGINES
            ]
            cells += [form.format(row.value) if row else MISSING for row in found]
        rows.append([f"{line.model} ({line.ptq})", line.precision.upper(), *cells])
    return table(headings, rows, words=("Model", "Bits"))


def _both(box: Row | None, mask: Row | None) -> str:
    return " / ".join(MISSING if row is None else f"{row.value:.1f}" for row in (box, mask))


def _percent(row: Row | None) -> str:
    if row is None:
        return MISSING
    return f"{row.value:.1f} ± {row.std:.1f}" if row.std is not None and row.n > 1 else f"{row.value:.1f}"
