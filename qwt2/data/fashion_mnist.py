"""Fashion-MNIST (arXiv 1708.07747) in its own IDX files: 28x28 grey photographs of clothes in ten classes.

An IDX file is big-endian: a magic number (0x00000801 for one axis of bytes, 0x00000803 for three), the length of each
axis as int32, and the values. The files may be compressed with gzip. Debian's package dataset-fashion-mnist installs
them; files of the same shapes, such as MNIST's, can be read too.

The dataset's folder holds ``train.safetensors`` and ``val.safetensors``, each with ``images`` (N, 1, 28, 28) uint8 and
``labels`` (N,) int64, and ``dataset.json`` with the mean and deviation of the training images / 255.
"""

import gzip
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwt2.data import DATASETS
from qwt2.data.configuration import DrawnFromFolder
from qwt2.data.dataset import Dataset
from qwt2.errors import Qwt2Error
from qwt2.io import load_arrays, read_json, save_arrays, write_json

CLASSES = ["T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
FILES = {"train": "train", "val": "t10k"}  # split -> how its files' names begin
_MAGIC = {1: 0x801, 3: 0x803}  # number of axes -> magic number of a file of bytes


@DATASETS.register("fashion_mnist")
@dataclass
class FashionMnist(DrawnFromFolder):
    """The dataset ``fashion_mnist`` and the keys of its configuration; ``path`` is the folder of the four IDX files."""

    TASK: ClassVar[str] = "classification"

    @staticmethod
    def write(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
        """Check the IDX files and store their images and labels.

        Raises:
            Qwt2Error: a file is missing or damaged, the files do not belong together, a label is no class, or the
                training images are all of one grey.
        """
        found = {split: _read_split(cfg, split) for split in FILES}
        pixels = found["train"]["images"]
        if pixels.shape[1:] != found["val"]["images"].shape[1:]:
            train, val = ("x".join(map(str, arrays["images"].shape[2:])) for arrays in found.values())
            raise Qwt2Error(
                f"{cfg['path']}: training images have {train} pixels, but t10k's {val}; give files of one set"
            )
        if pixels.min() == pixels.max():
            raise Qwt2Error(
                f"{cfg['path']}: every pixel of the training images is {pixels.min()}; copy the files again"
            )
        moments = {"mean": round(float(pixels.mean()) / 255, 6), "std": round(float(pixels.std()) / 255, 6)}
        for number, (split, arrays) in enumerate(found.items()):
            order = np.random.default_rng([cfg["seed"], number]).permutation(len(arrays["labels"]))
            chosen = np.sort(order[: cfg[f"{split}_images"]])
            save_arrays(Path(folder) / f"{split}.safetensors", {name: array[chosen] for name, array in arrays.items()})
        write_json(Path(folder) / "dataset.json", {"name": "fashion_mnist", "classes": CLASSES} | moments)

    @staticmethod
    def open(cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any] | None) -> Dataset:
        """Return the stored dataset."""
        return FashionMnistDataset(folder)


class FashionMnistDataset(Dataset):
    """The stored images, held in memory as uint8; they have one channel."""

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        description = read_json(folder / "dataset.json")
        self.classes = description["classes"]
        self._mean, self._std = np.float32(description["mean"]), np.float32(description["std"])
        self._splits = {split: load_arrays(folder / f"{split}.safetensors") for split in FILES}

    def labels(self, split: str) -> np.ndarray:
        """See :meth:`qwt2.data.dataset.Dataset.labels`."""
        return self._splits[split]["labels"]

    def images(self, split: str, indices: np.ndarray) -> np.ndarray:
        """See :meth:`qwt2.data.dataset.Dataset.images`."""
        return (self._splits[split]["images"][indices].astype(np.float32) / 255 - self._mean) / self._std


def _read_split(cfg: Mapping[str, Any], split: str) -> dict[str, np.ndarray]:
    folder = Path(cfg["path"]).expanduser()
    images, labels = (_find(folder, f"{FILES[split]}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    pixels, classes = read_idx(images, axes=3), read_idx(labels, axes=1)
    if len(pixels) != len(classes):
        raise Qwt2Error(
            f"{images} has {len(pixels)} images, but {labels} has {len(classes)} labels; give files of one set"
        )
    if not pixels.size:
        raise Qwt2Error(f"{images} holds no images; install or copy it again")
    if classes.max(initial=0) >= cfg["num_classes"]:
        raise Qwt2Error(
            f"{labels} has the label {classes.max()}, but data.num_classes is {cfg['num_classes']}; "
            f"labels must be from 0 to {cfg['num_classes'] - 1}"
        )
    return {"images": pixels[:, None], "labels": classes.astype(np.int64)}


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise Qwt2Error(
        f"{folder} has no file {name}, bare or as .gz; data.path must name the folder of the IDX files, which Debian's "
        "package dataset-fashion-mnist installs"
    )


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Read an IDX file of bytes, bare or compressed with gzip.

    Args:
        path: the file.
        axes: the number of axes it must have.

    Returns:
        The values, uint8.

    Raises:
        Qwt2Error: the file is cut short, has another magic number, or has values after its end.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise Qwt2Error(f"{path} cannot be decompressed ({error}); install or copy it again") from error
    header = 4 * (1 + axes)
    magic, *shape = struct.unpack(f">{1 + axes}I", content[:header].ljust(header, b"\0"))
    if len(content) >= 4 and magic != _MAGIC[axes]:
        raise Qwt2Error(
            f"{path} begins with 0x{magic:08x}, but an IDX file of {axes} axes of bytes with 0x{_MAGIC[axes]:08x}"
        )
    if len(content) < header or len(content) - header != np.prod(shape):
        raise Qwt2Error(f"{path} has {len(content)} bytes, which its header does not ask for; install or copy it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
