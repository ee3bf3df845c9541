"""Photographs listed in a table, some of them with a class, from a folder and from installed packages.

The table is a CSV file with the columns ``file``, ``label`` and ``class``. A file is relative to the dataset's folder,
or ``package:file`` for one that an installed package carries. A label is a class number of ImageNet, and empty where
the photograph shows none of its classes. The column ``class`` names the class for readers. Files that the table does
not list are not used.

The table of this library, ``photos.csv``, lists the photographs of Debian's package tuxpaint-stamps-default (single
objects on white; its drawings and signs are left out), of scikit-learn and of scikit-image. The labels were given by
the files' names and checked by eye. Where the species or kind is not certainly the class's, there is no label.

Calibration takes photographs without a class, and all others are validated on, so that no image is in both splits.
"""

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwt2.data import DATASETS
from qwt2.data.dataset import UNLABELLED, Dataset
from qwt2.data.imagefolder import read_image
from qwt2.errors import Qwt2Error
from qwt2.extras import extra, packaged_file
from qwt2.io import read_json, write_json

with extra("timm"):
    from PIL import Image

TABLE = Path(__file__).with_name("photos.csv")


@DATASETS.register("photos")
@dataclass
class Photos:
    """The dataset and the keys of its configuration.

    Attributes:
        name: "photos".
        path: folder of the photographs.
        table: CSV file that lists the photographs and their classes; ``None`` for this library's own.
        num_classes: number of the model's classes.
        train_images: number of photographs without a class to keep for calibration.
        seed: seed of their draw.
    """

    TASK: ClassVar[str] = "classification"
    name: str
    path: str
    table: str | None
    num_classes: int
    train_images: int
    seed: int

    @staticmethod
    def write(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
        """Check every photograph of the table, and store which are validated on and which are for calibration.

        Raises:
            Qwt2Error: the table or a photograph is missing or damaged, a label is no class, no photograph has a class,
                or too few have none.
        """
        labels = read_table(Path(cfg["table"] or TABLE), cfg["num_classes"])
        for file in labels:
            read_photo(_path(cfg, file))
        unlabelled = [file for file, label in labels.items() if label == UNLABELLED]
        if len(unlabelled) < cfg["train_images"]:
            raise Qwt2Error(
                f"photos: data.train_images is {cfg['train_images']}, but only {len(unlabelled)} photographs have no "
                "class, and calibration takes no others; set data.train_images lower"
            )
        order = np.random.default_rng(cfg["seed"]).permutation(len(unlabelled))
        train = [unlabelled[index] for index in order[: cfg["train_images"]]]
        val = [file for file in labels if file not in set(train)]
        index = {"train": dict.fromkeys(train, UNLABELLED), "val": {file: labels[file] for file in val}}
        write_json(Path(folder) / "index.json", index)

    @staticmethod
    def open(cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any] | None) -> Dataset:
        """Return the photographs of the stored index, transformed as the model expects them."""
        if model is None:
            raise Qwt2Error("photos: every model has its own input transform; give open_dataset the model too")
        return PhotosDataset(cfg, folder, model)


class PhotosDataset(Dataset):
    """The listed photographs, which are decoded on access and pass through timm's transform of the model."""

    def __init__(self, cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any]):
        from qwt2.data.transforms import evaluation_transform

        self._cfg, self._index = cfg, read_json(Path(folder) / "index.json")
        self._transform = evaluation_transform(model)
        self.classes = [str(number) for number in range(cfg["num_classes"])]

    def labels(self, split: str) -> np.ndarray:
        """See :meth:`qwt2.data.dataset.Dataset.labels`."""
        return np.fromiter(self._index[split].values(), np.int64)

    def images(self, split: str, indices: np.ndarray) -> np.ndarray:
        """See :meth:`qwt2.data.dataset.Dataset.images`."""
        files = list(self._index[split])
        return np.stack([self._transform(read_photo(_path(self._cfg, files[index]))).numpy() for index in indices])


def read_table(path: Path, num_classes: int) -> dict[str, int]:
    """Read a table of photographs.

    Args:
        path: the CSV file.
        num_classes: number of the model's classes.

    Returns:
        file -> its class number, or ``UNLABELLED``, in the table's order.

    Raises:
        Qwt2Error: the table is missing or no UTF-8, lacks a column, names a file twice or none, has a label that is no
            class, or has no label at all.
    """
    rows = _rows(path)
    if not rows or not {"file", "label"} <= rows[0].keys():
        raise Qwt2Error(f"{path} must have the columns file and label, and a row for each photograph")
    labels: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if not row["file"] or row["file"] in labels:
            problem = f"names {row['file']} a second time" if row["file"] else "names no file"
            raise Qwt2Error(f"{path}: row {number} below the headings {problem}; each photograph has one row")
        labels[row["file"]] = _label(path, row, num_classes)
    if set(labels.values()) == {UNLABELLED}:
        raise Qwt2Error(f"{path} gives no photograph a label, so no accuracy can be measured; label some of them")
    return labels


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise Qwt2Error(f"{path} does not exist; data.table must name a CSV file with the columns file and label")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets may put a byte order mark first
            return list(csv.DictReader(file))
    except UnicodeDecodeError as error:
        raise Qwt2Error(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _label(path: Path, row: Mapping[str, str], num_classes: int) -> int:
    if not row["label"]:
        return UNLABELLED
    if not row["label"].isdecimal() or int(row["label"]) >= num_classes:
        raise Qwt2Error(
            f"{path}: {row['file']} has the label {row['label']!r}, but labels are class numbers from 0 to "
            f"{num_classes - 1}; correct it, or set data.num_classes to the number of the model's classes"
        )
    return int(row["label"])


def read_photo(path: Path) -> "Image.Image":
    """Decode a photograph as RGB; where it is transparent, it is put on white.

    Raises:
        Qwt2Error: the file is missing or cannot be decoded.
    """
    photo = read_image(path, "RGBA")
    white = Image.new("RGBA", photo.size, "white")
    return Image.alpha_composite(white, photo).convert("RGB")


def _path(cfg: Mapping[str, Any], file: str) -> Path:
    """Return the path of a file of the table."""
    if ":" in file:
        return packaged_file(file)
    path = Path(cfg["path"]).expanduser() / file
    if not path.is_file():
        raise Qwt2Error(
            f"photos: {path} does not exist; data.path must name the folder that holds the files of the table "
            f"{cfg['table'] or TABLE.name} (for this library's own: Debian's package tuxpaint-stamps-default)"
        )
    return path
