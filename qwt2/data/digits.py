"""Embedded dataset: real handwritten digits, warped and composed into 32x32 colour images.

The only input is the file of 1,797 8x8 scans that scikit-learn ships (UCI "Optical Recognition of
Handwritten Digits"), so nothing is downloaded. Scans are split between training and validation *before*
images are made from them, so that no validation image shows a scan that a training image shows.

Each image is one scan, enlarged, warped (rotation, scale, shear, shift, smooth displacement) and drawn in a
random bright colour over a random darker background (colour ramp, smooth texture, sensor noise).

The dataset's folder holds:

* ``train.safetensors`` and ``val.safetensors``, each with ``images`` (N, 3, H, W) uint8, ``labels`` (N,)
  int64 and ``sources`` (N,) int64, the row of the scan in scikit-learn's file;
* ``dataset.json``: ``name``, ``classes``, ``mean`` and ``std`` (per channel, of the training images / 255),
  and the settings that the images were made with.
"""

import gzip
import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwt2.data import DATASETS
from qwt2.data.dataset import Dataset
from qwt2.errors import Qwt2Error
from qwt2.extras import extra
from qwt2.io import load_arrays, read_json, save_arrays, write_json

CLASSES = [str(digit) for digit in range(10)]
VALIDATION_FRACTION = 0.2
_ENLARGE = 4  # spline enlargement of the 8x8 scans before the (bilinear) warp
_CHUNK = 1000  # images that are made at once; limits memory to about 100 MB


@DATASETS.register("digits")
@dataclass
class Digits:
    """The dataset and the keys of its configuration.

    Attributes:
        name: "digits".
        num_classes: 10.
        image_size: height and width of the images, in pixels.
        train_images, val_images: number of images to make for each split.
        seed: seed of the split and of the images.
    """

    TASK: ClassVar[str] = "classification"
    name: str
    num_classes: int
    image_size: int
    train_images: int
    val_images: int
    seed: int

    @staticmethod
    def write(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
        """See :func:`write_digits`."""
        write_digits(cfg, folder)

    @staticmethod
    def open(cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any] | None) -> Dataset:
        """Return the stored dataset."""
        return DigitsDataset(folder)


class DigitsDataset(Dataset):
    """The stored digits dataset, held in memory as uint8."""

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        description = read_json(folder / "dataset.json")
        self.classes = description["classes"]
        self._mean = np.asarray(description["mean"], np.float32).reshape(3, 1, 1)
        self._std = np.asarray(description["std"], np.float32).reshape(3, 1, 1)
        self._splits = {split: load_arrays(folder / f"{split}.safetensors") for split in ("train", "val")}

    def labels(self, split: str) -> np.ndarray:
        """See :meth:`qwt2.data.dataset.Dataset.labels`."""
        return self._splits[split]["labels"]

    def images(self, split: str, indices: np.ndarray) -> np.ndarray:
        """See :meth:`qwt2.data.dataset.Dataset.images`."""
        pixels = self._splits[split]["images"][indices].astype(np.float32) / 255
        return (pixels - self._mean) / self._std


def write_digits(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Make the dataset and store it.

    Args:
        cfg: ``train_images``, ``val_images``, ``image_size``, ``num_classes`` and ``seed``; see :class:`Digits`.
        folder: the output folder.

    Raises:
        Qwt2Error: ``num_classes`` is not 10, or a split has fewer images than classes.
    """
    if cfg["num_classes"] != len(CLASSES):
        raise Qwt2Error(f"data.num_classes is {cfg['num_classes']}, but the digits have {len(CLASSES)} classes")
    for key in ("train_images", "val_images"):
        if not cfg[key] or cfg[key] < len(CLASSES):
            raise Qwt2Error(f"data.{key} is {cfg[key]}; the digits dataset needs at least {len(CLASSES)}")
    folder = Path(folder)
    scans, labels = read_scans()
    sources = split_sources(labels, cfg["seed"])
    moments = {}
    for number, split in enumerate(("train", "val")):
        rng = np.random.default_rng([cfg["seed"], number])
        chosen = _balanced_draw(labels, sources[split], cfg[f"{split}_images"], rng)
        images = render(scans[chosen], cfg["image_size"], rng)
        save_arrays(
            folder / f"{split}.safetensors",
            {"images": images, "labels": labels[chosen], "sources": chosen},
        )
        moments[split] = _channel_moments(images)
    mean, std = moments["train"]
    settings = {key: cfg[key] for key in ("train_images", "val_images", "image_size", "seed")}
    write_json(folder / "dataset.json", {"name": "digits", "classes": CLASSES, "mean": mean, "std": std} | settings)


def read_scans() -> tuple[np.ndarray, np.ndarray]:
    """Read scikit-learn's digit scans from the data file of the installed package.

    Importing ``sklearn.datasets`` instead would take seconds.

    Returns:
        Scans (1797, 8, 8), float32 in [0, 1], and labels (1797,), int64.
    """
    with extra("pipeline"):
        scikit_learn = importlib.metadata.distribution("scikit-learn")
    path = Path(str(scikit_learn.locate_file("sklearn/datasets/data/digits.csv.gz")))
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return table[:, :-1].reshape(-1, 8, 8) / 16, table[:, -1].astype(np.int64)


def split_sources(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Split scans into ``train`` and ``val`` with the same share of every class.

    Args:
        labels: labels (N,) of the scans.
        seed: seed of the split.

    Returns:
        Split -> row numbers of its scans, int64. The splits are disjoint.
    """
    rng = np.random.default_rng(seed)
    train, val = [], []
    for digit in range(len(CLASSES)):
        rows = rng.permutation(np.flatnonzero(labels == digit))
        held_out = round(len(rows) * VALIDATION_FRACTION)
        val.append(rows[:held_out])
        train.append(rows[held_out:])
    return {"train": np.concatenate(train), "val": np.concatenate(val)}


def render(scans: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw each scan (N, 8, 8) in [0, 1] as a colour image (N, 3, size, size), uint8."""
    parts = [scans[start : start + _CHUNK] for start in range(0, len(scans), _CHUNK)]
    return np.concatenate([_render_chunk(part, size, rng) for part in parts])


def _balanced_draw(labels: np.ndarray, rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw ``count`` of the rows with repetition, in random order, with class counts that differ by at most 1."""
    digits = rng.permutation(np.arange(count) % len(CLASSES))
    chosen = np.empty(count, np.int64)
    for digit in range(len(CLASSES)):
        places = digits == digit
        chosen[places] = rng.choice(rows[labels[rows] == digit], places.sum())
    return chosen


def _render_chunk(scans: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    ink = warped_ink(scans, size, rng)[:, None]
    background = background_texture(len(scans), size, rng)
    colour = ink_colour(background.mean(axis=(2, 3)), rng)[:, :, None, None]
    # Opacity varies per image, as in scans; a fully opaque digit would be a flat cut-out.
    opacity = ink * rng.uniform(0.75, 1.0, (len(scans), 1, 1, 1)).astype(np.float32)
    image = background * (1 - opacity) + colour * opacity
    image += rng.normal(0, 1, image.shape).astype(np.float32) * _per_image(rng, len(scans), 0.01, 0.06)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def warped_ink(scans: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Warp scans (N, 8, 8) and return the ink's coverage of every pixel (N, size, size), in [0, 1]."""
    with extra("pipeline"):
        from scipy.ndimage import map_coordinates

    count, margin = len(scans), 2
    # A margin of empty cells, because the warp may read beyond the scan and must find paper there.
    padded = np.pad(scans, ((0, 0), (margin, margin), (margin, margin)))
    large = np.clip(_enlarged(padded, padded.shape[-1] * _ENLARGE, order=3), 0, 1)

    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5  # canvas coordinates, -0.5 .. 0.5
    canvas = np.stack(np.meshgrid(axis, axis, indexing="ij"))  # (2, size, size): y, x
    shift = rng.uniform(-0.06, 0.06, (count, 2, 1, 1)).astype(np.float32)
    points = np.einsum("nij,jyx->niyx", _inverse_affine(count, rng), canvas) - shift
    points += _smooth_field(count, 2, size, cells=4, rng=rng) * 0.025

    # The scan's 8 cells span -0.5 .. 0.5, and the margin lies around them.
    cells = (points + 0.5) * 8 + margin
    index = np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None], (count, size, size))
    coordinates = [index, cells[:, 0] * _ENLARGE - 0.5, cells[:, 1] * _ENLARGE - 0.5]
    ink = map_coordinates(large, coordinates, order=1, mode="constant")
    # Steepen the grey ramp of the low-resolution scan into a pen stroke of varying thickness.
    threshold = rng.uniform(0.40, 0.60, (count, 1, 1)).astype(np.float32)
    return np.clip((ink - threshold) * 3 + 0.5, 0, 1)


def _inverse_affine(count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw random maps (N, 2, 2) from canvas to scan coordinates: rotation, anisotropic scale and shear."""
    angle = rng.uniform(-0.20, 0.20, count)  # radians, about 11 degrees
    scale = rng.uniform(0.80, 1.05, (count, 1)) * rng.uniform(0.93, 1.07, (count, 2))
    shear = rng.uniform(-0.15, 0.15, count)
    cos, sin, one, zero = np.cos(angle), np.sin(angle), np.ones(count), np.zeros(count)
    rotation = np.stack([cos, -sin, sin, cos], axis=-1).reshape(-1, 2, 2)
    slant = np.stack([one, zero, shear, one], axis=-1).reshape(-1, 2, 2)
    return ((slant @ rotation) / scale[:, :, None]).astype(np.float32)


def background_texture(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw backgrounds (N, 3, size, size): a base colour, a linear ramp and two octaves of smooth texture."""
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    direction = rng.uniform(-0.2, 0.2, (count, 3, 2, 1, 1)).astype(np.float32)
    ramp = direction[:, :, 0] * axis[:, None] + direction[:, :, 1] * axis[None, :]
    base = rng.uniform(0.05, 0.40, (count, 3, 1, 1)).astype(np.float32)
    coarse = _smooth_field(count, 3, size, cells=4, rng=rng) * _per_image(rng, count, 0.0, 0.06)
    fine = _smooth_field(count, 3, size, cells=10, rng=rng) * _per_image(rng, count, 0.0, 0.06)
    return np.clip(base + ramp + coarse + fine, 0, 1)


def ink_colour(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw colours (N, 3) that are brighter by 0.45 to 0.75 than the mean background colours (N, 3)."""
    # Always brighter: learning both polarities would lengthen training far more than it adds to the benchmark.
    colour = background + rng.uniform(0.45, 0.75, (len(background), 1))
    return np.clip(colour + rng.uniform(-0.15, 0.15, colour.shape), 0, 1).astype(np.float32)


def _smooth_field(count: int, channels: int, size: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Draw smooth random fields (N, channels, size, size) of about unit variance, with ``cells`` knots per axis."""
    return _enlarged(rng.normal(0, 1, (count, channels, cells, cells)).astype(np.float32), size, order=1)


def _enlarged(images: np.ndarray, size: int, order: int) -> np.ndarray:
    """Enlarge square images (..., n, n) to (..., size, size) by splines of the given order.

    Interpolation is linear and separable. Two products with the matrix that enlarges the identity therefore give the
    same result as ``zoom`` on each image, many times faster.
    """
    with extra("pipeline"):
        from scipy.ndimage import zoom

    cells = images.shape[-1]
    matrix = zoom(np.eye(cells), (size / cells, 1), order=order, grid_mode=True, mode="nearest")
    matrix = matrix.astype(np.float32)
    return matrix @ images @ matrix.T


def _per_image(rng: np.random.Generator, count: int, low: float, high: float) -> np.ndarray:
    return rng.uniform(low, high, (count, 1, 1, 1)).astype(np.float32)


def _channel_moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of uint8 images, in units of the full range.

    They come from exact integer sums, so that they do not depend on the order of summation.
    """
    pixels = images.size // 3
    sums = images.sum(axis=(0, 2, 3), dtype=np.int64)
    squares = np.square(images, dtype=np.int64).sum(axis=(0, 2, 3))
    mean = sums / pixels
    std = np.sqrt(squares / pixels - mean**2)
    return (mean / 255).round(6).tolist(), (std / 255).round(6).tolist()
