"""Measure the cost of compensation, against an implementation that stores every output of a block.

The model is deit_small with random weights at 224 x 224 and W4A4. The other implementation (``Stored``) is also an
oracle of the tests and finds the same parameters. Each measurement runs in its own process. ``peak_rss_mb`` is the
process's peak memory as the system reports it, with libraries, network and images. ``added_mb`` is the memory that the
work itself added.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.peers import photo_crops
from benchmarks.stored import Stored
from benchmarks.table import machine_file
from pipeline.common.resources import PeakMemory
from pipeline.comparison.benchmark_tables import read_dicts
from qwt2 import Precision, compensate, load_quantized, quantize, save_quantized
from qwt2.evaluation import machine
from qwt2.io import write_csv

MODEL, PRECISION, BATCH = "deit_small_patch16_224", Precision(weight_bits=4, activation_bits=4), 32
# Settings that the oracle does not have (half precision, damping) are switched off; it fits CWAC in the paper's form.
OPTIONS: dict[str, dict] = {"cwac_paper": {}, "cwac": {}, "refit": {}, "qwt": {"dtype": "float32", "damping": 0.0}}
STORED = {"cwac_paper": Stored.cwac, "qwt": Stored.qwt}
FLOAT_PASS = "float pass"
STEPS = (FLOAT_PASS, "quantize", *OPTIONS)
RUNS = [(step, "qwt2") for step in STEPS] + [(step, "stored") for step in STORED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--own", action="store_true", help="measure only this library, and keep the file's rows of the other"
    )
    parser.add_argument("--child", nargs=3, metavar=("METHOD", "IMPLEMENTATION", "FILE"), help="measure one, here")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child, arguments.images, arguments.threads)))
        return
    path = machine_file("calibration-cost", torch="torch")
    rows = (
        [row for row in read_dicts(path) if row["implementation"] != "qwt2"] if arguments.own and path.is_file() else []
    )
    runs = [run for run in RUNS if run[1] == "qwt2" or not arguments.own]
    with tempfile.TemporaryDirectory() as folder:
        for method, implementation in tqdm(runs, desc="calibration cost"):
            command = [sys.executable, "-m", "benchmarks.calibration_cost", "--images", str(arguments.images)]
            command += ["--threads", str(arguments.threads)]
            command += ["--child", method, implementation, str(Path(folder) / "ptq.safetensors")]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            conditions = facts(arguments.images, arguments.threads)
            rows.append({"method": method, "implementation": implementation, **found, **conditions})
            write_csv(path, in_float_passes(rows))


def in_float_passes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows in order, with their CPU seconds in those of the float network's pass over the same images."""
    one_pass = next(float(row["cpu_seconds"]) for row in rows if row["method"] == FLOAT_PASS)
    for row in rows:
        row["float_passes"] = round(float(row["cpu_seconds"]) / one_pass, 2)
    return sorted(rows, key=lambda row: RUNS.index((row["method"], row["implementation"])))


def measure(method: str, implementation: str, file: str, images: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(MODEL, pretrained=False).eval()
    batches = list(photo_crops(model, images).split(BATCH))
    work = work_of(method, implementation, file, model, batches)
    started, cpu = time.perf_counter(), time.process_time()
    with PeakMemory() as memory, torch.no_grad():
        work()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_rss_mb": round(peak),
        "added_mb": round(memory.megabytes),
    }


def work_of(method: str, implementation: str, file: str, model: nn.Module, batches: list[Tensor]) -> Callable[[], Any]:
    """Return the function whose cost is measured; the network's file is read before it."""
    if method == FLOAT_PASS:
        return lambda: [model(images) for images in batches]
    if method == "quantize":
        return lambda: save_quantized(quantize(model, batches, "repq", PRECISION), file)
    qmodel = load_quantized(model, file)
    if implementation == "stored":
        return lambda: STORED[method](Stored(qmodel, batches))
    return lambda: compensate(qmodel, batches, method, **OPTIONS[method])


def facts(images: int, threads: int) -> dict:
    """Return the columns that describe a measurement's conditions, equal in every row."""
    described = machine.describe()
    return {
        "model": MODEL, "precision": f"W{PRECISION.weight_bits}A{PRECISION.activation_bits}",
        "images": images, "batch": BATCH,
        "threads": threads, "cpu": described["cpu"], "torch": described["versions"]["torch"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
