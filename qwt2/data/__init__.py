"""Datasets, one module each, registered under the names that configurations use.

A dataset is registered as a dataclass whose fields are the keys of the dataset's configuration. It has:

* ``TASK``: name of the task whose models take the dataset;
* ``write(cfg, folder)``: checks the data that ``cfg`` describes, and stores in ``folder`` what later steps need;
* ``open(cfg, folder, model)``: returns the stored dataset; ``model`` is the model's configuration.
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
    """Prepare the dataset that ``cfg`` describes, and store in ``folder`` what later steps need.

    Args:
        cfg: the dataset's configuration.
        folder: the output folder.

    Raises:
        Qwt2Error: no dataset of this name is registered, or the data or settings cannot be used.
    """
    DATASETS.get(cfg["name"]).write(cfg, folder)


def open_dataset(cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any] | None = None) -> Any:
    """Open a dataset that :func:`write_dataset` stored in ``folder``.

    Args:
        cfg: the dataset's configuration.
        folder: the folder of the stored dataset.
        model: the model's configuration. ``imagefolder`` needs it, because every model has its own input transform. The
            digits are stored as their models expect them.

    Returns:
        A :class:`Dataset` of images with classes, or :class:`qwt2.data.coco.Scenes` for detectors.

    Raises:
        Qwt2Error: no dataset of this name is registered, the stored files cannot be read, or ``imagefolder`` got no
            ``model``.
    """
    return DATASETS.get(cfg["name"]).open(cfg, folder, model)
