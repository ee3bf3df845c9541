"""Command: say whether a run reproduces the committed results (``make repro`` ends with it).

The same CPU repeats every accuracy to the last digit. Another CPU rounds sums in another order. Training then ends in
another network, on which the same calibration images act otherwise. A figure x of the committed results is reproduced
by y if abs(y - x) is within the 95 % interval of the difference of two runs on different CPUs,

    t(0.975, df) * sqrt(s^2 (1 / n_x + 1 / n_y) + 2 c^2).

s is the deviation over the n calibration seeds, pooled over both runs. c is the deviation between networks that were
trained with the kernels of different CPUs, beyond what seeds explain (``benchmarks.retrained``). df are the degrees of
freedom after Welch and Satterthwaite. Latencies depend on the machine and are not judged.
"""

import argparse
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats
from tabulate import tabulate

from pipeline.common.folders import RESULTS
from qwt2.errors import Qwt2Error, guarded
from qwt2.report.compensations import SUBJECT, heading, label
from qwt2.report.findings import ENGINES
from qwt2.report.metrics import HEADLINE
from qwt2.report.results import Method, Row, precision_order, read_rows

SUMMARY = RESULTS / "summary.csv"
RETRAINED = RESULTS / "benchmarks" / "retrained.csv"
LEVEL = 0.95
SMALLEST = 0.05  # points: figures closer than they are shown are equal


class Judged(NamedTuple):
    """A headline figure of the committed results and the same figure of this run.

    Attributes:
        committed, fresh: the figures.
        deviation: standard deviation of the difference of two runs on different CPUs, in points.
        freedom: the degrees of freedom of ``deviation``.
        known: whether the deviation between CPUs was measured for models of this task.
    """

    committed: Row
    fresh: Row
    deviation: float
    freedom: float
    known: bool = True

    @property
    def equal(self) -> bool:
        """Whether both are the same to the last digit."""
        return self.committed == self.fresh

    @property
    def expected(self) -> float:
        """Half the width of the interval, in points; 0 if nothing is known of the figure."""
        return float(stats.t.ppf((1 + LEVEL) / 2, self.freedom) * self.deviation) if self.deviation else 0.0

    @property
    def p(self) -> float:
        """The probability of a difference as large as this one between runs on different CPUs."""
        difference = abs(self.fresh.value - self.committed.value)
        if difference <= SMALLEST:
            return 1.0
        return float(2 * stats.t.sf(difference / self.deviation, self.freedom)) if self.deviation else 0.0

    @property
    def reproduced(self) -> bool:
        """Whether the difference is within the interval."""
        return self.p >= 1 - LEVEL

    @property
    def name(self) -> str:
        """The figure's name: model, bits, method and, if it was measured on one, engine."""
        row = self.committed
        return " ".join([row.model, row.precision, row.method, *([] if row.engine == "torch" else [row.engine])])


def headline_figures(rows: Iterable[Row]) -> dict[tuple, Row]:
    """Return the figures that are judged, by key.

    They are the main accuracy of every method in simulation, except those under the papers' own settings, and that of
    the benchmark's subject on engines.
    """
    return {
        row.key: row
        for row in rows
        for method in [Method.parse(row.method)]
        if row.metric == HEADLINE[row.task] and not method.is_published
        if row.engine == "torch" or method.compensation == SUBJECT
    }


class Spread:
    """The deviation between networks that were trained with the kernels of different CPUs.

    Args:
        rows: rows of ``retrained.csv``, whose column ``engine`` names the kernels.
    """

    def __init__(self, rows: Iterable[Row]):
        samples: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        for row in rows:
            samples[row.task, row.model, row.precision, row.method].append(row)
        self.variances: dict[tuple[str, ...], list[tuple[float, int]]] = defaultdict(list)
        for (*cell, _), found in samples.items():
            if len(found) > 1:
                between = float(np.var([row.value for row in found], ddof=1))
                by_seeds = float(np.mean([(row.std or 0.0) ** 2 / row.n for row in found]))
                self.variances[tuple(cell)].append((max(between - by_seeds, 0.0), len(found) - 1))

    def of(self, row: Row) -> tuple[float, int]:
        """Return the variance of a figure and its degrees of freedom, pooled over methods of its model and precision.

        Where the model was not retrained, all models of the task are pooled at this precision. Both are 0 without any.
        """
        others = [pair for (task, _, precision), pairs in self.variances.items() for pair in pairs
                  if (task, precision) == (row.task, row.precision)]  # fmt: skip
        found = self.variances.get((row.task, row.model, row.precision)) or others
        freedom = sum(df for _, df in found)
        return (sum(variance * df for variance, df in found) / freedom if freedom else 0.0), freedom


def judged(committed: Row, fresh: Row, spread: Spread) -> Judged:
    """Judge one figure by the interval of the module's text."""
    freedom = committed.n + fresh.n - 2
    pooled = sum((row.n - 1) * (row.std or 0.0) ** 2 for row in (committed, fresh)) / freedom if freedom else 0.0
    between, between_freedom = spread.of(committed)
    parts = [(pooled * (1 / committed.n + 1 / fresh.n), freedom), (2 * between, between_freedom)]
    total = sum(variance for variance, _ in parts)
    df = total**2 / sum(variance**2 / df for variance, df in parts if df) if total else 0.0
    return Judged(committed, fresh, total**0.5, df, known=between_freedom > 0)


def judge(committed: Iterable[Row], fresh: Iterable[Row], spread: Spread) -> list[Judged]:
    """Judge the headline figures that both runs have."""
    before, after = headline_figures(committed), headline_figures(fresh)
    return [judged(row, after[key], spread) for key, row in before.items() if key in after]


def reproduces(figures: Sequence[Judged]) -> bool:
    """Return whether no more figures are outside their intervals than chance may put there, and none is far outside.

    Far outside is what chance does to one figure or more of all in only 5 % of runs (Sidak).
    """
    outside = sum(not figure.reproduced for figure in figures)
    far = any(figure.p < 1 - LEVEL ** (1 / len(figures)) for figure in figures)
    return outside <= by_chance(figures) and not far


def by_chance(figures: Sequence[Judged]) -> int:
    """Return how many figures chance may put outside their intervals."""
    return int(stats.binom.ppf(LEVEL, len(figures), 1 - LEVEL))


def sentence(figures: Sequence[Judged], missing: int = 0) -> str:
    """Say in one sentence whether the run reproduces the committed results.

    Args:
        figures: the figures that both have.
        missing: number of committed headline figures that the run does not have.
    """
    if not figures:
        return "This run has none of the committed figures, so it says nothing about them."
    unknown = [figure for figure in figures if not figure.equal and not figure.known]
    sure = [figure for figure in figures if figure not in unknown]
    outside = [figure.name for figure in sure if not figure.reproduced]
    equal = sum(figure.equal for figure in sure)
    text = f"This run {'reproduces' if reproduces(sure) else 'does not reproduce'} the committed results: "
    if equal == len(figures):
        text += f"all {equal} headline figures are equal to the last digit"
    else:
        text += (
            f"of {len(sure)} headline figures, {equal} are equal to the last digit and "
            f"{len(sure) - len(outside) - equal} within the interval expected from calibration seeds and CPUs"
        )
    if outside:
        text += f"; outside of it (up to {by_chance(sure)} may be by chance): {', '.join(outside)}"
    if unknown:
        models = " ".join(dict.fromkeys(figure.committed.model for figure in unknown))
        text += f"; {len(unknown)} differ by an amount that nobody measured (`python -m benchmarks.retrained {models}`)"
    return text + (f"; {missing} committed ones are not part of this run." if missing else ".")


def table(figures: Iterable[Judged]) -> str:
    """Return a row per model and precision: this run's figures, and what was committed if it differs."""
    cells: dict[tuple, dict[str, str]] = defaultdict(dict)
    for figure in figures:
        row = figure.committed
        cells[row.task, row.model, precision_order(row.precision), row.precision][_column(row)] = _cell(figure)
    headings = list(dict.fromkeys(column for columns in cells.values() for column in columns))
    lines = [
        [model, precision.upper(), *(columns.get(name, "") for name in headings)]
        for (_, model, _, precision), columns in sorted(cells.items())
    ]
    return tabulate(lines, ["model", "bits", *headings], disable_numparse=True)


def _column(row: Row) -> str:
    name = Method.parse(row.method).compensation
    if row.engine != "torch":
        return f"{label(name)} on\n{ENGINES.get(row.engine, row.engine)}"
    return row.method if row.method == "fp32" else heading(name)


def _cell(figure: Judged) -> str:
    fresh, committed = figure.fresh.value, figure.committed.value
    if figure.equal:
        return f"{fresh:.1f} ="
    if not figure.known:
        return f"{fresh:.1f} ({committed:.1f}) ?"
    return f"{fresh:.1f} ({committed:.1f} ± {figure.expected:.1f}){'' if figure.reproduced else ' !'}"


def committed_rows(against: str) -> list[Row]:
    """Read the committed summary from a revision of git or from a file.

    Raises:
        Qwt2Error: there is neither.
    """
    if Path(against).is_file():
        return read_rows(against)
    shown = subprocess.run(["git", "show", f"{against}:{SUMMARY}"], capture_output=True, text=True)
    if shown.returncode:
        reason = (shown.stderr.strip() or "no answer").splitlines()[0]
        raise Qwt2Error(
            f"git does not have {SUMMARY} of {against} ({reason}); give a revision or a file with --against"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SUMMARY.name
        path.write_text(shown.stdout, encoding="utf-8")
        return read_rows(path)


def main(arguments: list[str] | None = None) -> None:
    """Print the table and the sentence."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.comparison.verdict", description=__doc__.splitlines()[0])
    parser.add_argument("--against", default="HEAD", help="revision or file of the results to reproduce; default: HEAD")
    committed, fresh = committed_rows(parser.parse_args(arguments).against), read_rows(SUMMARY)
    figures = judge(committed, fresh, Spread(read_rows(RETRAINED) if RETRAINED.is_file() else []))
    if figures:
        print("Accuracy of this run in %; = if it is what was committed, otherwise (committed ± expected difference)")
        print(table(figures), end="\n\n")
    print(sentence(figures, len(headline_figures(committed)) - len(figures)))


if __name__ == "__main__":
    guarded(main)
