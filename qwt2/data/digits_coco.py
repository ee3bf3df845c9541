"""Embedded detection data: scenes of real handwritten digits with boxes and masks, in COCO's format.

The scenes are composed of the scans of :mod:`qwt2.data.digits`, with the same split between training and validation. A
scene shows one to five digits of several sizes, warped and coloured, beside each other on a textured background. A
digit's mask is its ink, and its box is the bounding box of the mask.

The dataset's folder, which :mod:`qwt2.data.coco` reads, holds ``train/`` and ``val/`` with PNG images, ``train.json``
and ``val.json`` with annotations, and ``dataset.json``.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwt2.data import DATASETS
from qwt2.data.coco import Scenes, stored_scenes
from qwt2.data.digits import CLASSES, background_texture, ink_colour, read_scans, split_sources, warped_ink
from qwt2.errors import Qwt2Error
from qwt2.extras import extra
from qwt2.io import atomic_path, write_json, write_text

with extra("detection"):
    from PIL import Image

SIZES = (28, 36, 44, 54)  # side of a digit in pixels
MOST_DIGITS = 5
_TRIES = 20  # places that are tried for a digit before it is left out
_INKED = 0.5  # smallest coverage of a pixel that belongs to the mask


@DATASETS.register("digits_coco")
@dataclass
class DigitsCoco:
    """The dataset and the keys of its configuration.

    Attributes:
        name: "digits_coco".
        num_classes: 10.
        image_size: height and width of the scenes, in pixels.
        train_images, val_images: number of scenes to compose for each split.
        seed: seed of the split and of the scenes.
    """

    TASK: ClassVar[str] = "detection"
    name: str
    num_classes: int
    image_size: int
    train_images: int
    val_images: int
    seed: int

    @staticmethod
    def write(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
        """See :func:`write_digits_coco`."""
        write_digits_coco(cfg, folder)

    @staticmethod
    def open(cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any] | None) -> Scenes:
        """Return the stored scenes."""
        return stored_scenes(folder, Path(folder))


def write_digits_coco(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Compose the scenes and store them.

    Args:
        cfg: ``train_images``, ``val_images``, ``image_size``, ``num_classes`` and ``seed``; see :class:`DigitsCoco`.
        folder: the output folder.

    Raises:
        Qwt2Error: ``num_classes`` is not 10, a split has no images, or the images are too small for the digits.
    """
    _check(cfg)
    folder = Path(folder)
    scans, labels = read_scans()
    sources = split_sources(labels, cfg["seed"])
    for number, split in enumerate(("train", "val")):
        rng = np.random.default_rng([cfg["seed"], 2 + number])  # qwt2.data.digits uses 0 and 1
        scenes = _compose(scans, labels, sources[split], cfg[f"{split}_images"], cfg["image_size"], rng)
        (folder / split).mkdir(parents=True, exist_ok=True)
        for index, (image, _) in enumerate(scenes):
            with atomic_path(folder / split / _file_name(index)) as temporary:
                Image.fromarray(image).save(temporary)
        write_text(folder / f"{split}.json", _annotations([objects for _, objects in scenes], cfg["image_size"]))
    write_json(
        folder / "dataset.json", {"name": "digits_coco", "classes": CLASSES, "images": {s: s for s in ("train", "val")}}
    )


def _check(cfg: Mapping[str, Any]) -> None:
    if cfg["num_classes"] != len(CLASSES):
        raise Qwt2Error(f"data.num_classes is {cfg['num_classes']}, but the digits have {len(CLASSES)} classes")
    if cfg["image_size"] < 2 * SIZES[-1]:
        raise Qwt2Error(
            f"data.image_size is {cfg['image_size']}, too small for the scenes; use at least {2 * SIZES[-1]}"
        )
    for key in ("train_images", "val_images"):
        if not cfg[key] or cfg[key] < 1:
            raise Qwt2Error(f"data.{key} is {cfg[key]}; make at least one scene")


def _compose(
    scans, labels, rows, count: int, size: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, list[dict]]]:
    """Compose scenes.

    Returns:
        For every scene, an image (size, size, 3), uint8, and its objects, each with ``category``, ``source`` and
        ``mask``.
    """
    digits = rng.integers(1, MOST_DIGITS + 1, count)
    chosen, sizes = rng.choice(rows, digits.sum()), rng.choice(SIZES, digits.sum())
    inks = [np.empty(0)] * digits.sum()
    for side in SIZES:  # warp all digits of a size at once: one by one would take minutes
        places = np.flatnonzero(sizes == side)
        for place, ink in zip(places, warped_ink(scans[chosen[places]], side, rng)):
            inks[place] = ink
    scenes, first = [], 0
    for number in digits:
        background = background_texture(1, size, rng)[0]
        here = range(first, first + number)
        scenes.append(_scene(background, [(inks[i], labels[chosen[i]], chosen[i]) for i in here], rng))
        first += number
    return scenes


def _scene(background: np.ndarray, digits: list, rng: np.random.Generator) -> tuple[np.ndarray, list[dict]]:
    size = background.shape[-1]
    image, occupied, objects = background.copy(), np.zeros((size, size), bool), []
    for ink, label, source in digits:
        place = _free_place(occupied, len(ink), rng)
        if place is None:
            continue
        window = (slice(place[0], place[0] + len(ink)), slice(place[1], place[1] + len(ink)))
        occupied[window] = True
        mask = np.zeros((size, size), bool)
        mask[window] = ink >= _INKED
        if not mask.any():
            continue
        colour = ink_colour(background[None, :, *window].mean(axis=(2, 3)), rng)[0][:, None, None]
        opacity = ink * np.float32(rng.uniform(0.75, 1.0))
        image[:, *window] = image[:, *window] * (1 - opacity) + colour * opacity
        objects.append({"category": int(label), "source": int(source), "mask": mask})
    image += rng.normal(0, 1, image.shape).astype(np.float32) * np.float32(rng.uniform(0.01, 0.06))
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0), objects


def _free_place(occupied: np.ndarray, side: int, rng: np.random.Generator) -> tuple[int, int] | None:
    """Return top and left of a square without occupied pixels, or ``None`` if none is found. The first always fits."""
    for _ in range(_TRIES):
        top, left = rng.integers(0, len(occupied) - side + 1, 2)
        if not occupied[top : top + side, left : left + side].any():
            return top, left
    return None


def _annotations(scenes: list[list[dict]], size: int) -> str:
    """Return the content of COCO's annotation file. Masks are run lengths that pycocotools compresses."""
    import json

    with extra("detection"):
        from pycocotools import mask as coco_mask

    annotations: list[dict[str, Any]] = []
    for image, objects in enumerate(scenes):
        for item in objects:
            encoded = coco_mask.encode(np.asfortranarray(item["mask"].astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": item["category"],
                    "bbox": coco_mask.toBbox(encoded).tolist(),
                    "area": int(coco_mask.area(encoded)),
                    "segmentation": {"size": [size, size], "counts": encoded["counts"].decode()},
                    "iscrowd": 0,
                    "source": item["source"],
                }
            )
    images = [{"id": i, "file_name": _file_name(i), "width": size, "height": size} for i in range(len(scenes))]
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES)]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories})


def _file_name(index: int) -> str:
    return f"{index:06d}.png"
