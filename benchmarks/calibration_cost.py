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
from pathlib import Path

import timm
import torch
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
# Settings that the oracle does not have (gate, half precision, damping) are switched off.
OPTIONS = {"cwac": {"gate": "none"}, "qwt": {"dtype": "float32", "damping": 0.0}}
RUNS = [("quantize", "qwt2"), *((method, name) for method in OPTIONS for name in ("qwt2", "stored"))]


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
            command += [
                "--threads",
                str(arguments.threads),
                "--child",
                method,
                implementation,
                str(Path(folder) / "ptq.safetensors"),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append(
                {
                    "method": method,
                    "implementation": implementation,
                    **found,
                    **facts(arguments.images, arguments.threads),
                }
            )
            write_csv(path, sorted(rows, key=lambda row: RUNS.index((row["method"], row["implementation"]))))


def measure(method: str, implementation: str, file: str, images: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(MODEL, pretrained=False).eval()
    batches = list(photo_crops(model, images).split(BATCH))
    if method == "quantize":
        work = lambda: save_quantized(quantize(model, batches, "repq", PRECISION), file)  # noqa: E731
    else:
        work = compensation(method, implementation, load_quantized(model, file), batches)
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


def compensation(method: str, implementation: str, qmodel: torch.nn.Module, batches: list[torch.Tensor]):
    if implementation == "qwt2":
        return lambda: compensate(qmodel, batches, method, **OPTIONS[method])
    return getattr(Stored(qmodel, batches), method)


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
