"""Datasets: the embedded digits and folders in ImageNet's layout, behind one interface; and scenes in COCO's format."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from qwt2.data.dataset import Dataset
from qwt2.errors import Qwt2Error

__all__ = ["Dataset", "open_dataset", "write_dataset"]

CLASSIFICATION, DETECTION = ("digits", "imagefolder"), ("digits_coco", "coco")


def write_dataset(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Prepare the dataset that `cfg` describes and store what later steps need of it in `folder`."""
    _check_name(cfg, CLASSIFICATION + DETECTION)
    if cfg["name"] == "digits":
        from qwt2.data.digits import write_digits as write
    elif cfg["name"] == "digits_coco":
        from qwt2.data.digits_coco import write_digits_coco as write
    elif cfg["name"] == "coco":
        from qwt2.data.coco import write_coco as write
    else:
        from qwt2.data.imagefolder import write_index as write
    write(cfg, folder)


def open_dataset(cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any] | None = None) -> Dataset:
    """Open a dataset that `write_dataset` stored in `folder`.

    `model` is the model's configuration (see `qwt2.classification.models.build_model`); `imagefolder` needs it, because
    every timm model has its own input transform, the digits are stored as their models expect them. What detectors
    need is opened by `qwt2.data.coco.open_scenes`.
    """
    _check_name(cfg, CLASSIFICATION)
    if cfg["name"] == "digits":
        from qwt2.data.digits import DigitsDataset

        return DigitsDataset(folder)
    from qwt2.data.imagefolder import ImageFolderDataset

    if model is None:
        raise Qwt2Error("a folder of images needs the model's configuration, for the transform; give model=")
    return ImageFolderDataset(cfg, folder, model)


def _check_name(cfg: Mapping[str, Any], names: Sequence[str]) -> None:
    if cfg["name"] not in names:
        raise Qwt2Error(f"unknown dataset {cfg['name']!r}; choose one of {', '.join(names)}")
