"""What the stages that run networks share: the baseline, its data, and simulation on the validation set."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.stage import Cell
from qwt2.data import Dataset, open_dataset
from qwt2.errors import Qwt2Error
from qwt2.io import write_array
from qwt2.models import build_model, load_weights
from qwt2.training import predict


def baseline(cfg: Any, cell: Cell) -> nn.Module:
    """The full-precision model of a cell with the weights that stage `baseline` stored."""
    settings = {**cfg["model"], "pretrained": False, "checkpoint": None, "num_classes": cfg["data"]["num_classes"]}
    model = build_model(settings)
    load_weights(model, cell.baseline / "model.safetensors")
    return model


def open_cell_dataset(cfg: Any, cell: Cell) -> Dataset:
    return open_dataset(cfg["data"], cell.data / cfg["data"]["name"], cfg["model"])


def calibration_batches(cfg: Any, dataset: Dataset, seed: int) -> list[Tensor]:
    """The calibration set of one seed in batches; the remainder that fills no batch makes a smaller one."""
    images, batch_size = cfg["calibration"]["images"], cfg["calibration"]["batch_size"]
    if images < batch_size:
        raise Qwt2Error(
            f"calibration.images is {images}, less than one batch of calibration.batch_size {batch_size}; "
            "give more images or smaller batches."
        )
    return list(dataset.calibration(images, seed).split(batch_size))


def simulate(model: nn.Module, dataset: Dataset, path: Path) -> None:
    """Store a model's logits on the validation set, (N, classes) float32."""
    logits = predict(model, dataset)
    if not torch.isfinite(torch.from_numpy(logits)).all():
        raise Qwt2Error(f"{path}: the model's logits hold NaN or infinity; check the weights and the precision.")
    write_array(path, logits)
