"""Classification: timm's classifiers and the user's own models, scored by top-1 and top-5."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.common.stage import Cell
from pipeline.tasks import TASKS, Figures, Task, calibration_batches
from qwt2.data import open_dataset
from qwt2.data.dataset import UNLABELLED
from qwt2.errors import Qwt2Error
from qwt2.evaluation.metrics import agreement_percent, sqnr_db, topk_percent
from qwt2.io import read_array, write_array

if TYPE_CHECKING:
    from torch import nn

    from qwt2.capture.batch import Inputs
    from qwt2.engines import Engine


@dataclass
class Train:
    """Keys of ``train`` in the configuration of a classifier."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    label_smoothing: float
    autocast: bool
    seed: int


@dataclass
class TimmModel:
    """Keys of a timm model's configuration."""

    name: str
    timm: str
    kwargs: dict[str, Any]
    pretrained: bool
    checkpoint: str | None
    train: Train | None


@dataclass
class OwnModel:
    """Keys of the configuration of the user's own PyTorch model.

    Without ``checkpoint`` and ``train``, the function that makes the model also loads its weights.
    """

    name: str
    factory: str  # package.module:function, which returns the nn.Module
    kwargs: dict[str, Any] = field(default_factory=dict)  # the function's arguments
    image_size: int = 224  # images of a folder are resized to this, and normalised as ImageNet's
    checkpoint: str | None = None
    train: Train | None = None


@TASKS.register("classification")
class Classification(Task):
    """Networks that take images and give one score per class."""

    NAME = "classification"
    MODELS = {"timm": TimmModel, "factory": OwnModel}
    DELTAS = {"top1": "engine_top1_delta"}

    def __init__(self, cfg: Any, cell: Cell):
        super().__init__(cfg, cell)
        self.dataset = open_dataset(cfg["data"], self.folder, cfg["model"])

    def trained(self) -> nn.Module:
        from qwt2.classification.models import build_model
        from qwt2.classification.training import train

        training = self.cfg["model"]["train"]
        settings = {**self.cfg["model"], "num_classes": self.dataset.num_classes}
        model = build_model(settings, training["seed"] if training else 0)
        return train(model, self.dataset, training) if training else model

    def baseline(self) -> nn.Module:
        from qwt2.classification.models import build_model, load_weights

        classes = self.cfg["data"]["num_classes"]
        model = build_model({**self.cfg["model"], "pretrained": False, "checkpoint": None, "num_classes": classes})
        load_weights(model, self.cell.baseline / "model.safetensors")
        return model

    def predict(self, network: nn.Module, path: Path) -> None:
        """Store the logits (N, classes), float32, as ``.npy``.

        Raises:
            Qwt2Error: they hold NaN or infinity.
        """
        from qwt2.classification.training import predict

        logits = predict(network, self.dataset)
        if not np.isfinite(logits).all():
            raise Qwt2Error(f"{path}: the model's logits hold NaN or infinity; check the weights and the precision.")
        write_array(path.with_suffix(".npy"), logits)

    def fp32_figures(self) -> Figures:
        return self._accuracy(self._reference)

    def figures(self, path: Path) -> Figures:
        return self._compared(self._stored(path))

    def scores(self, path: Path) -> np.ndarray:
        """Return 100 for every labelled image that is classified correctly, else 0, float32 (labelled images,)."""
        labels = self.dataset.labels("val")
        known = labels != UNLABELLED
        return 100 * (self._stored(path)[known].argmax(1) == labels[known]).astype(np.float32)

    def engine_figures(self, engines: dict[str, Engine]) -> Figures:
        [model] = engines.values()
        batches = self.dataset.array_batches("val", self.cfg["evaluate"]["batch_size"])
        return self._compared(np.concatenate([model(images) for images, _ in batches]))

    def _compared(self, logits: np.ndarray) -> Figures:
        distance = {
            "agreement": agreement_percent(logits, self._reference), "logits_sqnr_db": sqnr_db(logits, self._reference)
        }  # fmt: skip
        return self._accuracy(logits) | distance

    @cached_property
    def _reference(self) -> np.ndarray:
        """Logits (N, classes) of the full-precision network."""
        return self._stored(self.cell.predictions)

    def _accuracy(self, logits: np.ndarray) -> Figures:
        labels = self.dataset.labels("val")
        known = labels != UNLABELLED
        return {f"top{k}": topk_percent(logits[known], labels[known], k) for k in (1, 5)}

    def _stored(self, path: Path) -> np.ndarray:
        return read_array(path.with_suffix(".npy"))

    def calibration(self, network: nn.Module, seed: int) -> list[Inputs]:
        return calibration_batches(self.cfg, self.dataset, seed)

    def example(self, network: nn.Module) -> Inputs:
        images, _ = next(self.dataset.batches("val", 2))
        return images

    def mismatch_inputs(self, network: nn.Module) -> Inputs:
        images, _ = next(self.dataset.batches("val", self.cfg["evaluate"]["mismatch_images"]))
        return images

    def latency_input(self, batch_size: int) -> np.ndarray:
        images, _ = next(self.dataset.array_batches("val", batch_size))
        return images
