"""What every stage shares: its resolved configuration, its folders, and how it fails."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.warm import delegate
from qwt2.errors import Qwt2Error, guarded

OUT = Path("out")
RESOLVED = OUT / "resolved"


class Declared(dict):
    """A resolved configuration. It holds the keys that `pipeline.resolve` declares for the stage, and no others."""

    def __missing__(self, key: str) -> Any:
        raise KeyError(f"{key!r} is not among the keys this stage declares in pipeline/resolve.py")


@dataclass(frozen=True)
class Cell:
    """One cell of the grid.

    Attributes:
        name: of the cell, `<model>-<precision>`, or of the model alone in stage `baseline`.
        model: name of the model.
    """

    name: str
    model: str

    def folder(self, stage: str) -> Path:
        """Where `stage` puts this cell's outputs."""
        return OUT / stage / self.name

    @property
    def baseline(self) -> Path:
        return OUT / "baseline" / self.model

    @property
    def predictions(self) -> Path:
        """Where what the full-precision model predicts is stored; the task chooses the suffix."""
        return self.baseline / "predictions"

    def quantized(self, variant: str, method: str, seed: int) -> Path:
        """The stored model of plain PTQ (`method` is "ptq") or of a compensation, at one calibration seed."""
        if method == "ptq":
            return self.folder("ptq") / f"{variant}-seed{seed}.safetensors"
        return self.folder("compensate") / f"{variant}+{method}-seed{seed}.safetensors"

    def onnx(self, method: str, seed: int, part: str = "") -> Path:
        """The exported file of a method at one calibration seed, or of one part of the model."""
        return self.folder("fold") / (f"{method}-seed{seed}" + (f".{part}" if part else "") + ".onnx")


def run_stage(stage: str, main: Callable[[Declared, Cell], None], runs_networks: bool = False) -> None:
    """Run `main` on the configuration of the cell named on the command line, if any.

    A user's mistake is printed as one sentence with exit code 2, and what the stage had written so far is
    removed. A stage that `runs_networks` starts warm where it can (`pipeline.warm`).
    """
    if runs_networks and (code := delegate()) is not None:
        raise SystemExit(code)
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    guarded(lambda: _run(stage, name, main))


def _run(stage: str, name: str, main: Callable[[Declared, Cell], None]) -> None:
    cfg = load_config(stage, name)
    set_threads(cfg.get("threads", 1))
    cell = Cell(name, cfg.get("model", {}).get("name", ""))
    try:
        main(cfg, cell)
    except BaseException:
        shutil.rmtree(cell.folder(stage), ignore_errors=True)
        raise


def load_config(stage: str, cell: str = "") -> Declared:
    """The keys declared for `stage`, resolved for `cell`."""
    path = config_path(stage, cell)
    if not path.is_file():
        raise Qwt2Error(f"{path} does not exist; run `dvc repro`, which resolves the configuration first")
    return _declared(yaml.safe_load(path.read_text(encoding="utf-8")))


def config_path(stage: str, cell: str = "") -> Path:
    return RESOLVED / (f"{stage}@{cell}.yaml" if cell else f"{stage}.yaml")


def set_threads(count: int) -> None:
    """Limit every numeric library to `count` threads; of those already imported, torch alone obeys."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def _declared(value: Any) -> Any:
    if isinstance(value, dict):
        return Declared({key: _declared(item) for key, item in value.items()})
    return value
