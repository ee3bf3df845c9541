"""Stage ``report``: gather the evaluated cells into results/summary.csv and results/report.html."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.common.folders import OUT, RESULTS, SCORES
from pipeline.common.stage import Cell, run_stage
from qwt2.errors import Qwt2Error
from qwt2.io import load_arrays, read_json, write_json, write_text
from qwt2.report.detection import Line, lines
from qwt2.report.metrics import ACCURACY, HEADLINE, METRICS
from qwt2.report.page import Conditions, render, vega_bundle
from qwt2.report.results import Layer, Results, Row, read_layers, read_rows, write_rows

PLOTTED = ("classification", "detection")  # tasks whose headline metric dvc.yaml plots


def main(config: Mapping[str, Any], _cell: Cell) -> None:
    """Write the report of the whole grid."""
    report(config, OUT, RESULTS)


def report(config: Mapping[str, Any], out: Path, results: Path) -> None:
    """Write the summary, the page and the files that DVC compares into ``results``, from the outputs under ``out``.

    Only the grid's cells are read, because an earlier, larger grid may have left others behind.
    The page is made before any file is written, so that the files always belong together.
    """
    models, precisions = config["grid"]["model"], config["grid"]["precision"]
    cells = [(model, precision) for model in models for precision in precisions]
    rows = collect(out, {model: config["models"][model] for model in models}, cells)
    layers = [layer for model, precision in cells for layer in cell_layers(out, model, precision)]
    operations = {cell: read_json(_cell_folder(out, *cell) / "operations.json") for cell in cells}
    results_table = Results(rows)
    scores = {cell: load_arrays(_cell_folder(out, *cell) / SCORES) for cell in cells}
    pictures = _pictures(out, results_table)
    page = render(results_table, layers, _conditions(config, out, cells), operations, pictures, scores)
    write_rows(results / "summary.csv", rows)
    write_text(results / "report.html", page)
    write_json(results / "metrics.json", accuracies(rows))
    for task in PLOTTED:
        metric = HEADLINE[task]
        write_text(results / f"{metric}.csv", accuracy_table([row for row in rows if row.task == task], metric))
    write_text(out / "plots" / "vega.js", vega_bundle())


def accuracies(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Return simulated accuracy by model, precision and method, for ``dvc metrics diff`` and ``dvc exp show``."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in sorted(rows, key=lambda row: row.key):
        if (row.engine, row.metric) == ("torch", HEADLINE[row.task]):
            found.setdefault(row.model, {}).setdefault(row.precision, {})[row.method] = round(row.value, 4)
    return found


def accuracy_table(rows: Iterable[Row], metric: str) -> str:
    """Return the simulated accuracy of one task's models as CSV, for ``dvc plots diff``.

    Args:
        rows: figures of the task's models.
        metric: the task's main metric, which names the column.
    """
    lines = [
        f"{model} {precision} {method},{value}"
        for model, precisions in accuracies(rows).items()
        for precision, methods in precisions.items()
        for method, value in methods.items()
    ]
    return "\n".join([f"cell,{metric}", *lines]) + "\n"


def collect(out: Path, models: Mapping[str, Mapping[str, str]], cells: Iterable[tuple[str, str]]) -> list[Row]:
    """Read the figures of the baselines and of exactly these (model, precision) cells.

    Args:
        out: the folder of all stages' outputs.
        models: model -> its ``task`` and ``dataset``.
        cells: (model, precision) of each cell.

    Raises:
        Qwt2Error: a file is missing, damaged, or belongs to something else.
    """
    rows = [
        row for model, facts in models.items() for row in baseline_rows(out, model, facts["task"], facts["dataset"])
    ]
    return rows + [
        row for model, precision in cells for row in cell_rows(out, model, precision, models[model]["dataset"])
    ]


def baseline_rows(out: Path, model: str, task: str, dataset: str) -> list[Row]:
    """Read the fp32 network's accuracy from ``baseline/<model>/metrics.json``.

    Raises:
        Qwt2Error: the file is missing or damaged, or lacks a metric of the task.
    """
    path = out / "baseline" / model / "metrics.json"
    metrics = read_json(path)
    missing = set(ACCURACY[task]) - set(metrics)
    if missing:
        raise Qwt2Error(f"{path} has no {' and no '.join(sorted(missing))}; run `dvc repro -f baseline@{model}`.")
    return [
        Row(task, dataset, model, "fp32", "fp32", "torch", name, metrics[name], None, METRICS[name].unit, 1)
        for name in metrics
        if name in METRICS
    ]


def cell_rows(out: Path, model: str, precision: str, dataset: str) -> list[Row]:
    """Read the figures of one cell from ``evaluate/<cell>/rows.csv``.

    Raises:
        Qwt2Error: the file is missing or damaged, or has a row of another cell.
    """
    path = _cell_folder(out, model, precision) / "rows.csv"
    rows = read_rows(path)
    for row in rows:
        _check_cell(path, (row.model, row.precision, row.dataset), (model, precision, dataset))
    return rows


def cell_layers(out: Path, model: str, precision: str) -> list[Layer]:
    """Read the records of one cell's modules from ``evaluate/<cell>/layers.csv``.

    Raises:
        Qwt2Error: the file is missing or damaged, or has a row of another cell.
    """
    path = _cell_folder(out, model, precision) / "layers.csv"
    layers = read_layers(path)
    for layer in layers:
        _check_cell(path, (layer.model, layer.precision), (model, precision))
    return layers


def _pictures(out: Path, results: Results) -> dict[str, bytes]:
    """Return each detector's pictures at the precision where plain PTQ loses most."""
    worst: dict[str, Line] = {}
    for line in lines(results.of_task("detection")):
        worst[line.model] = max(worst.get(line.model, line), line, key=lambda one: one.loss)
    return {
        f"{line.model}-{line.precision}": (_cell_folder(out, line.model, line.precision) / "pictures.png").read_bytes()
        for line in worst.values()
    }


def _check_cell(path: Path, found: tuple[str, ...], expected: tuple[str, ...]) -> None:
    if found != expected:
        raise Qwt2Error(f"{path} has a row of {', '.join(found)}, but belongs to {', '.join(expected)}; run its stage.")


def _conditions(config: Mapping[str, Any], out: Path, cells: Iterable[tuple[str, str]]) -> Conditions:
    models = [config["models"][model] for model in config["grid"]["model"]]
    used = dict.fromkeys(model["dataset"] for model in models)
    machines = []
    for cell in cells:
        machine = read_json(_cell_folder(out, *cell) / "machine.json")
        if machine not in machines:
            machines.append(machine)
    return Conditions(
        datasets={name: config["datasets"][name]["val_images"] for name in used},
        calibration_images=sorted({model["calibration_images"] for model in models}),
        latency=config["evaluate"]["latency"],
        latency_repeats=sorted({model["latency_repeats"] for model in models}),
        machines=machines,
    )


def _cell_folder(out: Path, model: str, precision: str) -> Path:
    return out / "evaluate" / f"{model}-{precision}"


if __name__ == "__main__":
    run_stage("report", main)
