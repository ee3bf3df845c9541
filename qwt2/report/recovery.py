"""Share of plain PTQ's loss that each method recovers, and its cost, with paired intervals over images and seeds.

A method is free if it leaves no module of its own in the deployed network. QwT, for example, leaves a layer beside each
block, which takes time in every engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qwt2.extras import extra
from qwt2.report.compensations import FREE, REFERENCES, heading, label
from qwt2.report.metrics import HARD_LOSS, HEADLINE, METRICS
from qwt2.report.results import Method, Results

with extra("report"):
    from scipy.stats import bootstrap, ttest_1samp

PUBLISHED = "published"  # the group of PTQ methods that follow a paper's own code
CONFIDENCE = 0.95
_RESAMPLES = 1000


@dataclass(frozen=True)
class Measured:
    """One method at one model and precision.

    Attributes:
        task, model, precision: what was measured.
        group: methods are compared with plain PTQ and with QwT of the same group, such as one number of calibration
            images; empty for most.
        name: the method as shown.
        compensation: name of the compensation; empty for plain PTQ.
        scores: calibration seed -> each image's part in the task's main figure in percent, (images,).
        seconds: seconds of calibration: those of PTQ and of the compensation.
        free: whether the method adds nothing to the deployed network.
    """

    task: str
    model: str
    precision: str
    group: str
    name: str
    compensation: str
    scores: Mapping[int, np.ndarray]
    seconds: float
    free: bool

    @property
    def cell(self) -> tuple[str, str, str]:
        """Model, precision and group, which are equal in methods that are compared."""
        return self.model, self.precision, self.group

    @property
    def mean(self) -> float:
        """The main figure in percent, as mean over the calibration seeds."""
        return float(np.mean([values.mean() for values in self.scores.values()]))


class Interval(NamedTuple):
    """A mean difference in points, with its interval; ``None`` where one seed and no images leave nothing to vary."""

    mean: float
    low: float | None
    high: float | None

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" if self.low is None else f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


class Line(NamedTuple):
    """One method beside plain PTQ and QwT.

    Attributes:
        measured: the method.
        loss: points that plain PTQ loses against full precision.
        gain: points over plain PTQ; ``None`` for plain PTQ itself.
        against: points over each of the methods :data:`REFERENCES`, as far as these were measured; for free methods.
    """

    measured: Measured
    loss: float
    gain: Interval | None
    against: dict[str, Interval]

    @property
    def is_hard(self) -> bool:
        """Whether plain PTQ loses so much that compensation must help."""
        return self.loss >= HARD_LOSS[self.measured.task]

    @property
    def recovered(self) -> float | None:
        """The recovered share of plain PTQ's loss; ``None`` if that loss is too small to divide by."""
        return self.gain.mean / self.loss if self.gain and self.is_hard else None

    @property
    def place(self) -> str:
        """The name of the cell, such as ``vit_micro-w4a4``."""
        return f"{self.measured.model}-{self.measured.precision}"


def lines(measured: Iterable[Measured], fp32: Mapping[str, float]) -> list[Line]:
    """Compare every method with plain PTQ and with QwT of the same cell; if there are several, with the first.

    Args:
        measured: the methods; those of cells without plain PTQ are left out.
        fp32: model -> the main figure of the full-precision network, in percent.
    """
    measured = list(measured)
    first: dict[tuple, Measured] = {}
    for item in measured:
        first.setdefault((*item.cell, item.compensation), item)
    return [
        _line(item, first[(*item.cell, "")], first, fp32[item.model])
        for item in measured
        if (*item.cell, "") in first
    ]  # fmt: skip


def _line(item: Measured, plain: Measured, first: Mapping[tuple, Measured], fp32: float) -> Line:
    others = {name: first[(*item.cell, name)] for name in REFERENCES if (*item.cell, name) in first}
    against = {name: difference(item, other) for name, other in others.items() if item.free and item is not plain}
    return Line(item, fp32 - plain.mean, None if item is plain else difference(item, plain), against)


def difference(item: Measured, other: Measured) -> Interval:
    """Return the points by which a method is ahead of another, over the seeds that both have."""
    seeds = sorted(item.scores.keys() & other.scores.keys())
    return interval(np.stack([np.subtract(item.scores[seed], other.scores[seed], dtype=np.float64) for seed in seeds]))


def interval(differences: np.ndarray) -> Interval:
    """Return the mean of paired differences with its interval.

    Images and seeds are drawn independently of each other, because all seeds share the images (a crossed design). Every
    drawn image and seed brings the difference that was measured on it, so both methods stay paired. If a figure is no
    mean over images, only a few seeds vary. A bootstrap over so few is too narrow, so Student's interval is used.

    Args:
        differences: (seeds, images); a dimension of length 1 is not resampled.
    """
    mean = float(differences.mean())
    if differences.size == 1:
        return Interval(mean, None, None)
    if differences.shape[1] == 1:
        found = (
            ttest_1samp(differences[:, 0], 0).confidence_interval(CONFIDENCE) if np.ptp(differences) else (mean, mean)
        )
    else:
        found = _bootstrapped(differences)
    return Interval(mean, *map(float, found))


def _bootstrapped(differences: np.ndarray) -> tuple[float, float]:
    """Return the percentile interval of the mean of (seeds, images) over both."""
    drawn = [np.arange(count) for count in differences.shape if count > 1]

    def mean(*chosen: np.ndarray, axis: int = -1) -> np.ndarray:
        seeds = chosen[0] if len(chosen) > 1 else np.zeros_like(chosen[-1][..., :1])
        return differences[seeds[..., :, None], chosen[-1][..., None, :]].mean((-2, -1))

    found = bootstrap(
        drawn, mean, n_resamples=_RESAMPLES, batch=50, vectorized=True, confidence_level=CONFIDENCE,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return found.low, found.high


def of_grid(results: Results, scores: Mapping[tuple[str, str], Mapping[str, np.ndarray]]) -> list[Measured]:
    """Return the methods of the grid's cells; those on PTQ methods of published code are a group of their own.

    Args:
        results: the figures.
        scores: (model, precision) -> method -> scores, (seeds, images).
    """
    return [
        _of_cell(results, model, precision, method, scores[model, precision][method])
        for model, precision in scores
        for method in results.methods(model, precision)
        if method in scores[model, precision]
    ]


def _of_cell(results: Results, model: str, precision: str, method: str, scores: np.ndarray) -> Measured:
    def figure(name: str, metric: str) -> float:
        row = results.get(model, precision, name, "torch", metric)
        return row.value if row else 0.0

    parts = Method.parse(method)
    task = next(row.task for row in results.rows if row.model == model)
    seconds = figure(parts.ptq, "quantize_seconds") + figure(method, "compensate_seconds")
    return Measured(
        task, model, precision, PUBLISHED if parts.is_published else "", heading(parts.compensation),
        parts.compensation, dict(enumerate(scores)), seconds, free=figure(method, "added_modules") == 0,
    )  # fmt: skip


def headline(found: Sequence[Line]) -> list[str]:
    """Return a sentence on how the free methods stand against QwT, cell by cell; none if they were not compared."""
    compared = [line for line in found if line.against and line.measured.group != PUBLISHED]
    methods = [[line for line in compared if line.measured.compensation == free] for free in FREE]
    easy = [line for own in methods for line in own if not line.is_hard]
    parts = [text for own in methods if (text := _standing([line for line in own if line.is_hard]))]
    parts += [_elsewhere(easy)] if easy else []
    if not parts:
        return []
    return [
        f"At no cost in the engine, where plain PTQ loses {hard_loss(found)} or more, {'; '.join(parts)} "
        f"(* marks {CONFIDENCE:.0%} intervals without 0)."
    ]


def hard_loss(found: Iterable[Line]) -> str:
    """Return the losses from which on compensation must help: "3 points of top-1 or 5 points of box AP"."""
    tasks = {line.measured.task for line in found}
    names = {task: METRICS[HEADLINE[task]].heading.removesuffix(" %") for task in HARD_LOSS if task in tasks}
    return " or ".join(f"{HARD_LOSS[task]:.0f} points of {name}" for task, name in names.items())


def _standing(found: list[Line]) -> str:
    """Return in how many of one method's cells it is ahead of each reference, with its points in every cell."""
    parts = []
    for other in REFERENCES:
        pairs = [(line, line.against[other]) for line in found if other in line.against]
        ahead = sum(points.mean > 0 for _, points in pairs)
        cells = ", ".join(_signed(line, points) for line, points in pairs)
        parts += [f"of {label(other)} in {ahead} of {len(pairs)} cells ({cells})"] if pairs else []
    return f"{label(found[0].measured.compensation)} is ahead {' and '.join(parts)}" if parts else ""


def _elsewhere(found: list[Line]) -> str:
    """Return in how many comparisons free methods are behind a reference, and which of these are significant."""
    pairs = [(line, other, points) for line in found for other, points in line.against.items()]
    behind = [pair for pair in pairs if pair[2].mean < 0]
    sure = [
        f"{label(line.measured.compensation)} of {label(other)} {_signed(line, points)}"
        for line, other, points in behind
        if points.is_significant
    ]
    where = f", significantly in {', '.join(sure) or 'none'}" if behind else ""
    return f"elsewhere they are behind in {len(behind)} of {len(pairs)} comparisons{where}"


def _signed(line: Line, points: Interval) -> str:
    return f"{line.place} {points.mean:+.1f}{'*' if points.is_significant else ''}"


def significance(found: Iterable[Line]) -> str:
    """Return a sentence on how many differences are significant, and how many would be by chance."""
    differences = [item for line in found for item in (line.gain, *line.against.values())]
    intervals = [item for item in differences if item is not None and item.low is not None]
    significant = sum(item.is_significant for item in intervals)
    return (
        f"{significant} of {len(intervals)} differences are significant: their {CONFIDENCE:.0%} interval excludes 0. "
        f"If nothing differed, about {len(intervals) * (1 - CONFIDENCE):.0f} would be."
    )


def not_helpful(found: Iterable[Line]) -> list[str]:
    """Return one text per method and cell that was tried and is not significantly above plain PTQ."""
    return [
        f"{line.place}{f' ({line.measured.group})' if line.measured.group else ''}, {line.measured.name}: {line.gain}"
        for line in found
        if line.gain and not (line.gain.is_significant and line.gain.mean > 0)
    ]


def means(found: Iterable[Line]) -> list[dict[str, Any]]:
    """Return a record per group and method with means over the hard cells, the largest recovered share first."""
    methods: dict[tuple[str, str], list[Line]] = {}
    for line in found:
        if line.recovered is not None:
            methods.setdefault((line.measured.group, line.measured.name), []).append(line)
    records = [
        {
            "group": group, "name": name, "cells": len(own), "free": all(line.measured.free for line in own),
            "recovered": float(np.mean([line.recovered for line in own])),
            "seconds": float(np.mean([line.measured.seconds for line in own])),
        }
        for (group, name), own in methods.items()
    ]  # fmt: skip
    return sorted(records, key=lambda record: (record["group"], -record["recovered"]))
