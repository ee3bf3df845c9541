"""Take models from outside through the library: timm's smallest per family, some of torchvision and transformers.

Weights are random. A row tells whether a model comes through quantization, CWAC, folding and export to files that run
on both engines, what stays in float, how close the outputs are, and what it takes. Each model runs in its own process.

SQNR is measured on images that were not calibrated on. The outputs' mean over the images is subtracted first, because
networks with random weights give almost the same outputs for all images. The cost of a compensation is its
multiply-accumulates divided by those of one float forward pass of the calibration set.

How much a network amplifies errors by itself is measured too: ``noise_db`` is the SQNR of the float outputs if the
inputs have noise of 1 % of their standard deviation, which would be 40 dB in a network that amplifies nothing.

Other tools get the same images, where the model is small enough (:mod:`benchmarks.zoo_peers`).

`.venv-peers/bin/python -m benchmarks.zoo [NAME ...]` continues what this machine has, small models first. With
`--capture`, models are only captured and compared with their graphs, which takes seconds each. `--largest 500` takes
the smallest member of every family. The environment is that of `make benchmarks`.
"""

import argparse
import copy
import importlib
import math
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.table import machine_file, versions_text
from benchmarks.zoo_models import LIST, built, parts_of, with_noise
from benchmarks.zoo_peers import TOOLS, measured_by, phrase
from pipeline.common.resources import PeakMemory
from pipeline.comparison.benchmark_tables import read_dicts
from qwt2 import compensate, export_onnx, fold, load_engine, quantize
from qwt2.capture import wiring
from qwt2.capture.batch import first
from qwt2.capture.blocks import find_blocks
from qwt2.capture.check import outputs_of
from qwt2.capture.export import capture
from qwt2.capture.graph import GraphModel, Product
from qwt2.errors import Qwt2Error
from qwt2.evaluation import machine
from qwt2.evaluation.metrics import sqnr_db
from qwt2.io import write_csv
from qwt2.quantization.allocation import centred_sqnr_db

LIMIT_SECONDS = 600
TOOLS_LARGEST = 10_000_000  # parameters of the largest model that the other tools get
TOOL_SECONDS = 180
CAPTURED = "captured"
NOT_TAKEN = {"outcome": "not taken", "reason": "too large"}
ENGINES = ("onnxruntime", "openvino")
# Imported once, before the models' processes. NNCF is not among them, because it changes PyTorch's functions.
PACKAGES = ("onnxruntime", "onnxscript", "openvino", "timm", "torch.onnx", "torchvision", "transformers")
FIGURES = (
    "source", "family", "model", "parameters", "outcome", "reason", "same_db", "layers", "products", "blocks",
    "integer_macs_percent", "float_modules", "noise_db", "ptq_db", "cwac_db", "qwt_db", "onnxruntime_db", "openvino_db",
    "cwac_passes", "qwt_passes", "seconds", "float_passes", "peak_memory_mb",
    *(f"{tool}{figure}" for tool in TOOLS for figure in ("", "_db", "_seconds")),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; default: all that have no row yet")
    parser.add_argument("--largest", type=float, default=60, help="million parameters of the largest that is taken")
    parser.add_argument("--capture", action="store_true", help="compare graphs with models, and no more")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for package in PACKAGES:
        importlib.import_module(package)
    described = machine.describe()
    facts = {"cpu": described["cpu"], "versions": versions_text(described)}
    output = machine_file("zoo")
    rows: dict[str, dict[str, Any]] = {row["model"]: row for row in read_dicts(output)} if output.is_file() else {}
    models = read_dicts(LIST)
    for model in tqdm(models, desc="models"):
        name, small = model["model"], int(model["parameters"]) <= arguments.largest * 1e6
        left = name not in rows or is_left(rows[name]["outcome"], small, arguments.capture)
        if name in arguments.names or (not arguments.names and left):
            row: dict[str, Any] = dict(model)
            row |= in_a_process(LIMIT_SECONDS, measured, name, arguments.capture) if small else NOT_TAKEN
            tools = {key: value for key, value in rows.get(name, {}).items() if key.startswith(tuple(TOOLS))}
            rows[name] = {**dict.fromkeys(FIGURES, ""), **tools, **row, **facts}
            write_csv(output, list(rows.values()))
        light = name in rows and int(model["parameters"]) <= TOOLS_LARGEST and not arguments.capture
        for tool in [tool for tool in TOOLS if light and not rows[name][tool]]:
            rows[name] |= by_a_tool(tool, name)
            write_csv(output, list(rows.values()))


def is_left(outcome: str, small: bool, only_capture: bool) -> bool:
    """Return whether a model with a row is still to be taken: it was only captured, or was too large at that time."""
    return (outcome == CAPTURED and not only_capture) or (outcome == NOT_TAKEN["outcome"] and small)


def by_a_tool(tool: str, name: str) -> dict[str, Any]:
    """Return what another tool's process measured on a model."""
    found = in_a_process(TOOL_SECONDS, measured_by, tool, name)
    outcome = found["outcome"] if found["outcome"] == "runs" else f"{found['outcome']}: {found['reason']}"
    return {tool: outcome, f"{tool}_db": found.get("db", ""), f"{tool}_seconds": found.get("seconds", "")}


def in_a_process(seconds: int, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return what a function returns in a process of its own, or how that process ended.

    The process is a fork, because importing all packages takes longer than many a model.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(send, work, *arguments))
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(seconds) else {"outcome": "not done", "reason": f"not in {seconds} s"}
    except EOFError:
        process.join()
        return {"outcome": "crashed", "reason": f"exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _send(connection: Connection, work: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # tools show progress
        try:
            connection.send(work(*arguments))
        except Exception as error:
            connection.send({"outcome": "crashed", "reason": phrase(error)})


def measured(name: str, only_capture: bool) -> dict[str, Any]:
    """Take one model the whole way, or only capture it, and return its row."""
    warnings.simplefilter("ignore")
    model, calibration, test = built(name)
    parts = parts_of(calibration)
    started = time.process_time()
    try:
        with PeakMemory() as memory:
            captured = capture(model, first(parts[0], 2))
            found = captured_like(model, captured, test)
            found |= {} if only_capture else through(captured, parts, test)
    except Qwt2Error as error:
        return {"outcome": "refused", "reason": str(error)[:300]}
    seconds = time.process_time() - started
    return found | {
        "outcome": CAPTURED if only_capture else "through",
        "seconds": round(seconds, 1),
        "peak_memory_mb": round(memory.megabytes),
        "float_passes": round(seconds / _seconds(lambda: [outputs_of(model, part) for part in parts]), 1),
    }  # fmt: skip


def captured_like(model: nn.Module, captured: GraphModel, test: Any) -> dict[str, Any]:
    """Return what a model's graph holds, and how close it is to the model."""
    same = min(map(_error_db, _floats(outputs_of(model, test)), _floats(outputs_of(captured, test))))
    return {
        "same_db": "exact" if math.isinf(same) else round(same), "layers": len(wiring.layers(captured)),
        "products": len(captured.calls(Product)), "blocks": len(find_blocks(captured)),
    }  # fmt: skip


def through(captured: GraphModel, parts: list[Any], test: Any) -> dict[str, Any]:
    """Take one model the whole way and return its figures.

    Args:
        captured: its graph.
        parts: batches of the calibration set.
        test: inputs that were not calibrated on.
    """
    exact = outputs_of(captured, test)
    noisy = outputs_of(captured, with_noise(test))
    one_pass = _work(lambda: [outputs_of(captured, part) for part in parts])
    # As in conf/model: RepQ-ViT's method for models with attention.
    plain = quantize(captured, parts, "repq" if captured.calls(Product) else "percentile")
    figures: dict[str, Any] = {"noise_db": round(centred_sqnr_db(exact, noisy), 2)}
    figures |= {"ptq_db": round(centred_sqnr_db(exact, outputs_of(plain, test)), 2)}
    compensated = {method: copy.deepcopy(plain) for method in (["qwt"] if plain.quantization.blocks else []) + ["cwac"]}
    for method, qmodel in compensated.items():
        work = _work(lambda: compensate(qmodel, parts, method))  # noqa: B023 - called at once
        figures[f"{method}_passes"] = round(work / one_pass, 2)
        figures[f"{method}_db"] = round(centred_sqnr_db(exact, outputs_of(qmodel, test)), 2)
    folded = fold(compensated["cwac"])
    simulated = _floats(outputs_of(folded, test))
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(folded, Path(folder) / "model.onnx", first(test, 2))
        for engine in ENGINES:
            figures[f"{engine}_db"] = round(min(map(_error_db, simulated, _on(path, engine, test))), 1)
    info = folded.quantization
    return figures | {
        "integer_macs_percent": round(100 * (1 - sum(info.float_macs.values()) / (info.total_macs or 1)), 2),
        "float_modules": "; ".join(f"{name}: {reason}" for name, reason in info.float_modules.items())[:500],
    }


def _on(path: Path, engine: str, inputs: Any) -> list[np.ndarray]:
    feeds = {n: t.numpy() for n, t in inputs.items()} if isinstance(inputs, dict) else inputs.numpy()
    outputs = load_engine(path, engine)(feeds)
    arrays = outputs.values() if isinstance(outputs, dict) else [outputs]
    return [np.asarray(array) for array in arrays if array.dtype.kind == "f"]


def _floats(outputs: list[Any]) -> list[np.ndarray]:
    return [y.numpy() for y in outputs if isinstance(y, Tensor) and y.is_floating_point()]


def _error_db(exact: np.ndarray, found: np.ndarray) -> float:
    return sqnr_db(found, exact)


def _work(action: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def _seconds(action: Callable[[], Any]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


if __name__ == "__main__":
    main()
