"""Stage `resolve`: compose the Hydra configuration of every grid cell into one small file per stage and cell.

DVC watches those files. Each holds only the keys that its stage reads, so that a change re-runs the stages
that read it and no others. For code, code.yaml does the same: one hash a stage, of the source files that it runs
(`pipeline.imports`); sources.yaml lists those files, each with its hash and the stages that run it.
"""

import re
import sys
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig

from pipeline import imports
from pipeline.schema import check
from pipeline.stage import RESOLVED, config_path, task_of
from qwt2.engines import ENGINES
from qwt2.errors import Qwt2Error, guarded
from qwt2.io import write_text
from qwt2.quantization.precision import Precision

CONF = Path("conf")

# By the task: what builds the network, without where its weights come from.
_ARCHITECTURES = {
    "classification": ("model.name", "model.timm", "model.kwargs"),
    "detection": tuple(f"model.{key}" for key in ("name", "mmdet", "options", "parts", "boxes", "mask_boxes")),
}
_ARCHITECTURE = "the keys of the task in _ARCHITECTURES"
# What each stage reads: dotted keys of the composed configuration.
KEYS = {
    "data": ("datasets",),
    "baseline": ("threads", "data", "model"),
    "ptq": ("threads", "workers", "seeds", "data", "calibration", _ARCHITECTURE, "ptq", "precision"),
    "compensate": ("threads", "workers", "seeds", "data", "calibration", _ARCHITECTURE, "ptq.method", "ptq.simulated", "compensation"),
    "fold": ("threads", "workers", "seeds", "data", _ARCHITECTURE, "ptq.method", "exported", "evaluate.mismatch_images"),
    "evaluate": (
        *("threads", "workers", "seeds", "data", _ARCHITECTURE, "precision.name", "ptq.method", "ptq.simulated"),
        *("compensations", "exported", "evaluate"),
    ),
    "report": ("grid", "datasets", "models", "evaluate"),
}
# Stages by whose code DVC decides, and the modules that they run: `trial` runs others by their names.
CODE = {stage: (stage,) for stage in KEYS} | {"trial": ("trial", *(stage for stage in KEYS if stage != "report"))}


def resolve(overrides: list[str] | None = None) -> dict[Path, str]:
    """The resolved files of the whole grid: path -> YAML text.

    Raises:
        Qwt2Error: a group option, key or value that does not exist; the message lists what does.
    """
    grid = read_grid()
    overrides = overrides or []
    files: dict[Path, str] = {}
    shared: dict[str, Any] = {"datasets": {}, "models": {}}
    for model in grid["model"]:
        for precision in grid["precision"]:
            cfg = compose_cell([f"model={model}", f"precision={precision}", *overrides])
            shared["datasets"] |= cfg["datasets"]
            shared["models"][model] = {
                "task": cfg["task"], "dataset": cfg["data"]["name"], "calibration_images": cfg["calibration"]["images"],
                "latency_repeats": cfg["evaluate"]["latency"]["repeats"],
            }  # fmt: skip
            shared["evaluate"] = cfg["evaluate"]
            files[config_path("baseline", model)] = select(cfg, "baseline")
            for stage in ("ptq", "compensate", "fold", "evaluate"):
                files[config_path(stage, f"{model}-{precision}")] = select(cfg, stage)
    files[config_path("data")] = select(shared, "data")
    files[config_path("report")] = select(shared | {"grid": grid}, "report")
    for task in {facts["task"] for facts in shared["models"].values()}:
        models = [model for model in grid["model"] if shared["models"][model]["task"] == task]
        files[config_path("report", task)] = select(shared | {"grid": grid | {"model": models}}, "report")
    return files


def code() -> dict[Path, str]:
    """Hashes of the code of every stage, and the files that they are made of: path -> YAML text."""
    files: dict[str, dict[str, Any]] = {}
    for stage, modules in CODE.items():
        for name, digest in imports.sources(modules).items():
            files.setdefault(name, {"sha256": digest, "stages": []})["stages"].append(stage)
    hashes = {stage: imports.fingerprint(modules) for stage, modules in CODE.items()}
    texts = {"code": yaml.safe_dump({"code": hashes}), "sources": yaml.safe_dump(files, default_flow_style=None)}
    return {config_path(name): text for name, text in texts.items()}


def read_grid() -> dict[str, list[str]]:
    """The models and precisions of conf/grid.yaml; Qwt2Error if it does not name some of each."""
    path = CONF / "grid.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        grid = {key: [str(name) for name in content["grid"][key]] for key in ("model", "precision")}
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise Qwt2Error(f"{path} must hold `grid:` with lists `model` and `precision`") from error
    if not all(grid.values()):
        raise Qwt2Error(f"{path} must name at least one model and one precision")
    return grid


def cells_of(task: str) -> list[str]:
    """The grid's cells whose models are of `task`; Qwt2Error where there are none."""
    files = resolve()
    if config_path("report", task) not in files:
        raise Qwt2Error(f"the grid has no model of task {task!r}; use classification or detection")
    grid = yaml.safe_load(files[config_path("report", task)])["grid"]
    return [f"{model}-{precision}" for model in grid["model"] for precision in grid["precision"]]


def compose_cell(overrides: list[str]) -> dict[str, Any]:
    """One cell's configuration, `checked`."""
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            composed = compose("config", overrides)
    except (HydraException, yaml.YAMLError) as error:
        raise Qwt2Error(one_sentence(error, overrides)) from error
    return checked(composed)


def checked(composed: DictConfig) -> dict[str, Any]:
    """A composed cell as plain values, names and types checked.

    `compensations` lists the names under `compensation`, `exported` those of them that engines run: CWAC on whole
    blocks cannot be folded and stays in simulation.
    """
    cfg = check(composed)
    Precision(**{key: value for key, value in cfg["precision"].items() if key != "name"})
    for engine in cfg["evaluate"]["engines"]:
        ENGINES.get(engine)
    exported = [name for name, options in cfg["compensation"].items() if options.get("granularity") != "block"]
    return cfg | {
        "compensations": list(cfg["compensation"]), "exported": exported, "datasets": {cfg["data"]["name"]: cfg["data"]},
        "task": task_of(cfg["model"]),
    }  # fmt: skip


def one_sentence(error: Exception, overrides: list[str]) -> str:
    """Hydra spreads its advice over several lines; keep what names the problem and the valid options."""
    text = str(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: no valid YAML ({error.problem})"
    if found := re.search(r"In '[^']+': Could not find '(?P<what>[^']+)'(?P<rest>.*)", text, re.S):
        options = re.findall(r"^\s+(\S+)$", found["rest"], re.M)
        group = found["what"].rpartition("/")[0]
        return f"conf has no {found['what']!r}; the options of group {group!r} are: {', '.join(sorted(options)) or 'none'}"
    if found := re.match(r"Could not override '(?P<key>[^']+)'\.\s+To append", text):
        return f"the configuration has no key {found['key']!r}; see conf/ for those there are, or add it with +{found['key']}="
    return f"the configuration with {' '.join(overrides)} cannot be composed: {text.splitlines()[0]}"


def select(cfg: dict[str, Any], stage: str) -> str:
    """The keys that `stage` declares, as YAML."""
    chosen: dict[str, Any] = {}
    keys = [key for entry in KEYS[stage] for key in (_ARCHITECTURES[cfg["task"]] if entry is _ARCHITECTURE else (entry,))]
    for key in keys:
        *parents, last = key.split(".")
        source, target = cfg, chosen
        for parent in parents:
            source, target = source[parent], target.setdefault(parent, {})
        target[last] = source[last]
    return yaml.safe_dump(chosen, sort_keys=True)


def main(arguments: list[str]) -> None:
    """Write the resolved files, and remove those that no cell of the grid has any more.

    With the name of a task as argument, print the stages that evaluate its cells instead.
    """
    if arguments:
        print(*(f"evaluate@{cell}" for cell in cells_of(arguments[0])))
        return
    files = resolve() | code()
    for path in set(RESOLVED.glob("*.yaml")) - set(files):
        path.unlink()
    for path, text in files.items():
        write_text(path, text)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
