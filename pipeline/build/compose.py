"""The configuration of one cell: composed from conf/ by Hydra, checked, and reduced to what each stage reads."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig

from pipeline.build.code_hashes import digest
from pipeline.build.schema import check
from pipeline.experimental import diffusion, language, zero_shot  # noqa: F401 - they register themselves
from pipeline.tasks import TASKS, architecture_keys, task_of
from qwt2.engines import ENGINES
from qwt2.errors import Qwt2Error
from qwt2.quantization.precision import Precision

CONF = Path("conf")
EXPERIMENTAL = "pipeline.experimental"  # tasks that run in sweeps and trials only

# The dotted keys of the composed configuration that each stage reads. `_ARCHITECTURE` stands for the model's keys that
# build the network, without those that say where its weights come from.
_ARCHITECTURE = "model.<architecture>"
KEYS = {
    "data": ("datasets",),
    "baseline": ("threads", "data", "model"),
    "quantize": (
        *("threads", "workers", "seeds", "data", "calibration", _ARCHITECTURE, "ptq", "precision", "compensation"),
        *("exported", "evaluate.mismatch_images"),
    ),
    "evaluate": (
        *("threads", "workers", "seeds", "data", _ARCHITECTURE, "precision.name", "ptq.method", "ptq.simulated"),
        *("ptq.rotate", "compensations", "evaluate"),
    ),
    "report": ("grid", "datasets", "models", "evaluate"),
}


def read_grid() -> dict[str, list[str]]:
    """Read the models and precisions of conf/grid.yaml.

    Raises:
        Qwt2Error: the file is damaged or names no model or no precision.
    """
    path = CONF / "grid.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        grid = {key: [str(name) for name in content["grid"][key]] for key in ("model", "precision")}
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise Qwt2Error(f"{path} must hold `grid:` with lists `model` and `precision`") from error
    if not all(grid.values()):
        raise Qwt2Error(f"{path} must name at least one model and one precision")
    return grid


def compose_cell(overrides: list[str]) -> dict[str, Any]:
    """Compose and check one cell's configuration.

    Args:
        overrides: Hydra overrides.

    Returns:
        See :func:`checked`.

    Raises:
        Qwt2Error: it cannot be composed, or a value is wrong.
    """
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            composed = compose("config", overrides)
    except (HydraException, yaml.YAMLError) as error:
        raise Qwt2Error(one_sentence(error, overrides)) from error
    return checked(composed)


def checked(composed: DictConfig) -> dict[str, Any]:
    """Check a composed cell's names and types and return it as plain values.

    Four keys are added: ``compensations`` (the names under ``compensation``), ``exported`` ("ptq" and the compensations
    that get files for engines; empty if no engine is to run), ``datasets`` and ``task``.

    Raises:
        Qwt2Error: a key, name or value is wrong.
    """
    cfg = check(composed)
    if "factory" in cfg["model"]:
        cfg["model"]["source"] = _source(cfg["model"]["factory"])
    Precision(**{key: value for key, value in cfg["precision"].items() if key != "name"})
    for engine in cfg["evaluate"]["engines"]:
        ENGINES.get(engine)
    exported = ["ptq", *(name for name in cfg["compensation"] if name not in cfg["simulated"])]
    return cfg | {
        "compensations": list(cfg["compensation"]), "exported": exported if cfg["evaluate"]["engines"] else [],
        "datasets": {cfg["data"]["name"]: cfg["data"]}, "task": task_of(cfg["model"]),
    }  # fmt: skip


def is_experimental(task: str) -> bool:
    """Return whether a task runs in sweeps and trials only; no other stage's code hash covers it."""
    return TASKS.get(task).__module__.startswith(f"{EXPERIMENTAL}.")


def _source(factory: str) -> str:
    """Hash the file that defines the user's own model, which is not part of this project's code."""
    module = factory.partition(":")[0]
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise Qwt2Error(
            f"model.factory is {factory!r}, but there is no module {module!r}; give package.module:function"
        )
    return digest(Path(spec.origin))


def one_sentence(error: Exception, overrides: list[str]) -> str:
    """Shorten an error of Hydra or YAML to one sentence that names the problem and the valid options."""
    text = str(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: no valid YAML ({error.problem})"
    if found := re.search(r"In '[^']+': Could not find '(?P<what>[^']+)'(?P<rest>.*)", text, re.S):
        options = re.findall(r"^\s+(\S+)$", found["rest"], re.M)
        group = found["what"].rpartition("/")[0]
        return (
            f"conf has no {found['what']!r}; the options of group {group!r} are: {', '.join(sorted(options)) or 'none'}"
        )
    if found := re.match(r"Could not override '(?P<key>[^']+)'\.\s+To append", text):
        key = found["key"]
        return f"the configuration has no key {key!r}; see conf/ for those there are, or add it with +{key}="
    return f"the configuration with {' '.join(overrides)} cannot be composed: {text.splitlines()[0]}"


def select(cfg: dict[str, Any], stage: str) -> str:
    """Return the keys that ``stage`` declares, as YAML."""
    chosen: dict[str, Any] = {}
    for key in _keys(cfg, stage):
        *parents, last = key.split(".")
        source, target = cfg, chosen
        for parent in parents:
            source, target = source[parent], target.setdefault(parent, {})
        target[last] = source[last]
    return yaml.safe_dump(chosen, sort_keys=True)


def _keys(cfg: dict[str, Any], stage: str) -> list[str]:
    keys = list(KEYS[stage])
    if _ARCHITECTURE in keys:
        place = keys.index(_ARCHITECTURE)
        keys[place : place + 1] = [f"model.{key}" for key in architecture_keys(cfg["model"])]
    return keys
