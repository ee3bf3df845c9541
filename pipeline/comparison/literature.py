"""Markdown of all published figures beside ours, for docs/published.md."""

from collections import defaultdict
from itertools import groupby

from pipeline.comparison.markdown import table
from pipeline.sweeps.published import Published, read_published, shown, stored
from qwt2.report.results import precision_order

METRICS = {"top1": "Top-1, %", "bbox_ap": "box AP", "segm_ap": "mask AP", "latency_ms": "ms"}
NOTHING = (
    "No row has a figure of ours beside it yet: neither the data (ImageNet, COCO) nor the checkpoints could be had "
    "where this project was built."
)


def literature() -> str:
    """Return a section per dataset, with a row per model, bits, method and source."""
    rows, ours = read_published(), stored()
    parts = [NOTHING if not ours else f"{len(ours)} of {len(rows)} published figures have one of ours beside them."]
    accuracies = [row for row in rows if row.is_accuracy]
    for dataset in dict.fromkeys(row.dataset for row in accuracies):
        of_dataset = [row for row in accuracies if row.dataset == dataset]
        parts += [f"## {dataset}", _table(of_dataset, ours)]
    latencies = [row for row in rows if not row.is_accuracy]
    return "\n\n".join([*parts, "## Latency, on their authors' machines", _table(latencies, {})])


def _table(rows: list[Published], ours: dict) -> str:
    names = [METRICS[metric] for metric in dict.fromkeys(row.metric for row in rows)]
    kind = " / ".join(names)
    headings = ["Model", "Bits", "Method", "fp32", f"Published, {kind}", "Ours", "Source"]
    lines = []
    ordered = sorted(rows, key=_cell)
    for _, same in groupby(ordered, key=_cell):
        lines += _lines(list(same), ours)
    return table(headings, lines, words=("Model", "Bits", "Method", "Source"))


def _cell(row: Published) -> tuple:
    return row.config or row.model, precision_order(row.precision)


def _lines(rows: list[Published], ours: dict) -> list[list[str]]:
    """Return the lines of one model and precision, from the lowest figure to the highest."""
    entries: dict[tuple, list[Published]] = defaultdict(list)
    for row in rows:
        entries[row.model, row.method, row.source].append(row)
    return [
        [
            model, found[0].precision.upper(), method, " / ".join(f"{row.fp32:g}" for row in found),
            " / ".join(f"{row.value:g}" for row in found), " / ".join(_own(row, ours) for row in found), source,
        ]
        for (model, method, source), found in sorted(entries.items(), key=lambda entry: entry[1][0].value)
    ]  # fmt: skip


def _own(row: Published, ours: dict) -> str:
    return shown(ours.get((row.config, row.precision, row.metric, row.method, row.source)))
