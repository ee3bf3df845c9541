"""The interface between the stages and a task: networks, calibration inputs, predictions and their figures.

There is one file per task, registered under the task's name in the results. The files import torch inside their
methods, because stages that resolve the configuration or run engines do without it.
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
# Keys of a model's configuration that say where its weights come from. All other keys build the network.
WEIGHTS = ("pretrained", "checkpoint", "train")


def task_of(model: Mapping[str, Any]) -> str:
    """Return the name of a model's task, which the key that names the model's architecture decides.

    Raises:
        Qwt2Error: the configuration has no such key; the message lists the known ones.
    """
    for name in TASKS.names():
        if TASKS.get(name).MODELS.keys() & model.keys():
            return name
    known = ", ".join(key for name in TASKS.names() for key in TASKS.get(name).MODELS)
    raise Qwt2Error(f"model {model.get('name', '')} does not say what to build; give it one of the keys: {known}")


def model_schema(model: Mapping[str, Any]) -> type:
    """Return the dataclass whose fields are the keys of a model's configuration."""
    schemas = TASKS.get(task_of(model)).MODELS
    return next(schema for key, schema in schemas.items() if key in model)


def architecture_keys(model: Mapping[str, Any]) -> list[str]:
    """Return the keys of a checked configuration that build the network, without those that name its weights."""
    return [key for key in model if key not in WEIGHTS]


def open_task(cfg: Any, cell: Cell) -> Task:
    """Create the task of a resolved configuration."""
    return TASKS.get(task_of(cfg["model"]))(cfg, cell)


class Task(ABC):
    """One model and its data: in full precision, quantized, and on engines.

    Args:
        cfg: the resolved configuration of a stage.
        cell: where the stage reads and writes files.

    Attributes:
        NAME: the task's name in the results.
        MODELS: the key that names an architecture -> the dataclass of all keys of such a model's configuration.
        DELTAS: accuracy metric -> the metric that holds an engine's difference from the simulation.
        TIMED: the file whose latency is measured, named as in ``Cell.onnx``.
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
        """Train or load the full-precision network, as the configuration says."""

    @abstractmethod
    def baseline(self) -> nn.Module:
        """Return the full-precision network with the weights that stage ``baseline`` stored."""

    def weights(self, network: nn.Module) -> dict[str, Any]:
        """Return the tensors that stage ``baseline`` stores and :meth:`baseline` loads."""
        return network.state_dict()

    @abstractmethod
    def predict(self, network: nn.Module, path: Path) -> None:
        """Store a network's predictions on the validation set in ``path``, with a suffix that the task chooses."""

    @abstractmethod
    def fp32_figures(self) -> Figures:
        """Return the full-precision network's accuracy, from its stored predictions."""

    @abstractmethod
    def figures(self, path: Path) -> Figures:
        """Return a quantized network's accuracy and its distance from full precision, from its stored predictions."""

    @abstractmethod
    def scores(self, path: Path) -> np.ndarray:
        """Return each image's part in the main figure of stored predictions, float32 (images,); the mean is the figure.

        A figure that is no mean over images is one part, (1,).
        """

    @abstractmethod
    def calibration(self, network: nn.Module, seed: int) -> Iterable[Inputs]:
        """Return the batches of one seed's calibration set; ``network`` is the full-precision one."""

    def captured(self, network: nn.Module) -> GraphModel:
        """Capture the graph of the full-precision network; a stage does so once."""
        from qwt2.capture.export import capture

        return capture(network, self.example(network))

    @abstractmethod
    def example(self, network: nn.Module) -> Inputs:
        """Return inputs of a validation image's size."""

    def quantized_parts(self, network: nn.Module) -> list[str] | None:
        """Return the names of the modules to quantize, or ``None`` for all."""
        return None

    @abstractmethod
    def mismatch_inputs(self, network: nn.Module) -> Inputs:
        """Return the inputs on which engine and simulation are compared module by module."""

    def exporters(self, captured: GraphModel, inputs: Inputs) -> dict[str, FileExporter]:
        """Return one exporter per file of an exported model, by the file's name in ``Cell.onnx``."""
        return {"": FileExporter(inputs)}

    def load_for_engines(self) -> None:  # noqa: B027 - a task may have nothing to load
        """Load what the processes that run engines share, before they are forked."""

    def files(self) -> list[str]:
        """Return the names of an exported model's files, as in ``Cell.onnx``."""
        return [""]

    def scored_files(self, seed: int) -> list[str]:
        """Return the names of the files that accuracy on engines is measured with."""
        return self.files()

    @abstractmethod
    def engine_figures(self, engines: dict[str, Engine]) -> Figures:
        """Return the accuracy of a model whose files run on engines, given by file name."""

    @abstractmethod
    def latency_input(self, batch_size: int) -> np.ndarray | dict[str, np.ndarray]:
        """Return the input batch with which the file ``TIMED`` is called."""

    def write_pictures(self, path: Path, predictions: Mapping[str, Path]) -> None:  # noqa: B027 - or to draw
        """Draw stored predictions, given by heading, side by side; a task may have nothing to draw."""


def calibration_size(cfg: Any) -> tuple[int, int]:
    """Return the number of calibration images and the batch size; the last batch may be smaller.

    Raises:
        Qwt2Error: there are fewer images than one batch holds.
    """
    images, batch_size = cfg["calibration"]["images"], cfg["calibration"]["batch_size"]
    if images < batch_size:
        raise Qwt2Error(
            f"calibration.images is {images}, less than one batch of calibration.batch_size {batch_size}; "
            "give more images or smaller batches."
        )
    return images, batch_size


def calibration_batches(cfg: Any, dataset: Any, seed: int) -> list[Inputs]:
    """Return the batches of one seed's calibration set."""
    images, batch_size = calibration_size(cfg)
    return list(dataset.calibration(images, seed).split(batch_size))
