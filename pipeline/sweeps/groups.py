"""Cells of a sweep by model and precision, as the texts at the end of the command compare them."""

from collections import defaultdict
from statistics import fmean
from typing import NamedTuple

from pipeline.common.folders import CELLS, read_record
from pipeline.sweeps.sweep import jobs
from pipeline.tasks import task_of
from qwt2.report.results import method_order

Figures = dict[str, float]  # ``<engine>/<metric>`` -> value
FP32 = "fp32"


class Group(NamedTuple):
    """The cells of a sweep that share a model and a precision.

    Attributes:
        model, precision: what they share.
        task: the model's task; empty if no cell finished.
        methods: method -> its figures, which are means over the finished cells that have it. The full-precision network
            is the first, then comes each PTQ method, plain before compensated. Empty if no cell finished.
    """

    model: str
    precision: str
    task: str
    methods: dict[str, Figures]

    def get(self, method: str, figure: str) -> float | None:
        """Return a figure, or ``None`` if it was not measured."""
        return self.methods.get(method, {}).get(figure)


def groups(sweep: str) -> list[Group]:
    """Return the cells that a sweep was asked for, in the order in which they were."""
    asked: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for record in jobs(sweep):
        cell = read_record(CELLS / str(record["cell"]))
        finished = [cell] if cell and cell["status"] == "finished" else []
        asked[record["model"], record["precision"]] += finished
    return [
        Group(*key, task_of(cells[0]["config"]["model"]) if cells else "", _methods(cells))
        for key, cells in asked.items()
    ]


def _methods(cells: list[dict]) -> dict[str, Figures]:
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        fp32 = {f"torch/{metric}": value for metric, value in cell["fp32"].items()}
        for method, figures in {FP32: fp32, **cell["figures"]}.items():
            for name, value in figures.items():
                values[method][name].append(value)
    order = sorted(values, key=lambda method: (method != FP32, method_order(method)))
    return {method: {name: fmean(found) for name, found in values[method].items()} for method in order}
