"""Datasets: the embedded digits and folders in ImageNet's layout, behind one interface."""

import os
from collections.abc import Mapping
from typing import Any

from qwt2.data.dataset import Dataset
from qwt2.errors import Qwt2Error

__all__ = ["Dataset", "open_dataset", "write_dataset"]

NAMES = ("digits", "imagefolder")


def write_dataset(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Prepare the dataset that `cfg` describes and store what later steps need of it in `folder`."""
    _check_name(cfg)
    if cfg["name"] == "digits":
        from qwt2.data.digits import write_digits

        write_digits(cfg, folder)
    else:
        from qwt2.data.imagefolder import write_index

        write_index(cfg, folder)


def open_dataset(
    cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any] | None = None
) -> Dataset:
    """Open a dataset that `write_dataset` stored in `folder`.

    `model` is the model's configuration (see `qwt2.models.build_model`); `imagefolder` needs it, because
    every timm model has its own input transform, the digits are stored as their models expect them.
    """
    _check_name(cfg)
    if cfg["name"] == "digits":
        from qwt2.data.digits import DigitsDataset

        return DigitsDataset(folder)
    from qwt2.data.imagefolder import ImageFolderDataset

    return ImageFolderDataset(cfg, folder, model)


def _check_name(cfg: Mapping[str, Any]) -> None:
    if cfg["name"] not in NAMES:
        raise Qwt2Error(f"unknown dataset {cfg['name']!r}; choose one of {', '.join(NAMES)}")
