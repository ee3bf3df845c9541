"""What the stages ask of a task, whatever its models are: networks, calibration inputs, predictions and their figures.

One file per task, registered under the name that stands in the results. The files import torch inside their methods:
the configuration is resolved, and engines are run, without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pipeline.common.stage import Cell
from pipeline.tasks.files import FileExporter
from qwt2.errors import Qwt2Error
from qwt2.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from qwt2.capture.batch import Inputs
    from qwt2.capture.graph import GraphModel
    from qwt2.engines import Engine

TASKS: Registry[type[Task]] = Registry("task", __name__, "qwt2.tasks")
Figures = dict[str, float]  # metric -> value
# Keys of a model's configuration that say where its weights come from; all others build the network.
WEIGHTS = ("pretrained", "checkpoint", "train")


def task_of(model: Mapping[str, Any]) -> str:
    """The task of a model's configuration, told by the key that names its architecture; Qwt2Error if it has none."""
    for name in TASKS.names():
        if TASKS.get(name).MODELS.keys() & model.keys():
            return name
    known = ", ".join(key for name in TASKS.names() for key in TASKS.get(name).MODELS)
    raise Qwt2Error(f"model {model.get('name', '')} does not say what to build; give it one of the keys: {known}")


def model_schema(model: Mapping[str, Any]) -> type:
    """The dataclass whose fields are the keys of a model's configuration."""
    schemas = TASKS.get(task_of(model)).MODELS
    return next(schema for key, schema in schemas.items() if key in model)


def architecture_keys(model: Mapping[str, Any]) -> list[str]:
    """The keys of a checked configuration that build a network, without where its weights come from."""
    return [key for key in model if key not in WEIGHTS]


def open_task(cfg: Any, cell: Cell) -> Task:
    """The task of a resolved configuration."""
    return TASKS.get(task_of(cfg["model"]))(cfg, cell)


class Task(ABC):
    """One model and its data, in full precision, quantized, and on engines.

    Args:
        cfg: the resolved configuration of a stage.
        cell: where the stage finds and puts files.

    Attributes:
        NAME: of the task in the results.
        MODELS: the key of a model's configuration that names its architecture -> the dataclass of all its keys.
        DELTAS: metric of accuracy -> metric of an engine's difference from the simulation in it.
        TIMED: the file whose latency is measured, as in `Cell.onnx`.
    """

    NAME: ClassVar[str]
    MODELS: ClassVar[dict[str, type]]
    DELTAS: ClassVar[dict[str, str]]
    TIMED: ClassVar[str] = ""

    def __init__(self, cfg: Any, cell: Cell):
        self.cfg, self.cell = cfg, cell
        self.folder = cell.data / cfg["data"]["name"]

    @abstractmethod
    def trained(self) -> nn.Module:
        """The full-precision network, trained or loaded as the configuration says."""

    @abstractmethod
    def baseline(self) -> nn.Module:
        """The full-precision network with the weights that stage `baseline` stored."""

    def weights(self, network: nn.Module) -> dict[str, Any]:
        """What `baseline` loads again."""
        return network.state_dict()

    @abstractmethod
    def predict(self, network: nn.Module, path: Path) -> None:
        """Store what a network predicts on the validation set, in `path` with a suffix of the task's own."""

    @abstractmethod
    def fp32_figures(self) -> Figures:
        """Accuracy of the full-precision network, from what it predicted."""

    @abstractmethod
    def figures(self, path: Path) -> Figures:
        """Accuracy of a quantized network, and its distance from the full-precision one, from what it predicted."""

    @abstractmethod
    def calibration(self, network: nn.Module, seed: int) -> Iterable[Inputs]:
        """The calibration set of one seed in batches; `network` is the full-precision one."""

    def captured(self, network: nn.Module) -> GraphModel:
        """The graph of the full-precision network, captured once for all that a stage does with it."""
        from qwt2.capture.export import capture

        return capture(network, self.example(network))

    @abstractmethod
    def example(self, network: nn.Module) -> Inputs:
        """Inputs of the size of a validation image."""

    def quantized_parts(self, network: nn.Module) -> list[str] | None:
        """Names of the modules to quantize; ``None``, all."""
        return None

    @abstractmethod
    def mismatch_inputs(self, network: nn.Module) -> Inputs:
        """Inputs on which modules are compared one by one."""

    def exporters(self, captured: GraphModel, inputs: Inputs) -> dict[str, FileExporter]:
        """One for every file of an exported model, by its name in `Cell.onnx`."""
        return {"": FileExporter(inputs)}

    def load_for_engines(self) -> None:  # noqa: B027 - a task may have nothing to load
        """Load what the processes that run engines share."""

    def files(self) -> list[str]:
        """Names of the files of an exported model, as in `Cell.onnx`."""
        return [""]

    def scored_files(self, seed: int) -> list[str]:
        """The files that accuracy on engines is taken with."""
        return self.files()

    @abstractmethod
    def engine_figures(self, engines: dict[str, Engine]) -> Figures:
        """Accuracy of a model whose files, by name, run on engines."""

    @abstractmethod
    def latency_input(self, batch_size: int) -> np.ndarray:
        """What a file in `TIMED` is called with."""

    def write_pictures(self, path: Path, predictions: Mapping[str, Path]) -> None:  # noqa: B027 - or to draw
        """Draw stored predictions, by heading, side by side, where they can be looked at."""


def calibration_size(cfg: Any) -> tuple[int, int]:
    """Number of calibration images and batch size; the remainder that fills no batch makes a smaller one."""
    images, batch_size = cfg["calibration"]["images"], cfg["calibration"]["batch_size"]
    if images < batch_size:
        raise Qwt2Error(
            f"calibration.images is {images}, less than one batch of calibration.batch_size {batch_size}; "
            "give more images or smaller batches."
        )
    return images, batch_size


def calibration_batches(cfg: Any, dataset: Any, seed: int) -> list[Inputs]:
    """The calibration set of one seed in batches."""
    images, batch_size = calibration_size(cfg)
    return list(dataset.calibration(images, seed).split(batch_size))
