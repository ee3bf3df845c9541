"""Gather the figures of real networks on real data, and compare them at 8 bits with NNCF and quantize_static.

The cells are those of the experiments ``real``, ``fashion`` and ``encoder``, which run first (``make real``), and at
W8A8 also with files for OpenVINO. The other tools get the same network, calibration inputs and validation set, and
their files are measured in turn with those of the cells. Each runs with several of its settings, because none is the
best for every network.

``python -m benchmarks.real MODEL ...`` takes only these models, and keeps the other rows of this machine's files.
"""

import argparse
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
from hydra import compose, initialize_config_dir
from tqdm import tqdm

from benchmarks.peer_tools import Feeds, nncf_settings, quantize_static_settings, single_feeds, write_float
from benchmarks.table import machine_file, versions_text
from pipeline.build.compose import CONF
from pipeline.common.folders import read_record
from pipeline.common.stage import Cell, set_threads
from pipeline.comparison.benchmark_tables import read_dicts
from pipeline.sweeps.cells import baseline_folder, cell_config, cell_folder, data_folder
from pipeline.tasks import Task, open_task
from qwt2.engines import Engine
from qwt2.errors import Qwt2Error, guarded
from qwt2.evaluation import machine
from qwt2.evaluation.latency import measure_latency
from qwt2.io import write_csv
from qwt2.report.metrics import METRICS

EXPERIMENTS = ("real", "fashion", "encoder")
# Engine -> overrides of the cells whose files are compared on it; OpenVINO's files are made for it (`make real`).
COMPARED = {
    "onnxruntime": ["precision=w8a8"],
    "openvino": ["precision=w8a8", "ptq.target=openvino", "evaluate.engines=[openvino]"],
}
THREADS = 1
ROUNDS, INSTANCES = 60, 3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models of the experiments; default: all")
    chosen = parser.parse_args().models
    logging.disable(logging.WARNING)
    os.environ["OPENVINO_TELEMETRY"] = "0"
    known = swept()
    if unknown := set(chosen) - set(known):
        raise Qwt2Error(f"the experiments have no model {sorted(unknown)[0]!r}; choose of {', '.join(known)}")
    set_threads(THREADS)
    for model in tqdm(chosen or list(known), desc="models"):
        experiment, precisions = known[model]
        base = [f"experiment={experiment}", f"model={model}"]
        cells = [configuration([*base, f"precision={precision}"]) for precision in precisions]
        write("real-grid", model, [row for cfg in cells for row in grid_rows(cfg)])
        write("real-peers", model, [row for engine in COMPARED for row in compared(engine, base)])


def swept() -> dict[str, tuple[str, list[str]]]:
    """Return model -> the experiment that it belongs to, and the precisions there."""
    found = {}
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        for name in EXPERIMENTS:
            params = compose("cell", [f"experiment={name}"], return_hydra_config=True).hydra.sweeper.params
            found |= {model: (name, params["precision"].split(",")) for model in params["model"].split(",")}
    return found


def configuration(overrides: list[str]) -> dict[str, Any]:
    """Return the configuration of one cell."""
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return cell_config(compose("cell", overrides))


def finished(cfg: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a finished cell.

    Raises:
        Qwt2Error: the cell has not run.
    """
    record = read_record(cell_folder(cfg))
    if record is None or record["status"] != "finished":
        raise Qwt2Error(
            f"the cell of {cfg['model']['name']} at {cfg['precision']['name']} has not finished; run `make real`"
        )
    return record


def grid_rows(cfg: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row per method and engine of a cell, and one of the network in full precision."""
    record = finished(cfg)
    common = {"task": cfg["task"], "data": cfg["data"]["name"], "model": cfg["model"]["name"]}
    yield common | {"precision": "fp32", "method": "fp32", "engine": "torch"} | record["fp32"]
    for method, figures in record["figures"].items():
        for engine in ("torch", *cfg["evaluate"]["engines"]):
            own = {name: figures[f"{engine}/{name}"] for name in METRICS if f"{engine}/{name}" in figures}
            yield common | {"precision": cfg["precision"]["name"], "method": method, "engine": engine} | own


def compared(engine: str, base: list[str]) -> list[dict[str, Any]]:
    """Return the figures of a cell's own files and of the other tools' files on an engine, measured in turn."""
    cfg = configuration([*base, *COMPARED[engine]])
    finished(cfg)
    cell = Cell("", data_folder(cfg), baseline_folder(cfg), cell_folder(cfg))
    if not list(cell.folder("quantize").glob("*.onnx")):
        raise Qwt2Error(f"the cell of {cfg['model']['name']} did not keep its models; run `make real`")
    with tempfile.TemporaryDirectory() as folder:
        return Comparison(cfg, open_task(cfg, cell), cell, Path(folder)).rows(engine)


class Comparison:
    """One model's files at 8 bits, by this library and by the other tools."""

    def __init__(self, cfg: dict[str, Any], task: Task, cell: Cell, folder: Path):
        self.cfg, self.task, self.cell, self.folder = cfg, task, cell, folder
        self.network = task.baseline()
        self.calibration = single_feeds(task.calibration(self.network, cfg["seeds"][0]))
        self.example = task.example(self.network)
        self.float_file = write_float(self.network, folder / "fp32.onnx", self.example)
        self.is_transformer = cfg["ptq"]["method"].startswith("repq")

    def rows(self, engine: str) -> list[dict[str, Any]]:
        own = {f"{name} (this library)": self.cell.onnx(name, self.cfg["seeds"][0]) for name in self.methods()}
        return self.measured(engine, {"fp32": self.float_file, **own, **dict(self.others(engine))})

    def others(self, engine: str) -> Iterator[tuple[str, Path]]:
        """Yield the file of another tool with each setting that does not fail, under the tool's name and the setting's.

        Entropy, for example, fails on masks that reach float32's lowest value.
        """
        tool, suffix, settings = {
            "onnxruntime": (
                "quantize_static", ".onnx",
                quantize_static_settings(self.float_file, self.calibration, self.is_transformer),
            ),
            "openvino": (
                "NNCF", ".xml", nncf_settings(self.network, self.example, self.calibration, self.is_transformer)
            ),
        }[engine]  # fmt: skip
        for number, setting in enumerate(settings):
            path = self.folder / f"{tool}-{number}{suffix}"
            try:
                setting.write(path)
            except Exception as error:  # of any kind: the other settings go on
                reason = str(error).partition("\n")[0]
                tqdm.write(f"{tool} ({setting.name}) fails on {self.cfg['model']['name']}: {reason}")
                continue
            yield f"{tool} ({setting.name})", path

    def methods(self) -> list[str]:
        return ["ptq", *self.cfg["compensation"]]

    def measured(self, engine: str, files: dict[str, Path]) -> list[dict[str, Any]]:
        """Return a row per file: accuracy on the validation set, and latency on one input, all files in turn."""
        models = {name: [self.opened(engine, path) for _ in range(INSTANCES)] for name, path in files.items()}
        inputs = self.task.latency_input(1)
        calls = {name: [timed(model, inputs) for model in own] for name, own in models.items()}
        latencies = measure_latency(calls, "ptq (this library)", ROUNDS)
        return [
            {
                "task": self.cfg["task"], "model": self.cfg["model"]["name"], "engine": engine, "variant": name,
                **self.task.engine_figures({"": models[name][0]}), "latency_ms": latencies[name].wall_ms,
                "latency_ratio_to_ptq": latencies[name].ratio, "latency_cpu_ms": latencies[name].cpu_ms,
                "file_bytes": _bytes(path),
                "calibration_inputs": len(self.calibration), "threads": THREADS,
            }
            for name, path in files.items()
        ]  # fmt: skip

    def opened(self, engine: str, path: Path) -> Callable:
        if path.suffix == ".xml":
            return IntermediateModel(path)
        return Engine(onnx.load(path), engine, THREADS)


def timed(model: Any, inputs: np.ndarray | Feeds) -> Callable[[], Any]:
    """Return a call without this library's checks of inputs, which take microseconds and other tools' files lack."""
    if isinstance(model, IntermediateModel):
        return partial(model, inputs)
    feeds = inputs if isinstance(inputs, dict) else {model.input.name: inputs}
    return partial(model.session(len(next(iter(feeds.values())))), feeds)


class IntermediateModel:
    """A file of OpenVINO's own format, compiled for each batch size on first use."""

    def __init__(self, path: Path):
        self.path = path
        self._compiled: dict[int, openvino.CompiledModel] = {}

    def __call__(self, inputs: np.ndarray | Feeds) -> np.ndarray:
        feeds = inputs if isinstance(inputs, dict) else {0: inputs}
        batch = len(next(iter(feeds.values())))
        if batch not in self._compiled:
            self._compiled[batch] = self.compiled(feeds)
        return next(iter(self._compiled[batch](feeds).values()))

    def compiled(self, feeds: dict) -> openvino.CompiledModel:
        core = openvino.Core()
        model = core.read_model(self.path)
        model.reshape({name: list(array.shape) for name, array in feeds.items()})
        # As with this library's files, operations that stay in float run in float32.
        options = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        return core.compile_model(model, "CPU", options)


def _bytes(path: Path) -> int:
    """Return the size of a file, with that of its weights if these are apart."""
    return sum(file.stat().st_size for file in (path, path.with_suffix(".bin")) if file.is_file())


def write(kind: str, model: str, rows: list[dict[str, Any]]) -> None:
    """Replace one model's rows in this machine's file, whose name holds the CPU and the engines' versions."""
    described = machine.describe()
    facts = {
        "cpu": described["cpu"], "instruction_sets": " ".join(described["instruction_sets"]),
        "versions": versions_text(described),
    }  # fmt: skip
    path = machine_file(kind, ort="onnxruntime", ov="openvino")
    others = [row for row in read_dicts(path) if row["model"] != model] if path.is_file() else []
    rounded = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} | facts for row in rows]
    write_csv(path, sorted([*others, *rounded], key=lambda row: row["model"]))


if __name__ == "__main__":
    guarded(main)
