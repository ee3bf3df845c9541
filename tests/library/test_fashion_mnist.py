"""Fashion-MNIST's IDX files, written here by the format's description."""

import gzip
import struct

import numpy as np
import pytest

from qwt2.data import open_dataset, write_dataset
from qwt2.data.fashion_mnist import read_idx
from qwt2.errors import Qwt2Error

COUNTS = {"train": 12, "t10k": 5}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "idx"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in COUNTS.items():
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(count, dtype=np.uint8) % 10)))
    return folder


@pytest.fixture
def cfg(root):
    return {
        "name": "fashion_mnist", "path": str(root), "num_classes": 10, "train_images": None, "val_images": None,
        "seed": 0,
    }  # fmt: skip


def test_images_and_labels_come_in_the_files_order_and_normalised(cfg, root, tmp_path):
    write_dataset(cfg, tmp_path / "out")
    dataset = open_dataset(cfg, tmp_path / "out")
    assert dataset.num_classes == 10 and dataset.labels("train").tolist() == [*range(10), 0, 1]
    images = dataset.images("train", np.arange(12))
    assert images.shape == (12, 1, 28, 28) and images.dtype == np.float32
    pixels = np.frombuffer((root / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).astype(np.float64)
    expected = ((pixels - pixels.mean()) / pixels.std()).reshape(images.shape)
    np.testing.assert_allclose(images, expected, atol=1e-4)  # the stored moments have six decimals
    assert dataset.size("val") == 5


def test_fewer_images_are_drawn_by_the_seed(cfg, tmp_path):
    drawn = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_dataset(cfg | {"train_images": 6, "seed": seed}, tmp_path / name)
        drawn[name] = open_dataset(cfg, tmp_path / name).images("train", np.arange(6))
    assert np.array_equal(drawn["a"], drawn["b"]) and not np.array_equal(drawn["a"], drawn["c"])


def _replace(name, change):
    def apply(root):
        path = root / name
        path.write_bytes(change(path.read_bytes()))

    return apply


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_replace(IMAGES, lambda b: b[:-1]), rf"{IMAGES} has 9423 bytes, which its header does not ask for"),
        (_replace(IMAGES, lambda b: b + b"x"), rf"{IMAGES} has 9425 bytes, which its header does not ask for"),
        (_replace(IMAGES, lambda b: b[:7]), rf"{IMAGES} has 7 bytes, which its header does not ask for"),
        (_replace(IMAGES, lambda b: b""), rf"{IMAGES} has 0 bytes, which its header does not ask for"),
        (
            _replace(IMAGES, lambda b: b"\x89PNG" + b[4:]),
            r"begins with 0x89504e47, but an IDX file of 3 axes of bytes with 0x00000803",
        ),
        (_replace(LABELS, lambda b: b[:-9]), rf"{LABELS} cannot be decompressed \("),
        (_replace(LABELS, lambda b: b"no gzip"), rf"{LABELS} cannot be decompressed \("),
        (_replace(LABELS, lambda b: gzip.compress(idx(np.zeros(3, np.uint8)))), r"has 12 images, but .* has 3 labels"),
        (
            _replace(LABELS, lambda b: gzip.compress(idx(np.full(12, 10, np.uint8)))),
            r"has the label 10, but data.num_classes is 10",
        ),
        (
            lambda root: [
                _replace(IMAGES, lambda b: idx(np.zeros((0, 28, 28), np.uint8)))(root),
                _replace(LABELS, lambda b: gzip.compress(idx(np.zeros(0, np.uint8))))(root),
            ],
            rf"{IMAGES} holds no images",
        ),
        (
            _replace(IMAGES, lambda b: idx(np.zeros((12, 32, 32), np.uint8))),
            r"training images have 32x32 pixels, but t10k's 28x28",
        ),
        (_replace(IMAGES, lambda b: b[:16] + b"\x07" * (12 * 784)), r"every pixel of the training images is 7"),
        (
            lambda root: (root / LABELS).unlink(),
            r"has no file train-labels-idx1-ubyte, bare or as \.gz.*dataset-fashion-mnist",
        ),
    ],
)
def test_a_damaged_or_missing_file_is_named_and_nothing_is_written(cfg, root, tmp_path, damage, sentence):
    damage(root)
    with pytest.raises(Qwt2Error, match=sentence):
        write_dataset(cfg, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bytes_are_read_in_the_shape_of_the_header(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "x").write_bytes(idx(array))
    assert np.array_equal(read_idx(tmp_path / "x", axes=3), array)
