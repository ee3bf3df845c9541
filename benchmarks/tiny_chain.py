"""The whole chain at a tiny size, in a separate repository; it takes seconds instead of minutes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "conf",
    "pipeline",
    "qwt2",
    "dvc.yaml",
    "params.yaml",
    "requirements.lock",
    ".dvc/config",
    ".dvc/plots.html",
    ".dvcignore",
    ".gitignore",
)

NARROW = {"resnet_micro": {"channels": [8, 8, 16, 16]}, "vit_micro": {"embed_dim": 24, "depth": 2}}


def make(folder: Path, models: tuple[str, ...] = ("resnet_micro",)) -> Path:
    """Make a Git repository with the project's sources and a small grid, and return ``folder``."""
    for source in SOURCES:
        target = folder / source
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, target)
    edit(folder / "conf/grid.yaml", lambda c: c["grid"].update(model=list(models), precision=["w3a3"]))
    edit(folder / "conf/data/digits.yaml", lambda c: c.update(train_images=256, val_images=64))
    edit(folder / "conf/config.yaml", _shrink)
    for model in models:
        edit(folder / f"conf/model/{model}.yaml", lambda c: c["train"].update(steps=3, batch_size=16))
        edit(folder / f"conf/model/{model}.yaml", lambda c, narrow=NARROW[model]: c["kwargs"].update(narrow))
    run(folder, sys.executable, "-m", "pipeline.sweeps.params", f"model={models[0]}", "precision=w3a3", "seed=1")
    run(folder, "git", "init", "--quiet")
    return folder


def edit(path: Path, change: Callable[[dict], None]) -> None:
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def environment(folder: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": paths, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def run(folder: Path, *command: str, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run a command in ``folder`` with its sources; if it fails, the error holds its output."""
    options = {"env": environment(folder), "capture_output": True, "text": True} | options
    done = subprocess.run(command, cwd=folder, **options)
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def _shrink(config: dict) -> None:
    config["seeds"] = [0, 1]
    config["calibration"].update(images=32, batch_size=8, observer_images=8)
    config["evaluate"]["mismatch_images"] = 2
    config["evaluate"]["latency"].update(repeats=5, instances=2)
