"""What the stages ask of a task, whatever its models are: networks, calibration inputs, predictions and their figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.common.stage import Cell, task_of
from qwt2.capture.batch import Inputs
from qwt2.capture.graph import GraphModel
from qwt2.errors import Qwt2Error
from qwt2.io import read_array, write_array


def open_task(cfg: Any, cell: Cell) -> "Task":
    """The task of a resolved configuration."""
    if task_of(cfg["model"]) == "detection":
        from pipeline.tasks.detection import Detection

        return Detection(cfg, cell)
    return Classification(cfg, cell)


class Task(ABC):
    """One model and its data."""

    def __init__(self, cfg: Any, cell: Cell):
        self.cfg, self.folder = cfg, cell.data / cfg["data"]["name"]

    @abstractmethod
    def trained(self) -> nn.Module:
        """The full-precision network, trained or loaded as the configuration says."""

    @abstractmethod
    def baseline(self, cell: Cell) -> nn.Module:
        """The full-precision network with the weights that stage `baseline` stored."""

    def weights(self, network: nn.Module) -> dict[str, Any]:
        """What `baseline` loads again."""
        return network.state_dict()

    @abstractmethod
    def predict(self, network: nn.Module, path: Path) -> None:
        """Store what a network predicts on the validation set, in `path` with a suffix of the task's own."""

    @abstractmethod
    def figures(self, path: Path) -> dict[str, float]:
        """Metrics of what `predict` stored."""

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

    def parts(self, network: nn.Module) -> list[str] | None:
        """Names of the modules to quantize; ``None``, all."""
        return None

    @abstractmethod
    def mismatch_inputs(self, network: nn.Module) -> Inputs:
        """Inputs on which modules are compared one by one."""


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


class Classification(Task):
    """timm's classifiers."""

    def __init__(self, cfg: Any, cell: Cell):
        from qwt2.data import open_dataset

        super().__init__(cfg, cell)
        self.dataset = open_dataset(cfg["data"], self.folder, cfg["model"])

    def trained(self) -> nn.Module:
        from qwt2.classification.models import build_model
        from qwt2.classification.training import train

        training = self.cfg["model"]["train"]
        settings = {**self.cfg["model"], "num_classes": self.dataset.num_classes}
        model = build_model(settings, training["seed"] if training else 0)
        return train(model, self.dataset, training) if training else model

    def baseline(self, cell: Cell) -> nn.Module:
        from qwt2.classification.models import build_model, load_weights

        classes = self.cfg["data"]["num_classes"]
        model = build_model({**self.cfg["model"], "pretrained": False, "checkpoint": None, "num_classes": classes})
        load_weights(model, cell.baseline / "model.safetensors")
        return model

    def predict(self, network: nn.Module, path: Path) -> None:
        """Logits (N, classes) float32, `.npy`."""
        import numpy as np

        from qwt2.classification.training import predict

        logits = predict(network, self.dataset)
        if not np.isfinite(logits).all():
            raise Qwt2Error(f"{path}: the model's logits hold NaN or infinity; check the weights and the precision.")
        write_array(path.with_suffix(".npy"), logits)

    def figures(self, path: Path) -> dict[str, float]:
        from qwt2.evaluation.metrics import topk_percent

        logits, labels = read_array(path.with_suffix(".npy")), self.dataset.labels("val")
        return {f"top{k}": topk_percent(logits, labels, k) for k in (1, 5)}

    def calibration(self, network: nn.Module, seed: int) -> list[Inputs]:
        return calibration_batches(self.cfg, self.dataset, seed)

    def example(self, network: nn.Module) -> Inputs:
        images, _ = next(self.dataset.batches("val", 2))
        return images

    def mismatch_inputs(self, network: nn.Module) -> Inputs:
        images, _ = next(self.dataset.batches("val", self.cfg["evaluate"]["mismatch_images"]))
        return images
