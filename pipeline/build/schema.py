"""The configuration's keys and their types, so that a mistake is found before anything runs.

Options of PTQ methods and compensations, model arguments and bit widths are checked by the library, which
defines them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from pipeline.tasks import WEIGHTS, model_schema, task_of
from qwt2.data import DATASETS
from qwt2.errors import Qwt2Error

# Whole numbers that may be 0. Every other one counts something and is at least 1.
_FROM_ZERO = ("seed", "seeds", "warmup_steps")


@dataclass
class PTQ:
    """Keys of ``ptq``."""

    method: str = MISSING
    simulated: list[str] = MISSING
    target: str = MISSING
    rotate: bool = MISSING


@dataclass
class Calibration:
    """Keys of ``calibration``."""

    images: int = MISSING
    batch_size: int = MISSING
    observer_images: int = MISSING


@dataclass
class Latency:
    """Keys of ``evaluate.latency``."""

    batch_size: int = MISSING
    threads: int = MISSING
    repeats: int = MISSING
    instances: int = MISSING


@dataclass
class Evaluate:
    """Keys of ``evaluate``."""

    engines: list[str] = MISSING
    batch_size: int = MISSING
    mismatch_images: int = MISSING
    latency: Latency = MISSING


@dataclass
class Config:
    """Keys of a cell. The task and the dataset give the schemas of ``model`` and ``data``."""

    threads: int = MISSING
    workers: int = MISSING
    seeds: list[int] = MISSING
    data: Any = MISSING
    model: Any = MISSING
    ptq: PTQ = MISSING
    precision: dict[str, Any] = MISSING
    compensation: dict[str, Any] = MISSING
    simulated: list[str] = MISSING
    calibration: Calibration = MISSING
    evaluate: Evaluate = MISSING


def check(cfg: DictConfig) -> dict[str, Any]:
    """Return the composed configuration as plain, fully resolved values of the declared types.

    Raises:
        Qwt2Error: a key does not exist, is not set, or holds a value of the wrong type; the message names it.
    """
    task = task_of(cfg.model)
    name = cfg.data.name
    datasets = {known: DATASETS.get(known) for known in DATASETS.names() if task == DATASETS.get(known).TASK}
    if name not in datasets:
        raise Qwt2Error(f"data.name is {name!r}; for {task}, choose one of {', '.join(datasets)}")
    schema = OmegaConf.structured(
        Config(data=OmegaConf.structured(datasets[name]), model=OmegaConf.structured(model_schema(cfg.model)))
    )
    try:
        values = OmegaConf.to_container(OmegaConf.merge(schema, cfg), resolve=True, throw_on_missing=True)
    except ConfigKeyError as error:
        known = ", ".join(field.name for field in fields(error.object_type))
        raise Qwt2Error(f"the configuration has no key {error.full_key!r}; the keys there are: {known}") from error
    except MissingMandatoryValue as error:
        raise Qwt2Error(f"the configuration's {error.full_key!r} is not set; give it a value") from error
    except OmegaConfBaseException as error:
        raise Qwt2Error(
            f"the configuration's {error.full_key!r} cannot be used: {error.msg.splitlines()[0]}"
        ) from error
    for key, value in _whole_numbers(values):
        least = 0 if key.split(".")[-1] in _FROM_ZERO else 1
        if value < least:
            raise Qwt2Error(f"the configuration's {key!r} is {value}, but must be at least {least}")
    _check_weights(values["model"])
    if unknown := [name for name in values["simulated"] if name not in values["compensation"]]:
        known = ", ".join(values["compensation"])
        raise Qwt2Error(f"the configuration's 'simulated' names {unknown[0]!r}; the cell's compensations are: {known}")
    return values


def _check_weights(model: Mapping[str, Any]) -> None:
    """Require exactly one source of weights: training, timm, a file, or the user's own function."""
    known = [f"model.{key}" for key in WEIGHTS if key in model]
    sources = [key for key in known if model[key.removeprefix("model.")]]
    if len(sources) > 1 or (not sources and "factory" not in model):
        raise Qwt2Error(
            f"model {model['name']} needs exactly one source of weights ({', '.join(known[:-1])} or "
            f"{known[-1]}), but has {' and '.join(sources) or 'none'}"
        )


def _whole_numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield the dotted key and value of every whole number that this file declares."""
    for name, value in values.items():
        key = prefix + name
        if isinstance(value, Mapping) and key not in ("model.kwargs", "model.options", "precision", "compensation"):
            yield from _whole_numbers(value, f"{key}.")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int) and not isinstance(item, bool):
                yield key, item
