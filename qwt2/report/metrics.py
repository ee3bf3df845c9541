"""All metrics with their units and display. A new metric needs one entry here and its computation in a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Metric(NamedTuple):
    """Unit and display of a metric.

    Attributes:
        unit: the only unit in which results may give the metric.
        heading: heading of the metric's column.
        explanation: definition of the metric, in half a sentence.
        shown: formats a value for display.
        hidden: where the column is hidden by default: "", "simulation", "engines" or "everywhere".
        simulated: heading and explanation of the simulation's column, if the metric has another meaning there.
    """

    unit: str
    heading: str
    explanation: str
    shown: Callable[[float], str]
    hidden: str = ""
    simulated: tuple[str, str] | None = None

    def texts(self, simulation: bool) -> tuple[str, str]:
        """Return heading and explanation of the column of the simulation or of an engine."""
        return self.simulated if simulation and self.simulated else (self.heading, self.explanation)

    def is_secondary(self, simulation: bool) -> bool:
        """Return whether the column of the simulation or of an engine is hidden by default."""
        return self.hidden in ("everywhere", "simulation" if simulation else "engines")


def signed(value: float) -> str:
    """Format a number with its sign and two decimals."""
    return f"{round(value, 2) + 0.0:+.2f}"  # + 0.0: no negative zero


def _significant(value: float) -> str:
    """Format a number with three significant digits, or as a whole number from 100 up."""
    return f"{value:#.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _compact(value: float) -> str:
    """Format a count with three digits: 640, 55.9 k, 3.58 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


_PERCENT = "{:.2f}".format

# The metrics in the order of the tables' columns.
METRICS: dict[str, Metric] = {
    "top1": Metric("percent", "top-1 %", "share of validation images classified correctly", _PERCENT),
    "top5": Metric(
        "percent", "top-5 %", "share of validation images whose class is among the five best", _PERCENT, "everywhere"
    ),
    "recall1": Metric("percent", "recall@1 %", "share of queries whose nearest document is their own", _PERCENT),
    "bbox_ap": Metric("percent", "box AP", "COCO average precision of boxes", _PERCENT),
    "bbox_ap50": Metric(
        "percent", "box AP50", "average precision of boxes at an overlap of one half", _PERCENT, "everywhere"
    ),
    "segm_ap": Metric("percent", "mask AP", "COCO average precision of masks", _PERCENT),
    "agreement": Metric(
        "percent",
        "agree %",
        "share of validation images on which the network and its fp32 original agree",
        _PERCENT,
        "engines",
    ),
    "cosine": Metric("ratio", "cosine", "mean cosine between a text's vector and that of fp32", "{:.4f}".format),
    "logits_sqnr_db": Metric(
        "dB", "SQNR dB", "signal to quantization noise ratio of the logits, against fp32", "{:.1f}".format, "engines"
    ),
    "engine_top1_delta": Metric("points", "Δ sim", "top-1 of the engine minus top-1 of the simulation, points", signed),
    "engine_recall1_delta": Metric(
        "points", "Δ sim", "recall@1 of the engine minus recall@1 of the simulation, points", signed
    ),
    "engine_bbox_ap_delta": Metric(
        "points", "Δ sim", "box AP of the engine minus box AP of the simulation, points", signed
    ),
    "engine_segm_ap_delta": Metric(
        "points", "Δ sim mask", "mask AP of the engine minus mask AP of the simulation, points", signed, "everywhere"
    ),
    "engine_mismatch_steps": Metric(
        "steps",
        "steps",
        "largest difference from the simulation, in output quantization steps",
        "{:.3g}".format,
        "simulation",
        ("fold steps", "largest difference of a folded module from the unfolded, in output steps"),
    ),
    "engine_mismatch_fraction": Metric(
        "ratio",
        "differs",
        "share of output elements that differ from the simulation",
        "{:.2g}".format,
        "everywhere",
        ("fold differs", "share of a folded module's outputs that differ from the unfolded"),
    ),
    "latency_ms": Metric("ms", "ms", "latency of one batch, median", _significant),
    "latency_ratio_to_ptq": Metric(
        "ratio", "× PTQ", "latency relative to plain PTQ, measured interleaved", "{:.3f}".format
    ),
    "latency_cpu_ms": Metric("ms", "CPU ms", "processor time of one batch, median", _significant, "everywhere"),
    "file_bytes": Metric(
        "bytes",
        "file kB",
        "size of the ONNX file that all engines run, in 1000 bytes",
        lambda value: f"{value / 1000:,.1f}",
    ),
    "extra_params": Metric("count", "+ params", "parameters the compensation adds to the deployed network", _compact),
    "extra_macs": Metric("count", "+ MACs", "multiply-accumulates the compensation adds for one image", _compact),
    "added_modules": Metric(
        "count", "+ modules", "modules that stay in the deployed network and add latency", _compact, "everywhere"
    ),
    "quantize_seconds": Metric("s", "PTQ s", "time to quantize without compensation", "{:.1f}".format, "everywhere"),
    "compensate_seconds": Metric("s", "fit s", "time to fit the compensation", "{:.1f}".format),
    "peak_memory_mb": Metric(
        "MB", "peak MB", "peak memory while fitting the compensation", "{:,.0f}".format, "everywhere"
    ),
}

# Task -> metrics that every baseline must have. The first is the task's headline metric.
ACCURACY = {
    "classification": ("top1", "top5"),
    "detection": ("bbox_ap", "bbox_ap50"),
    "retrieval": ("recall1",),
}
HEADLINE = {task: names[0] for task, names in ACCURACY.items()}
# Task -> points of its headline metric; where plain PTQ loses at least as many, compensation must help.
HARD_LOSS = {"classification": 3.0, "detection": 5.0, "retrieval": 3.0}
