"""Stage ``resolve``: compose the Hydra configuration of every grid cell into one small file per stage and cell.

DVC watches those files. Each holds only the keys that its stage reads, so that a change re-runs only the stages that
read it. The file code.yaml does the same for code: it has one hash per stage, of the source files that the stage runs
(``pipeline.build.code_hashes``). The stage also prints which files changed since each stage last ran
(``pipeline.build.code_changes``).
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from pipeline.build import code_changes, code_hashes
from pipeline.build.compose import compose_cell, is_experimental, read_grid, select
from pipeline.common.folders import RESOLVED
from pipeline.common.stage import config_path
from qwt2.errors import Qwt2Error, guarded
from qwt2.io import write_text


def resolve(overrides: list[str] | None = None) -> dict[Path, str]:
    """Compose the resolved files of the whole grid.

    Args:
        overrides: Hydra overrides that apply to every cell.

    Returns:
        path -> YAML text.

    Raises:
        Qwt2Error: a group option, key or value does not exist (the message lists those that do), or a model's task is
            experimental.
    """
    grid = read_grid()
    overrides = overrides or []
    files: dict[Path, str] = {}
    shared: dict[str, Any] = {"datasets": {}, "models": {}}
    for model in grid["model"]:
        for precision in grid["precision"]:
            cfg = compose_cell([f"model={model}", f"precision={precision}", *overrides])
            if is_experimental(cfg["task"]):
                raise Qwt2Error(
                    f"the grid has {model}, whose task {cfg['task']} is experimental and runs in sweeps only; take it "
                    "out of conf/grid.yaml, and see docs/reproduce.md for its experiment"
                )
            shared["datasets"] |= cfg["datasets"]
            shared["models"][model] = {
                "task": cfg["task"], "dataset": cfg["data"]["name"], "calibration_images": cfg["calibration"]["images"],
                "latency_repeats": cfg["evaluate"]["latency"]["repeats"],
            }  # fmt: skip
            shared["evaluate"] = cfg["evaluate"]
            files[config_path("baseline", model)] = select(cfg, "baseline")
            for stage in ("quantize", "evaluate"):
                files[config_path(stage, f"{model}-{precision}")] = select(cfg, stage)
    files[config_path("data")] = select(shared, "data")
    files[config_path("report")] = select(shared | {"grid": grid}, "report")
    for task in {facts["task"] for facts in shared["models"].values()}:
        models = [model for model in grid["model"] if shared["models"][model]["task"] == task]
        files[config_path("report", task)] = select(shared | {"grid": grid | {"model": models}}, "report")
    return files


def code() -> dict[Path, str]:
    """Return the file with the hash of every stage's code: path -> YAML text."""
    hashes = {stage: code_hashes.fingerprint([stage]) for stage in code_hashes.MODULES}
    return {config_path("code"): yaml.safe_dump({"code": hashes})}


def cells_of(task: str) -> list[str]:
    """Return the grid's cells whose models belong to ``task``.

    Raises:
        Qwt2Error: there are none.
    """
    files = resolve()
    if config_path("report", task) not in files:
        raise Qwt2Error(f"the grid has no model of task {task!r}; use classification or detection")
    grid = yaml.safe_load(files[config_path("report", task)])["grid"]
    return [f"{model}-{precision}" for model in grid["model"] for precision in grid["precision"]]


def main(arguments: list[str]) -> None:
    """Write the resolved files, and remove those of cells that the grid no longer has.

    If the argument is the name of a task, only print the stages that evaluate the task's cells.
    """
    if arguments:
        print(*(f"evaluate@{cell}" for cell in cells_of(arguments[0])))
        return
    files = resolve() | code()
    for path in set(RESOLVED.glob("*.yaml")) - set(files):
        path.unlink()
    for path, text in files.items():
        write_text(path, text)
    for message in code_changes.messages():
        print(message)
    code_changes.remember()


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
