"""The handwritten digits' scans of 8 x 8 pixels, as training data of diffusion models; scikit-learn carries them.

``train.safetensors`` and ``val.safetensors`` hold ``images`` (N, 1, 8, 8), float32 in [-1, 1], and ``labels`` (N,).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwt2.data import DATASETS
from qwt2.data.digits import CLASSES, read_scans, split_sources
from qwt2.errors import Qwt2Error
from qwt2.io import load_arrays, save_arrays

SIZE = 8  # pixels


@DATASETS.register("digit_scans")
@dataclass
class DigitScans:
    """The dataset and the keys of its configuration.

    Attributes:
        name: "digit_scans".
        val_images: number of scans to keep of the validation split; the training split is kept whole.
        seed: seed of the split.
    """

    TASK: ClassVar[str] = "diffusion"
    name: str
    val_images: int
    seed: int

    @staticmethod
    def write(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
        """Split the scans as :mod:`qwt2.data.digits` does, and store both splits in random order.

        Raises:
            Qwt2Error: the validation split has fewer scans than ``val_images``.
        """
        scans, labels = read_scans()
        rows = split_sources(labels, cfg["seed"])
        if cfg["val_images"] > len(rows["val"]):
            raise Qwt2Error(
                f"data.val_images is {cfg['val_images']}, but there are {len(rows['val'])} scans for validation"
            )
        rng = np.random.default_rng(cfg["seed"])
        chosen = {split: rng.permutation(rows[split]) for split in ("train", "val")}
        chosen["val"] = chosen["val"][: cfg["val_images"]]
        for split, index in chosen.items():
            images = 2 * scans[index, None] - 1
            save_arrays(Path(folder) / f"{split}.safetensors", {"images": images, "labels": labels[index]})

    @staticmethod
    def open(
        cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any] | None
    ) -> dict[str, dict[str, np.ndarray]]:
        """Return the arrays of each split."""
        return {split: load_arrays(Path(folder) / f"{split}.safetensors") for split in ("train", "val")}


NUM_CLASSES = len(CLASSES)
