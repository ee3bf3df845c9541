"""Train the grid's networks anew with the kernels of other CPUs and quantize them as the grid does (``retrained.csv``).

Another CPU rounds sums in another order. Training then ends in another network, whose figures differ by more than
calibration seeds explain. The verdict after a rebuild (``pipeline.comparison.verdict``) takes this spread from here. To
imitate another CPU, PyTorch and oneDNN are limited to a part of this CPU's instruction sets.

``python -m benchmarks.retrained MODEL ...`` measures only these models and keeps the rows of the others.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.build.compose import compose_cell, read_grid, select
from pipeline.common.stage import Cell, declared, set_threads
from pipeline.comparison.verdict import RETRAINED
from qwt2.report.metrics import HEADLINE, METRICS
from qwt2.report.results import Row, read_rows, write_rows

# Name of the kernels -> the limits, which the libraries read when they are loaded.
KERNELS = {
    "native": {},
    "no_bf16": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}
ROWS = "rows.csv"
_CHILD = "--in-this-process"


def main() -> None:
    if sys.argv[1:2] == [_CHILD]:
        model, folder = sys.argv[2:]
        return write_rows(Path(folder) / ROWS, retrained(model, Path(folder)))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrained", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models of conf/grid.yaml; default: all")
    for model in tqdm(parser.parse_args().models or read_grid()["model"], desc="models"):
        rows = [row for kernels in KERNELS for row in with_kernels(model, kernels)]
        kept = [row for row in read_rows(RETRAINED) if row.model != model] if RETRAINED.is_file() else []
        write_rows(RETRAINED, [*kept, *rows])


def with_kernels(model: str, kernels: str) -> list[Row]:
    """Return a model's accuracies; the name of the kernels stands in the column ``engine``."""
    with tempfile.TemporaryDirectory(prefix="qwt2-") as folder:
        command = [sys.executable, "-m", "benchmarks.retrained", _CHILD, model, folder]
        subprocess.run(command, env=os.environ | KERNELS[kernels], check=True, stdout=subprocess.DEVNULL)
        return [row._replace(engine=kernels) for row in read_rows(Path(folder) / ROWS)]


def retrained(model: str, folder: Path) -> Iterator[Row]:
    """Train a model, quantize it at every precision of the grid, and yield its accuracies in simulation."""
    from pipeline.stages import baseline, data
    from pipeline.stages.report import baseline_rows

    cell = Cell("", folder / "data", folder / "baseline" / model, folder)
    for number, precision in enumerate(read_grid()["precision"]):
        cfg = compose_cell([f"model={model}", f"precision={precision}", "workers=1", "ptq.simulated=[]"])
        if number == 0:
            set_threads(cfg["threads"])
            data.main(declared(select(cfg, "data")), cell)
            baseline.main(declared(select(cfg, "baseline")), cell)
            rows = baseline_rows(folder, model, cfg["task"], cfg["data"]["name"])
            yield from (row for row in rows if row.metric == HEADLINE[row.task])
        yield from quantized(cfg, cell)


def quantized(cfg: dict, cell: Cell) -> Iterator[Row]:
    """Yield the accuracy of plain PTQ and of every compensation at one precision, over the calibration seeds."""
    from pipeline.stages.quantization import PTQ, Quantization

    quantization = Quantization(declared(select(cfg, "quantize")), cell)
    quantization.quantize()
    quantization.compensate()
    ptq, metric = cfg["ptq"]["method"], HEADLINE[cfg["task"]]
    for name in (PTQ, *cfg["compensations"]):
        found = [quantization.task.figures(cell.quantized(ptq, name, seed))[metric] for seed in cfg["seeds"]]
        yield Row(
            cfg["task"], cfg["data"]["name"], cfg["model"]["name"], cfg["precision"]["name"],
            ptq if name == PTQ else f"{ptq}+{name}", "torch", metric, float(np.mean(found)),
            float(np.std(found, ddof=1)), METRICS[metric].unit, len(found),
        )  # fmt: skip


if __name__ == "__main__":
    main()
