"""Command: keep what a sweep's methods recover as a file in results/ (``make free-accuracy``), which a page shows.

The file has a row per method, model and precision: means over calibration seeds, and paired intervals.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.folders import RESULTS
from pipeline.comparison.benchmark_tables import read_dicts
from pipeline.comparison.markdown import MISSING, table
from pipeline.comparison.static_page import PLOTS, svg
from pipeline.sweeps.page import finished, fp32, measured
from qwt2.errors import Qwt2Error, guarded
from qwt2.evaluation import machine
from qwt2.io import write_csv, write_text
from qwt2.report import charts, recovery
from qwt2.report.compensations import REFERENCES, label
from qwt2.report.recovery import Interval, Line, Measured

FILE = RESULTS / "free_accuracy.csv"
_TEXTS = ("task", "model", "precision", "group", "name", "compensation")


def main() -> None:
    """Write the file from the finished cells of sweeps.

    Raises:
        Qwt2Error: a sweep has no finished cell.
    """
    parser = argparse.ArgumentParser(prog="python -m pipeline.comparison.free_accuracy", description=__doc__)
    parser.add_argument("sweeps", nargs="+", metavar="SWEEP", help="names of sweeps, which are folders of out/sweeps/")
    cells = []
    for sweep in parser.parse_args().sweeps:
        if not (found := finished(sweep)):
            raise Qwt2Error(f"sweep {sweep!r} has no finished cell; run it first (make free-accuracy)")
        cells += found
    described = machine.describe()
    facts = {"cpu": described["cpu"], "torch": described["versions"]["torch"]}
    write_csv(FILE, [row_of(line) | facts for line in recovery.lines(measured(cells), fp32(cells))])


def row_of(line: Line) -> dict[str, Any]:
    """Return a line as a row of the file; cells of intervals that were not computed are empty."""
    item = line.measured
    row = {name: getattr(item, name) for name in _TEXTS} | {"free": item.free, "seeds": len(item.scores)}
    row |= {"mean": f"{item.mean:.4f}", "loss": f"{line.loss:.4f}", "seconds": f"{item.seconds:.4g}"}
    intervals = {"ptq": line.gain} | {name: line.against.get(name) for name in REFERENCES}
    for name, points in intervals.items():
        for figure in Interval._fields:
            value = getattr(points, figure, None)
            row[f"over_{name}_{figure}"] = "" if value is None else f"{value:.4f}"
    return row


def line_of(row: dict[str, str]) -> Line:
    """Return the line behind a row; of its scores, only the mean over images and seeds is left."""
    scores = {seed: np.array([float(row["mean"])]) for seed in range(int(row["seeds"]))}
    texts = [row[name] for name in _TEXTS]
    item = Measured(*texts, scores=scores, seconds=float(row["seconds"]), free=row["free"] == "True")
    against = {name: points for name in REFERENCES if (points := _interval(row, name))}
    return Line(item, float(row["loss"]), _interval(row, "ptq"), against)


def _interval(row: dict[str, str], name: str) -> Interval | None:
    mean, low, high = (float(text) if (text := row[f"over_{name}_{f}"]) else None for f in Interval._fields)
    return None if mean is None else Interval(mean, low, high)


def free_accuracy_page(page: Path) -> str:
    """Write the plot beside a page and return the page's generated part, or what to run if there is no file."""
    if not FILE.is_file():
        return "Not measured yet; `make free-accuracy` does."
    rows = read_dicts(FILE)
    lines = [line_of(row) for row in rows]
    plot = f"{PLOTS}/free-accuracy.svg"
    write_text(page.parent / plot, svg(charts.recovery(lines)))
    tried = "\n".join(f"- {text}" for text in recovery.not_helpful(lines))
    parts = [
        *recovery.headline(lines), recovery.significance(lines), f"![recovered share against seconds]({plot})",
        _means(lines), "## Every cell", _cells(lines), "## What did not help",
        f"Not significantly above plain PTQ:\n\n{tried}", _facts(rows),
    ]  # fmt: skip
    return "\n\n".join(parts)


def _facts(rows: list[dict[str, str]]) -> str:
    """Say what the file holds, which may be part of what the command measures, and where it was measured."""
    columns = {"Models": "model", "precisions": "precision", "methods": "name"}
    held = (f"{title}: {' | '.join(dict.fromkeys(row[key] for row in rows))}" for title, key in columns.items())
    return f"{'; '.join(held)}. Seconds are wall time. {rows[0]['cpu']}; torch={rows[0]['torch']}"


def _means(lines: list[Line]) -> str:
    rows = [
        [record["name"], f"{record['recovered']:.0%}", f"{record['seconds']:.2g}", str(record["cells"]),
         "free" if record["free"] else "added"]
        for record in recovery.means(lines)
    ]  # fmt: skip
    headings = ["Method", "Recovered", "Seconds", "Cells", "Latency"]
    return table(headings, rows, words=("Method", "Latency"))


def _cells(lines: list[Line]) -> str:
    headings = ["Cell", "Method", "Accuracy, %", "Recovered", "Over PTQ", *(f"Over {label(n)}" for n in REFERENCES)]
    rows = [
        [
            line.place, line.measured.name, f"{line.measured.mean:.1f}",
            MISSING if line.recovered is None else f"{line.recovered:.0%}",
            *(_points(points) for points in (line.gain, *map(line.against.get, REFERENCES))),
            f"{line.measured.seconds:.2g}", str(len(line.measured.scores)),
        ]
        for line in lines
    ]  # fmt: skip
    return table([*headings, "Seconds", "Seeds"], rows, words=("Cell", "Method"))


def _points(points: Interval | None) -> str:
    return MISSING if points is None else f"**{points}**" if points.is_significant else str(points)


if __name__ == "__main__":
    guarded(main)
