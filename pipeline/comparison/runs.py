"""One list of all runs: those of DVC's grid and those of all sweeps.

A run is one method at one precision on one model. A cell of the grid holds several runs (plain PTQ and each
compensation, for each PTQ method), whose figures are means over the calibration seeds. A cell of a sweep is one run.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.build.compose import read_grid
from pipeline.common.folders import CELLS, OUT, RESOLVED, read_record
from pipeline.common.stage import ptq_label
from pipeline.common.unchanged import while_unchanged
from pipeline.stages.report import baseline_rows, cell_rows
from pipeline.sweeps.sweep import SWEEPS, job_paths
from pipeline.tasks import task_of
from qwt2.errors import Qwt2Error
from qwt2.io import read_json
from qwt2.report.metrics import HEADLINE
from qwt2.report.results import Layer, Method, Row, read_layers

GRID = "grid"
# The dashboard reads thousands of files whenever it is loaded.
_json = while_unchanged(read_json)
_record = while_unchanged(lambda path: read_record(path.parent))
_yaml = while_unchanged(lambda path: yaml.safe_load(path.read_text(encoding="utf-8")))
_sha256 = while_unchanged(lambda path: hashlib.sha256(path.read_bytes()).hexdigest())


@dataclass(frozen=True)
class Run:
    """One method at one precision on one model.

    Attributes:
        id: equal for equal configurations, whenever and wherever they ran.
        sweeps: names of the sweeps that asked for it; ("grid",) for DVC's grid.
        figures: ``<engine>/<metric>`` -> value, and ``<engine>/<metric>_std`` for several calibration seeds.
        ptq, fp32: the figures of plain PTQ in the same cell, and of the full-precision network.
        config: all settings that can change the result, nested.
        config_files: the files that hold the configuration.
        layers_file: the table of compensated modules, which covers all methods of the cell; None without compensation.
        artifacts: file -> its bytes and sha256.
    """

    id: str
    sweeps: tuple[str, ...]
    model: str
    precision: str
    method: str
    status: str
    config: dict[str, Any]
    config_files: tuple[Path, ...]
    figures: dict[str, float] = field(default_factory=dict)
    ptq: dict[str, float] = field(default_factory=dict)
    fp32: dict[str, float] = field(default_factory=dict)
    layers_file: Path | None = None
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str = ""

    @property
    def name(self) -> str:
        """The run's title: ``<model>-<precision>-<method>``."""
        return f"{self.model}-{self.precision}-{self.method}"

    @property
    def headline(self) -> str:
        """The main accuracy metric of the run's task."""
        return HEADLINE[task_of(self.config["model"])]

    def layers(self) -> list[Layer]:
        """Read the compensated modules of every seed, in execution order.

        Raises:
            Qwt2Error: the table is missing or damaged.
        """
        if self.layers_file is None:
            return []
        return [layer for layer in read_layers(self.layers_file) if layer.method == self.method]


def all_runs() -> list[Run]:
    """Return all runs sorted by name, including the failed cells of sweeps.

    Raises:
        Qwt2Error: there are none.
    """
    runs = [*grid_runs(), *sweep_runs()]
    if not runs:
        raise Qwt2Error(
            "there are no results yet; run `make repro` or `python -m pipeline.sweeps.experiment experiment=quick`"
        )
    return sorted(runs, key=lambda run: (run.name, run.id))


def grid_runs() -> Iterator[Run]:
    """Yield the runs of conf/grid.yaml's evaluated cells, and the full-precision networks."""
    grid = read_grid()
    for model in grid["model"]:
        if not (OUT / "baseline" / model / "metrics.json").is_file():
            continue
        files = (RESOLVED / f"baseline@{model}.yaml",)
        config = _merged(files)
        fp32 = _figures(baseline_rows(OUT, model, task_of(config["model"]), config["data"]["name"]))
        yield Run(_id(config, "fp32"), (GRID,), model, "fp32", "fp32", "finished", config, files, fp32, fp32=fp32)
        for precision in grid["precision"]:
            if (OUT / "evaluate" / f"{model}-{precision}" / "rows.csv").is_file():
                yield from _grid_cell(model, precision, fp32)


def _grid_cell(model: str, precision: str, fp32: dict[str, float]) -> Iterator[Run]:
    cell = f"{model}-{precision}"
    files = tuple(RESOLVED / f"{stage}@{cell}.yaml" for stage in ("quantize", "evaluate"))
    files = (RESOLVED / f"baseline@{model}.yaml", *files)
    config = _merged(files)
    rows = cell_rows(OUT, model, precision, config["data"]["name"])
    for method in dict.fromkeys(row.method for row in rows):
        parts = Method.parse(method)
        chosen = {name: options for name, options in config["compensation"].items() if name == parts.compensation}
        own = config | {"compensation": chosen, "method": method}
        yield Run(
            _id(own, method), (GRID,), model, precision, method, "finished", own, files,
            figures=_figures(row for row in rows if row.method == method),
            ptq=_figures(row for row in rows if row.method == parts.ptq),
            fp32=fp32,
            layers_file=OUT / "evaluate" / cell / "layers.csv" if chosen else None,
            artifacts=_artifacts(cell, parts),
        )  # fmt: skip


def _artifacts(cell: str, method: Method) -> dict[str, dict[str, Any]]:
    """Return size and hash of the files that engines run, one per calibration seed."""
    files = (
        sorted((OUT / "quantize" / cell).glob(f"{method.compensation or 'ptq'}-seed*.onnx"))
        if not method.is_published
        else []
    )
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}


def sweep_runs() -> Iterator[Run]:
    """Yield the cells that sweeps finished or failed, each cell once."""
    asked: dict[str, list[str]] = {}
    for folder in sorted(SWEEPS.glob("*/")):
        for cell in sorted({str(_json(path)["cell"]) for path in job_paths(folder.name)}):
            asked.setdefault(cell, []).append(folder.name)
    for path in sorted(CELLS.glob("*/cell.json")):
        if record := _record(path):
            yield _cell_run(path.parent, record, tuple(asked.get(path.parent.name, ())))


def _cell_run(folder: Path, record: dict[str, Any], sweeps: tuple[str, ...]) -> Run:
    config = record["config"]
    about = (config["model"]["name"], config["precision"]["name"])
    if record["status"] == "failed":
        label = "+".join([ptq_label(config["ptq"], config["ptq"]["method"]), *config["compensation"]])
        return Run(
            folder.name, sweeps, *about, label, "failed", config, (folder / "config.yaml",), error=record["error"]
        )
    method, figures = record["method"], record["figures"]
    return Run(
        folder.name, sweeps, *about, method, "finished", config, (folder / "config.yaml",),
        figures=figures[method],
        ptq=figures[method.partition("+")[0]],
        fp32={f"torch/{name}": value for name, value in record["fp32"].items()},
        layers_file=folder / "evaluate" / "layers.csv" if config["compensation"] else None,
        artifacts={name: facts for name, facts in record["artifacts"].items() if name.endswith(".onnx")},
    )  # fmt: skip


def _figures(rows: Iterable[Row]) -> dict[str, float]:
    found = {}
    for row in rows:
        found[f"{row.engine}/{row.metric}"] = row.value
        if row.std is not None:
            found[f"{row.engine}/{row.metric}_std"] = row.std
    return found


def _merged(files: tuple[Path, ...]) -> dict[str, Any]:
    """Merge the configurations of a cell's stages, without ``workers``, which cannot change a result."""
    merged: dict[str, Any] = {}
    for path in files:
        if not path.is_file():
            raise Qwt2Error(f"{path} does not exist; run `dvc repro`, which resolves the configuration first")
        _update(merged, _yaml(path))
    merged.pop("workers", None)
    return merged


def _update(target: dict[str, Any], source: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _update(target[key], value)
        else:
            target[key] = copy.deepcopy(value)  # later updates must not change the values that `_yaml` caches


def _id(config: dict[str, Any], method: str) -> str:
    return hashlib.sha256(json.dumps([config, method], sort_keys=True).encode()).hexdigest()[:16]
