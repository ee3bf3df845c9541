"""Detection data in COCO's format: a folder in COCO's own layout, or the embedded scenes.

The layout is ``<path>/annotations/instances_train2017.json`` and ``<path>/train2017/<images>``, and the same for
``val2017``. Images stay where they are. Preparing the data checks everything that later steps read. The output folder
then holds ``train.json`` and ``val.json``, the annotations of the chosen images, and ``dataset.json`` with ``name``,
``classes`` and the folders of the ``images``.

As in mmdet, readers of the annotations skip boxes that lie outside their image or have no area, and images without
objects are used for validation but not for training.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwt2.data import DATASETS
from qwt2.data.configuration import DrawnFromFolder
from qwt2.errors import Qwt2Error
from qwt2.io import read_json, write_json, write_text

SPLITS = ("train", "val")
_FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


@dataclass(frozen=True)
class Scenes:
    """The files of a prepared detection dataset.

    Attributes:
        classes: names of the classes, in the order of the models' outputs.
        annotations: split -> COCO annotation file.
        images: split -> folder of the images.
    """

    classes: list[str]
    annotations: dict[str, Path]
    images: dict[str, Path]


@DATASETS.register("coco")
@dataclass
class Coco(DrawnFromFolder):
    """The dataset ``coco`` and the keys of its configuration; ``path`` is a folder in COCO's layout."""

    TASK: ClassVar[str] = "detection"

    @staticmethod
    def write(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
        """See :func:`write_coco`."""
        write_coco(cfg, folder)

    @staticmethod
    def open(cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any] | None) -> Scenes:
        """Return the stored annotations and the folders of the images."""
        return stored_scenes(folder, _root(cfg))


def stored_scenes(folder: str | os.PathLike, root: Path) -> Scenes:
    """Return the dataset that was stored in ``folder``, with its images below ``root``."""
    folder = Path(folder)
    description = read_json(folder / "dataset.json")
    return Scenes(
        description["classes"],
        {split: folder / f"{split}.json" for split in SPLITS},
        {split: root / description["images"][split] for split in SPLITS},
    )


def write_coco(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Check COCO's files below ``cfg["path"]`` and store the chosen annotations in ``folder``.

    Args:
        cfg: ``path``, ``num_classes``, ``train_images``, ``val_images`` and ``seed``; see :class:`Coco`.
        folder: the output folder.

    Raises:
        Qwt2Error: a file cannot be used; the message names it and the image, annotation or category.
    """
    root, folder = _root(cfg), Path(folder)
    names = {split: f"{split}2017" for split in SPLITS}
    contents = {}
    for split, name in names.items():
        path = root / "annotations" / f"instances_{name}.json"
        contents[split] = read_annotations(path)
        _check_images(path, contents[split], root / name)
    classes = [category["name"] for category in contents["train"]["categories"]]
    if [category["name"] for category in contents["val"]["categories"]] != classes:
        raise Qwt2Error(f"{root}: the training and validation annotations must define the same categories in one order")
    if len(classes) != cfg["num_classes"]:
        raise Qwt2Error(
            f"{root} has {len(classes)} categories, but data.num_classes is {cfg['num_classes']}; set it to that"
        )
    for number, (split, content) in enumerate(contents.items()):
        rng = np.random.default_rng([cfg["seed"], number])
        write_text(folder / f"{split}.json", json.dumps(_drawn(content, cfg[f"{split}_images"], rng)))
    write_json(folder / "dataset.json", {"name": "coco", "classes": classes, "images": names})


def read_annotations(path: Path) -> dict[str, Any]:
    """Read a COCO annotation file and check that its parts fit each other.

    Raises:
        Qwt2Error: the file is missing, is not JSON or not in COCO's format, or has an annotation with an unknown image,
            an unknown category or an invalid box.
    """
    content = read_json(path)
    for part, keys in _FIELDS.items():
        if not isinstance(content, dict) or not isinstance(content.get(part), list) or not content[part]:
            raise Qwt2Error(f"{path} has no {part}; give a COCO instances file")
        for number, entry in enumerate(content[part]):
            if missing := [key for key in keys if not isinstance(entry, dict) or key not in entry]:
                raise Qwt2Error(f"{path}: entry {number} of {part} has no {missing[0]!r}; give a COCO instances file")
    images, categories = ({entry["id"] for entry in content[part]} for part in ("images", "categories"))
    for annotation in content["annotations"]:
        where = f"{path}: annotation {annotation['id']}"
        if annotation["category_id"] not in categories:
            raise Qwt2Error(
                f"{where} is of category {annotation['category_id']}, which the file does not define; add it"
            )
        if annotation["image_id"] not in images:
            raise Qwt2Error(
                f"{where} is of image {annotation['image_id']}, which the file does not list; add or remove it"
            )
        box = annotation["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite_number, box)):
            raise Qwt2Error(f"{where} has the box {box}; give four numbers: left, top, width and height")
    return content


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _check_images(path: Path, content: dict[str, Any], folder: Path) -> None:
    if not folder.is_dir():
        raise Qwt2Error(
            f"{folder} is not a folder; data.path must name a folder that holds annotations/, train2017/ and val2017/"
        )
    present = {entry.name for entry in os.scandir(folder)}
    for image in content["images"]:
        if image["file_name"] not in present:
            raise Qwt2Error(f"{path} lists {image['file_name']}, but {folder} does not hold it; complete the images")


def _drawn(content: dict[str, Any], count: int | None, rng: np.random.Generator) -> dict[str, Any]:
    images = content["images"]
    if count is not None:
        images = [images[index] for index in sorted(rng.permutation(len(images))[:count])]
    kept = {image["id"] for image in images}
    annotations = [annotation for annotation in content["annotations"] if annotation["image_id"] in kept]
    return {"images": images, "annotations": annotations, "categories": content["categories"]}


def _root(cfg: Mapping[str, Any]) -> Path:
    if not cfg["path"]:
        raise Qwt2Error("data.path is not set; it must name a folder that holds annotations/, train2017/ and val2017/")
    return Path(cfg["path"]).expanduser()
