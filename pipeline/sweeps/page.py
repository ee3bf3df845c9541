"""The page of a sweep: what its methods recover, with the cells of several calibration seeds brought together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.folders import CELLS, SCORES, read_record
from pipeline.common.stage import ptq_label
from pipeline.sweeps.sweep import SWEEPS, jobs
from pipeline.tasks import task_of
from qwt2.io import load_arrays, write_text
from qwt2.report.compensations import heading
from qwt2.report.page import render_sweep
from qwt2.report.recovery import Measured
from qwt2.report.results import Method

PAGE = "report.html"
# Overrides that a line of the table names in a column of its own, or takes the mean over.
_COLUMNS = ("experiment", "model", "precision", "ptq", "ptq.rotate", "compensation", "seed")


def write_page(sweep: str) -> Path | None:
    """Write a sweep's page, and return its file; ``None`` if no cell is finished."""
    cells = finished(sweep)
    if not cells:
        return None
    path = SWEEPS / sweep / PAGE
    write_text(path, render_sweep(sweep, measured(cells), fp32(cells)))
    return path


def fp32(cells: list[Finished]) -> dict[str, float]:
    """Return model -> the main figure of the full-precision network, in percent."""
    return {cell.model: float(cell.scores["fp32"].mean()) for cell in cells}


def finished(sweep: str) -> list[Finished]:
    """Return the finished cells of a sweep."""
    found = [(job, read_record(CELLS / str(job["cell"]))) for job in jobs(sweep)]
    return [Finished(job, cell) for job, cell in found if cell and cell["status"] == "finished"]


class Finished:
    """A finished cell of a sweep.

    Args:
        job: the record of the request.
        cell: the record of the cell.

    Attributes:
        overrides: what the sweep asked for.
        model, precision, ptq, seed, task: what the cell is of.
        methods: plain PTQ, and each of its compensations.
        figures: method -> ``<engine>/<metric>`` -> value.
        scores: method -> scores, (1, images).
    """

    def __init__(self, job: dict[str, Any], cell: dict[str, Any]):
        config = cell["config"]
        self.overrides: dict[str, str] = job["overrides"]
        self.model, self.precision = config["model"]["name"], config["precision"]["name"]
        self.ptq = ptq_label(config["ptq"], config["ptq"]["method"])
        self.task, self.seed = task_of(config["model"]), config["seeds"][0]
        self.figures: dict[str, dict[str, float]] = cell["figures"]
        self.methods = [method for method in self.figures if Method.parse(method).ptq == self.ptq]
        self.scores: dict[str, np.ndarray] = load_arrays(CELLS / cell["id"] / "evaluate" / SCORES)

    def figure(self, method: str, metric: str) -> float:
        """Return a figure of the simulation; 0 if plain PTQ does not have it."""
        return self.figures[method].get(f"torch/{metric}", 0.0)

    def seconds(self, method: str) -> float:
        """Return the seconds of PTQ and of the compensation."""
        return self.figure(self.ptq, "quantize_seconds") + self.figure(method, "compensate_seconds")


@dataclass
class _Seeds:
    """The figures of one method, by calibration seed."""

    cell: Finished
    method: str
    scores: dict[int, np.ndarray] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)


def measured(cells: list[Finished]) -> list[Measured]:
    """Return the methods of a sweep, each with all its seeds.

    The first PTQ method of a model and precision is the plain PTQ that all methods there are compared with. Overrides
    of the compensation belong to a method's name. Others, such as the number of calibration images, make groups.
    """
    varying = _varying([cell.overrides for cell in cells])
    first: dict[tuple[str, str], str] = {}
    found: dict[tuple[str, str, str, str], _Seeds] = {}
    for cell in cells:
        base = first.setdefault((cell.model, cell.precision), cell.ptq)
        options = {key: cell.overrides[key] for key in varying if key in cell.overrides}
        group = _text({key: value for key, value in options.items() if not key.startswith("compensation.")})
        own = _text({key: value for key, value in options.items() if key.startswith("compensation.")})
        for method in cell.methods:
            name = _name(method, base) + (f", {own}" if own and method != cell.ptq else "")
            seeds = found.setdefault((cell.model, cell.precision, group, name), _Seeds(cell, method))
            seeds.scores[cell.seed] = cell.scores[method][0]
            seeds.seconds[cell.seed] = cell.seconds(method)
    return [_measured(key, seeds) for key, seeds in found.items()]


def _measured(key: tuple[str, str, str, str], seeds: _Seeds) -> Measured:
    model, precision, group, name = key
    free = seeds.cell.figure(seeds.method, "added_modules") == 0
    seconds = float(np.mean(list(seeds.seconds.values())))
    compensation = Method.parse(seeds.method).compensation
    return Measured(seeds.cell.task, model, precision, group, name, compensation, seeds.scores, seconds, free)


def _varying(overrides: list[dict[str, str]]) -> list[str]:
    """Return the keys that differ between cells, without those that have a column."""
    keys = dict.fromkeys(key for one in overrides for key in one if key not in _COLUMNS)
    return [key for key in keys if len({one.get(key) for one in overrides}) > 1]


def _text(options: dict[str, str]) -> str:
    return ", ".join(f"{key.removeprefix('compensation.')}={value}" for key, value in options.items())


def _name(method: str, base: str) -> str:
    """Return the name of a method as shown; PTQ methods other than the first one of the sweep are named."""
    ptq, compensation = Method.parse(method)
    return heading(compensation) if ptq == base else heading(compensation).replace("PTQ", ptq, 1)
