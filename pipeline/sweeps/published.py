"""Figures that papers and tools have published (``published.csv``, each with its source), beside figures of ours."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from pipeline.common.folders import RESULTS
from pipeline.sweeps.groups import FP32, Group, groups
from qwt2.io import write_csv

TABLE = Path(__file__).with_name("published.csv")
OURS = "published-{}.csv"  # in results/, by dataset: what docs/published.md shows beside the published figures
TOLERANCE = 0.5  # points by which a figure of ours may differ from the published one
ACCURACIES = ("top1", "bbox_ap", "segm_ap")


class Published(NamedTuple):
    """One published figure.

    Attributes:
        task, dataset, model: what was measured; the model as its source calls it.
        config: the model's name in conf/model, or empty if there is none.
        precision, method, metric: the method as the source's table calls it, with variants in parentheses.
        fp32: accuracy of the full-precision network in the same source, in percent.
        value: in percent, or in ms for ``latency_ms``.
        source: where it was published.
    """

    task: str
    dataset: str
    model: str
    config: str
    precision: str
    method: str
    metric: str
    fp32: float
    value: float
    source: str

    @property
    def is_accuracy(self) -> bool:
        """Whether this is an accuracy; others are latencies on their authors' machines, which ours cannot repeat."""
        return self.metric in ACCURACIES


class Pair(NamedTuple):
    """A published figure beside ours; ``None`` where there is none.

    Attributes:
        dataset, config, precision, metric: what both are of.
        method: the published method, or ours where nothing was published.
        source: where it was published.
        fp32, own_fp32: accuracy of the full-precision networks, in percent.
        value, own: the figures, in percent.
    """

    dataset: str
    config: str
    precision: str
    metric: str
    method: str
    source: str
    fp32: float | None
    own_fp32: float | None
    value: float | None
    own: float | None

    @property
    def difference(self) -> float | None:
        """Ours minus the published figure, in points."""
        return None if self.value is None or self.own is None else self.own - self.value

    @property
    def differs(self) -> bool:
        """Whether the two differ by more than :data:`TOLERANCE`."""
        return self.difference is not None and abs(self.difference) > TOLERANCE


def read_published() -> list[Published]:
    """Read all published figures, in the order of their sources."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return [
            Published(**record | {key: float(record[key]) for key in ("fp32", "value")})
            for record in csv.DictReader(file)
        ]


def own_methods(method: str) -> list[str]:
    """Return the names under which ours may have a published method: under the papers' settings, then under ours."""
    ptq, plus, compensation = re.sub(r" \(.*\)", "", method).partition("+")
    return [f"{ptq}_published{plus}{compensation}", f"{ptq}{plus}{compensation}"]


def pairs(group: Group) -> list[Pair]:
    """Return every published accuracy of a group's model and precision beside ours, then ours that nobody published."""
    cell = group.model, group.precision
    published = [row for row in read_published() if row.is_accuracy and (row.config, row.precision) == cell]
    compared = {FP32, *(name for row in published for name in own_methods(row.method))}
    dataset = published[0].dataset if published else ""
    only_ours = [
        Pair(dataset, *cell, metric, method, "", None, group.get(FP32, f"torch/{metric}"), None, own)
        for method in group.methods
        if method not in compared
        for metric in ACCURACIES
        if (own := group.get(method, f"torch/{metric}")) is not None
    ]
    return [_pair(row, group) for row in published] + only_ours


def _pair(row: Published, group: Group) -> Pair:
    figure = f"torch/{row.metric}"
    found = [own for name in own_methods(row.method) if (own := group.get(name, figure)) is not None]
    return Pair(
        row.dataset, row.config, row.precision, row.metric, row.method, row.source, row.fp32, group.get(FP32, figure),
        row.value, found[0] if found else None,
    )  # fmt: skip


def comparison(sweep: str) -> str:
    """Return the figures of a sweep beside the published ones as text, and store them for the documentation."""
    found = [pair for group in groups(sweep) for pair in pairs(group)]
    for dataset in {pair.dataset for pair in found if pair.dataset and pair.own is not None}:
        own = [pair._asdict() for pair in found if pair.dataset == dataset]
        write_csv(RESULTS / OURS.format(dataset), own, Pair._fields)
    return f"{_text(found)}\n\n{verdict(found)}"


def verdict(found: Iterable[Pair]) -> str:
    """Say how many figures agree with the published ones, and which could not be compared."""
    published = [pair for pair in found if pair.value is not None]
    compared = [pair for pair in published if pair.own is not None]
    differing = [pair for pair in compared if pair.differs]
    texts = [f"{len(compared)} of {len(published)} published figures have one of ours beside them."]
    if compared:
        texts.append(f"{len(differing)} of these differ by more than {TOLERANCE} points (marked !).")
    missing = sorted({f"{pair.config} {pair.precision}" for pair in published if pair.own_fp32 is None})
    if missing:
        texts.append(f"Not run, for want of data or weights: {', '.join(missing)}.")
    return " ".join(texts)


def _text(found: Iterable[Pair]) -> str:
    headings = ["model", "bits", "metric", "method", "fp32", "our fp32", "published", "ours", "difference", "source"]
    lines = [
        [
            pair.config, pair.precision.upper(), pair.metric, pair.method, *map(shown, pair[6:10]),
            "" if pair.difference is None else f"{pair.difference:+.2f}{' !' if pair.differs else ''}", pair.source,
        ]
        for pair in found
    ]  # fmt: skip
    return tabulate(lines, headings, disable_numparse=True)


def shown(value: float | None) -> str:
    """Format an accuracy; a dash if there is none."""
    return "–" if value is None else f"{value:.2f}"


def stored() -> dict[tuple[str, str, str, str, str], float]:
    """Return ours of the last comparisons: (config, precision, metric, method, source) -> percent."""
    found = {}
    for path in sorted(RESULTS.glob(OURS.format("*"))):
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["own"]]
        found |= {(r["config"], r["precision"], r["metric"], r["method"], r["source"]): float(r["own"]) for r in rows}
    return found
