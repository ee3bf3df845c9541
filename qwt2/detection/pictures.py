"""Pictures of the detections of several detectors in the same scenes: one row per scene, one column per detector."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwt2.extras import extra

with extra("detection"):
    from PIL import Image, ImageDraw

_WIDTH = 256  # width of a scene in pixels
_GAP, _HEAD = 8, 22
_COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#ffe119",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#46f0f0",
    "#f032e6",
    "#bcf60c",
    "#fabebe",
)


def draw_grid(columns: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path, classes: Sequence[str]) -> bytes:
    """Draw detections as a grid of pictures.

    Args:
        columns: heading -> the detections in each scene (:func:`qwt2.detection.scenes.shown`). All columns have the
            same scenes.
        folder: the folder of the scenes' images.
        classes: names of the classes.

    Returns:
        The bytes of a PNG file.
    """
    rows = [[_scene(found, folder, classes) for found in scene] for scene in zip(*columns.values(), strict=True)]
    heights = [max(picture.height for picture in row) for row in rows]
    size = (len(columns) * (_WIDTH + _GAP) - _GAP, _HEAD + sum(heights) + _GAP * (len(rows) - 1))
    grid = Image.new("RGB", size, "white")
    for number, heading in enumerate(columns):
        ImageDraw.Draw(grid).text((number * (_WIDTH + _GAP) + 2, 5), heading, fill="black")
    top = _HEAD
    for row, height in zip(rows, heights):
        for number, picture in enumerate(row):
            grid.paste(picture, (number * (_WIDTH + _GAP), top))
        top += height + _GAP
    buffer = io.BytesIO()
    grid.save(buffer, "PNG")
    return buffer.getvalue()


def _scene(found: Mapping[str, Any], folder: Path, classes: Sequence[str]) -> Image.Image:
    from pycocotools import mask as coco_mask

    picture = Image.open(folder / found["file"]).convert("RGB")
    factor = _WIDTH / picture.width
    for mask, label in zip(found["masks"], found["labels"]):
        inked = coco_mask.decode({"size": mask["size"], "counts": mask["counts"].encode()})
        picture.paste(_COLOURS[label % len(_COLOURS)], mask=Image.fromarray((inked * 140).astype(np.uint8)))
    picture = picture.resize((_WIDTH, round(picture.height * factor)))
    draw = ImageDraw.Draw(picture)
    for box, label, score in zip(found["boxes"], found["labels"], found["scores"]):
        left, top, right, bottom = (factor * value for value in box)
        draw.rectangle(
            (left, top, max(right, left + 1), max(bottom, top + 1)), outline=_COLOURS[label % len(_COLOURS)], width=2
        )
        draw.text((left + 3, max(top - 12, 0)), f"{classes[label]} {score:.2f}", fill="white")
    return picture
