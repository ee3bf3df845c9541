"""Folders in ImageNet's layout: ``<path>/train/<class>/<image>`` and ``<path>/val/<class>/<image>``.

No image is copied. Preparing the data stores ``index.json`` in the output folder:

* ``name``, and ``classes``: the sorted names of the class folders; a label is a position in this list,
* ``train`` and ``val``, each with ``files`` (relative to ``<path>/<split>``) and ``labels``,
* ``skipped``: images that are left out because they cannot be decoded.

Every image of the index was decoded once when the data was prepared, so labels, logits and images stay aligned
through all later stages.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from qwt2.data import DATASETS
from qwt2.data.configuration import DrawnFromFolder
from qwt2.data.dataset import Dataset
from qwt2.errors import Qwt2Error
from qwt2.extras import extra
from qwt2.io import read_json, write_json

with extra("timm"):
    from PIL import Image

SPLITS = ("train", "val")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")


@DATASETS.register("imagefolder")
@dataclass
class ImageFolder(DrawnFromFolder):
    """The dataset ``imagefolder`` and the keys of its configuration; ``path`` is a folder in ImageNet's layout.

    Attributes:
        skip_corrupt: whether to leave out images that cannot be decoded instead of raising.
    """

    TASK: ClassVar[str] = "classification"
    skip_corrupt: bool

    @staticmethod
    def write(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
        """See :func:`write_index`."""
        write_index(cfg, folder)

    @staticmethod
    def open(cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any] | None) -> Dataset:
        """Return the images of the stored index, transformed as the model expects them."""
        if model is None:
            raise Qwt2Error("imagefolder: every model has its own input transform; give open_dataset the model too")
        return ImageFolderDataset(cfg, folder, model)


class ImageFolderDataset(Dataset):
    """The indexed images, which are decoded on access and pass through timm's transform of the model."""

    def __init__(self, cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any]):
        from qwt2.data.transforms import evaluation_transform

        self._index = read_json(Path(folder) / "index.json")
        self._root = _root(cfg)
        self._transform = evaluation_transform(model)
        self._labels = {split: np.asarray(self._index[split]["labels"], np.int64) for split in SPLITS}
        self.classes = self._index["classes"]

    def labels(self, split: str) -> np.ndarray:
        """See :meth:`qwt2.data.dataset.Dataset.labels`."""
        return self._labels[split]

    def images(self, split: str, indices: np.ndarray) -> np.ndarray:
        """See :meth:`qwt2.data.dataset.Dataset.images`."""
        files = self._index[split]["files"]
        paths = [self._root / split / files[index] for index in indices]
        return np.stack([self._transform(read_image(path)).numpy() for path in paths])


def write_index(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Index the images below ``cfg["path"]`` and store the index in ``folder``.

    Args:
        cfg: ``path``, ``num_classes``, ``train_images``, ``val_images``, ``seed`` and ``skip_corrupt``; see
            :class:`ImageFolder`.
        folder: the output folder.

    Raises:
        Qwt2Error: a folder is missing or empty, the classes do not agree, or an image cannot be decoded; the message
            names it.
    """
    root = _root(cfg)
    classes = _class_names(root / "train")
    if (found := _class_names(root / "val")) != classes:
        odd = sorted(set(classes) ^ set(found))
        raise Qwt2Error(
            f"{root}: train and val must have the same class folders, but only one has {', '.join(odd[:5])}"
        )
    if len(classes) != cfg["num_classes"]:
        raise Qwt2Error(
            f"{root} has {len(classes)} classes, but data.num_classes is {cfg['num_classes']}; "
            "set it to the number of class folders, and use a model with as many outputs"
        )
    number_of = {name: number for number, name in enumerate(classes)}
    index: dict[str, Any] = {"name": "imagefolder", "classes": classes, "skipped": []}
    for number, split in enumerate(SPLITS):
        files = _files(root / split, classes)
        if (count := cfg[f"{split}_images"]) is not None:
            chosen = np.random.default_rng([cfg["seed"], number]).permutation(len(files))[:count]
            files = [files[index] for index in sorted(chosen)]
        corrupt = _undecodable(root / split, files, skip=cfg["skip_corrupt"])
        files = [file for file in files if file not in corrupt]
        if not files:
            raise Qwt2Error(f"{root / split}: no image is left to use; check data.{split}_images and the images")
        index[split] = {"files": files, "labels": [number_of[file.partition("/")[0]] for file in files]}
        index["skipped"] += [f"{split}/{file}" for file in sorted(corrupt)]
    write_json(Path(folder) / "index.json", index)


def read_image(path: Path, mode: str = "RGB") -> Image.Image:
    """Decode an image of any colour mode (CMYK, grayscale, palette, ...).

    Args:
        path: the image file.
        mode: "RGB", or "L" for grayscale.

    Raises:
        Qwt2Error: the file is missing or cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except FileNotFoundError as error:
        raise Qwt2Error(f"{path} does not exist any more; prepare the data again (dvc repro --force data)") from error
    # Pillow's decoders raise any of these for a damaged file.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise Qwt2Error(f"{path} cannot be decoded ({error}); repair or remove it") from error


def _root(cfg: Mapping[str, Any]) -> Path:
    if not cfg["path"]:
        raise Qwt2Error("data.path is not set; it must name a folder that holds train/<class>/ and val/<class>/")
    return Path(cfg["path"]).expanduser()


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise Qwt2Error(f"{folder} is not a folder; data.path must name a folder with train/<class>/ and val/<class>/")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise Qwt2Error(f"{folder} has no class folders; images belong into {folder}/<class>/")
    return classes


def _files(folder: Path, classes: list[str]) -> list[str]:
    """Return the images of all classes, relative to ``folder``, sorted."""
    files = []
    for name in classes:
        names = sorted(entry.name for entry in os.scandir(folder / name) if entry.name.lower().endswith(SUFFIXES))
        if not names:
            raise Qwt2Error(f"{folder / name} holds no images ({', '.join(SUFFIXES)}); add some or remove the folder")
        files += [f"{name}/{file}" for file in names]
    return files


def _undecodable(folder: Path, files: list[str], skip: bool) -> set[str]:
    """Decode every file, and return the files that fail; without ``skip``, raise at the first of them."""
    corrupt = set()
    for file in tqdm(files, f"check {folder.name}", unit="image", disable=None):
        try:
            read_image(folder / file)
        except Qwt2Error as error:
            if not skip:
                raise Qwt2Error(f"{error}, or set data.skip_corrupt to true") from error
            corrupt.add(file)
    return corrupt
