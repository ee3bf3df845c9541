"""The frame of every stage: its resolved configuration, its folders, its lock and log, and how it fails."""

import argparse
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.common.folders import OUT, RESOLVED
from pipeline.common.logs import LOG, VERBOSE, log_to
from qwt2.errors import Qwt2Error, guarded


class Declared(dict):
    """A resolved configuration; it has only the keys that ``pipeline.build.compose`` declares for the stage."""

    def __missing__(self, key: str) -> Any:
        raise KeyError(f"{key!r} is not among the keys this stage declares in pipeline/build/compose.py")


@dataclass(frozen=True)
class Cell:
    """The files of one cell, which the stages read and write.

    Attributes:
        name: ``<model>-<precision>`` in the grid, or only ``<model>`` in stage ``baseline``.
        data: folder that holds one folder per dataset.
        baseline: folder of the full-precision model.
        out: folder that holds one folder per stage.
    """

    name: str
    data: Path
    baseline: Path
    out: Path = OUT

    @classmethod
    def of_grid(cls, name: str, model: str) -> "Cell":
        """Return a cell of the grid, which DVC builds below ``out/``."""
        return cls(name, OUT / "data", OUT / "baseline" / model)

    def folder(self, stage: str) -> Path:
        """Return the folder of this cell's outputs of ``stage``."""
        return self.out / stage / self.name

    @property
    def predictions(self) -> Path:
        """The file of the full-precision model's predictions, without the suffix, which the task chooses."""
        return self.baseline / "predictions"

    def quantized(self, ptq: str, method: str, seed: int) -> Path:
        """Return the file of a quantized model, plain (``method`` is "ptq") or compensated, at one calibration seed."""
        name = ptq if method == "ptq" else f"{ptq}+{method}"
        return self.folder("quantize") / f"{name}-seed{seed}.safetensors"

    def onnx(self, method: str, seed: int, part: str = "") -> Path:
        """Return a method's exported file at one calibration seed, of the whole model or of one part."""
        return self.folder("quantize") / (f"{method}-seed{seed}" + (f".{part}" if part else "") + ".onnx")


def ptq_methods(cfg: Declared) -> list[str]:
    """Return the PTQ method that engines run, followed by those that are only simulated."""
    return [cfg["ptq"]["method"], *cfg["ptq"]["simulated"]]


def ptq_label(ptq: Mapping[str, Any], method: str) -> str:
    """Return the name in the results of a PTQ method in the configuration ``ptq``; only the deployed one is rotated."""
    return f"{method}_rotated" if ptq["rotate"] and method == ptq["method"] else method


def run_stage(stage: str, main: Callable[[Declared, Cell], None]) -> None:
    """Run ``main`` on the configuration of the cell named on the command line, if any.

    A user's mistake is printed as one sentence, the exit code is 2, and the stage's unfinished outputs are removed.
    """
    options = _parser(stage).parse_args()
    if options.verbose:
        os.environ[VERBOSE] = "1"
    guarded(lambda: _run(stage, options.cell, main))


def _parser(stage: str) -> argparse.ArgumentParser:
    description = f"Stage {stage}; `dvc repro` runs it."
    parser = argparse.ArgumentParser(prog=f"python -m pipeline.stages.{stage}", description=description)
    parser.add_argument("cell", nargs="?", default="", help="<model>-<precision>, or the model in stage baseline")
    parser.add_argument("-v", "--verbose", action="store_true", help="show on stderr what goes into out/logs/")
    return parser


def _run(stage: str, name: str, main: Callable[[Declared, Cell], None]) -> None:
    cfg = load_config(stage, name)
    set_threads(cfg.get("threads", 1))
    cell = Cell.of_grid(name, cfg.get("model", {}).get("name", ""))
    label = f"{stage}@{name}" if name else stage
    with locked(OUT / "locks" / label), log_to(OUT / "logs" / f"{label}.log"):
        LOG.info("stage %s", label)
        try:
            main(cfg, cell)
        except BaseException as error:
            LOG.debug("failed", exc_info=error)
            shutil.rmtree(cell.folder(stage), ignore_errors=True)
            raise
        LOG.info("finished")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let only one process at a time into a ``with`` block; the system releases the lock when its holder dies.

    A stage goes on running when DVC is killed. The stage of the next DVC run then waits for it, so that the two do not
    write the same files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load_config(stage: str, cell: str = "") -> Declared:
    """Read the configuration of a stage, resolved for ``cell``.

    Raises:
        Qwt2Error: it was not resolved yet.
    """
    path = config_path(stage, cell)
    if not path.is_file():
        raise Qwt2Error(f"{path} does not exist; run `dvc repro`, which resolves the configuration first")
    return declared(path.read_text(encoding="utf-8"))


def config_path(stage: str, cell: str = "") -> Path:
    """Return the file of a stage's resolved configuration."""
    return RESOLVED / (f"{stage}@{cell}.yaml" if cell else f"{stage}.yaml")


def set_threads(count: int) -> None:
    """Limit every numeric library to ``count`` threads; of the libraries already imported, this reaches only torch."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def declared(text: str) -> Declared:
    """Make a resolved configuration of its YAML text."""
    return _declared(yaml.safe_load(text))


def _declared(value: Any) -> Any:
    if isinstance(value, dict):
        return Declared({key: _declared(item) for key, item in value.items()})
    return value
