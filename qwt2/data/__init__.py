"""Datasets, one file each, registered under the name that configurations use.

What is registered is a dataclass whose fields are the keys of the dataset's configuration. It has:

* ``TASK``: name of the task whose models take it;
* ``write(cfg, folder)``: check the data that `cfg` describes and store in `folder` what later steps need of it;
* ``open(cfg, folder, model)``: the stored dataset; `model` is the model's configuration.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from qwt2.data.dataset import Dataset
from qwt2.registry import Registry

__all__ = ["DATASETS", "Dataset", "open_dataset", "write_dataset"]

DATASETS: Registry[Any] = Registry("dataset", __name__, "qwt2.datasets")


def write_dataset(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Prepare the dataset that `cfg` describes and store what later steps need of it in `folder`."""
    DATASETS.get(cfg["name"]).write(cfg, folder)


def open_dataset(cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any] | None = None) -> Any:
    """Open a dataset that `write_dataset` stored in `folder`.

    Args:
        cfg: the dataset's configuration.
        folder: where it was stored.
        model: the model's configuration. `imagefolder` needs it, because every model has its own input transform; the
            digits are stored as their models expect them.

    Returns:
        A `Dataset` of images with classes, or :class:`qwt2.data.coco.Scenes` for detectors.
    """
    return DATASETS.get(cfg["name"]).open(cfg, folder, model)
