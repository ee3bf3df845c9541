"""Measure how much faster several processes calibrate: ``processes-<cpu>.csv``.

The model is deit_small with random weights at 224 x 224 and W4A4. Every process has one thread. The numbers of
processes take turns, and the file has the median of the rounds.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time

import timm
import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.calibration_cost import BATCH, MODEL, PRECISION
from benchmarks.peers import photo_crops
from benchmarks.table import machine_file
from qwt2 import compensate, quantize
from qwt2.evaluation import machine
from qwt2.io import write_csv

STEPS = ("quantize", "cwac", "qwt", "refit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", action="store_true", help="measure here, as one of torchrun's processes")
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.images)
    found: dict[int, list[dict[str, float]]] = {count: [] for count in arguments.processes}
    for count in tqdm(arguments.processes * arguments.rounds, desc="processes"):
        found[count].append(measured(count, arguments.images))
    write_csv(machine_file("processes", torch="torch"), rows(found, arguments.images))


def rows(found: dict[int, list[dict[str, float]]], images: int) -> list[dict]:
    """Return a row per step and number of processes, with the seconds of the first number divided by its own."""
    described = machine.describe()
    seconds = {
        (step, count): statistics.median(one[step] for one in rounds)
        for step in STEPS
        for count, rounds in found.items()
    }
    base = next(iter(found))
    return [
        {
            "step": step, "processes": count, "seconds": round(value, 1),
            "speedup": round(seconds[step, base] / value, 2), "rounds": len(found[count]),
            "model": MODEL, "images": images, "batch": BATCH, "threads": 1,
            "cpu": described["cpu"], "torch": described["versions"]["torch"],
        }
        for (step, count), value in seconds.items()
    ]  # fmt: skip


def measured(count: int, images: int) -> dict[str, float]:
    """Return the seconds of each step with a number of processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += ["-m", "benchmarks.processes", "--child", "--images", str(images)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def child(images: int) -> None:
    """Quantize and compensate together with the other processes; the first prints the seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    model = timm.create_model(MODEL, pretrained=False).eval()
    batches = list(photo_crops(model, images).split(BATCH))
    seconds = {}
    for step in STEPS:
        dist.barrier()
        started = time.perf_counter()
        if step == "quantize":
            qmodel = quantize(model, batches, "repq", PRECISION, group=group)
        else:
            compensate(copy.deepcopy(qmodel), batches, step, group=group)
        dist.barrier()
        seconds[step] = time.perf_counter() - started
    if dist.get_rank() == 0:
        print(json.dumps(seconds), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
