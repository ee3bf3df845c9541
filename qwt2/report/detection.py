"""Findings from the figures of detectors: average precision side by side, and the targets."""

from collections.abc import Iterator
from typing import NamedTuple

from qwt2.report import metrics
from qwt2.report.compensations import SUBJECT, label
from qwt2.report.findings import LATENCY_RATIO, Target, target
from qwt2.report.results import Method, Results, Row

FP32_AP = {"bbox_ap": 60.0, "segm_ap": 50.0}  # percent that a default detector must reach before it is quantized
HARD_LOSS = metrics.HARD_LOSS["detection"]
RECOVERED = 1 / 3  # share of that loss that compensation must recover
ENGINE_DELTA = 0.3  # points of box AP by which an engine may differ from the simulation


class Line(NamedTuple):
    """AP of one detector in the simulation, in percent, at one precision.

    Attributes:
        model: name of the detector.
        precision: name of the precision.
        ptq: name of the PTQ method.
        fp32: the float detector's figures by metric.
        box: box AP by compensation; the empty name is plain PTQ.
        mask: mask AP by compensation; ``None`` where it was not measured.
    """

    model: str
    precision: str
    ptq: str
    fp32: dict[str, Row | None]
    box: dict[str, Row]
    mask: dict[str, Row | None]

    @property
    def loss(self) -> float:
        """The points of box AP that plain PTQ loses against fp32."""
        fp32 = self.fp32["bbox_ap"]
        assert fp32 is not None  # ``lines`` makes no line without it
        return fp32.value - self.box[""].value

    def recovered(self, compensation: str) -> float | None:
        """Return the share of the loss that a compensation recovers; ``None`` if there is no loss."""
        return (self.box[compensation].value - self.box[""].value) / self.loss if self.loss > 0 else None


def lines(results: Results) -> list[Line]:
    """Return a line per detector, precision and PTQ method, from many bits to few."""
    cells = [(model, precision) for model in results.models for precision in results.precisions(model)]
    return [line for cell in cells for line in _lines(results, *cell)]


def _lines(results: Results, model: str, precision: str) -> Iterator[Line]:
    fp32 = {metric: results.get(model, "fp32", "fp32", "torch", metric) for metric in FP32_AP}
    methods = results.methods(model, precision)
    for ptq in (name for name in methods if Method.parse(name).is_plain):
        known = {Method.parse(name).compensation: name for name in methods if Method.parse(name).ptq == ptq}
        boxes = {c: results.get(model, precision, name, "torch", "bbox_ap") for c, name in known.items()}
        masks = {c: results.get(model, precision, name, "torch", "segm_ap") for c, name in known.items()}
        rows = {compensation: row for compensation, row in boxes.items() if row is not None}
        if fp32["bbox_ap"] and len(rows) == len(boxes):
            yield Line(model, precision, ptq, fp32, rows, masks)


def targets(results: Results) -> list[Target]:
    """Return the targets of the default detectors, each with the figures that miss it."""
    found = lines(results)
    hard = [line for line in found if line.loss >= HARD_LOSS and SUBJECT in line.box]
    hard_models = {line.model for line in hard}
    baselines = [row for row in results.rows if row.precision == "fp32" and row.metric in FP32_AP]
    deltas = [row for row in results.rows if row.metric == "engine_bbox_ap_delta"]
    low, high = LATENCY_RATIO
    ratios = [
        row for row in results.rows
        if row.metric == "latency_ratio_to_ptq" and Method.parse(row.method).compensation == SUBJECT
    ]  # fmt: skip
    return [
        target(
            f"Every detector reaches box AP {FP32_AP['bbox_ap']:.0f} and mask AP {FP32_AP['segm_ap']:.0f} "
            "before quantization",
            baselines,
            lambda row: row.value >= FP32_AP[row.metric],
            lambda row: f"{row.model} {row.metric} {row.value:.1f}",
        ),
        target(
            f"At one precision at least, plain PTQ loses {HARD_LOSS:.0f} points of box AP or more on every detector",
            results.models,
            lambda model: model in hard_models,
            str,
        ),
        target(
            f"{label(SUBJECT)} recovers a third of the loss or more there",
            hard,
            lambda line: line.recovered(SUBJECT) >= RECOVERED,
            lambda line: f"{line.model}-{line.precision} {line.recovered(SUBJECT):.0%}",
        ),
        target(
            f"Engine box AP is within {ENGINE_DELTA} points of the simulation",
            deltas,
            lambda row: abs(row.value) <= ENGINE_DELTA + 1e-9,
            lambda row: f"{row.model}-{row.precision} {row.method} on {row.engine} {row.value:+.2f}",
        ),
        target(
            f"Latency of the folded dense part over plain PTQ's is {low}-{high}",
            ratios,
            lambda row: low <= row.value <= high,
            lambda row: f"{row.model}-{row.precision} on {row.engine} {row.value:.3f}",
        ),
    ]
