"""The embedded digits: what they are made of, and what every dataset offers."""

import hashlib

import numpy as np
import pytest
import torch

from qwt2.data import open_dataset, write_dataset
from qwt2.data.digits import VALIDATION_FRACTION, read_scans, render, split_sources
from qwt2.errors import Qwt2Error
from qwt2.io import load_arrays, read_json

CFG = {"name": "digits", "num_classes": 10, "image_size": 32, "train_images": 200, "val_images": 95, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_dataset(CFG, folder)
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    return open_dataset(CFG, folder)


def test_scans_are_scikit_learns():
    from sklearn.datasets import load_digits

    scans, labels = read_scans()
    images, target = load_digits().images, load_digits().target
    np.testing.assert_array_equal(scans, images.astype(np.float32) / 16)
    np.testing.assert_array_equal(labels, target)


def test_no_scan_is_in_both_splits(folder):
    sources = {split: load_arrays(folder / f"{split}.safetensors")["sources"] for split in ("train", "val")}
    assert not set(sources["train"]) & set(sources["val"])


@pytest.mark.parametrize("seed", [0, 1])
def test_split_covers_every_scan_and_keeps_class_shares(seed):
    labels = read_scans()[1]
    split = split_sources(labels, seed)
    assert sorted(np.concatenate([split["train"], split["val"]])) == list(range(len(labels)))
    shares = np.bincount(labels[split["val"]]) / np.bincount(labels)
    np.testing.assert_allclose(shares, VALIDATION_FRACTION, atol=0.005)


def test_stored_format_is_as_documented(folder):
    for split in ("train", "val"):
        arrays, count = load_arrays(folder / f"{split}.safetensors"), CFG[f"{split}_images"]
        assert {name: (a.shape, str(a.dtype)) for name, a in arrays.items()} == {
            "images": ((count, 3, 32, 32), "uint8"),
            "labels": ((count,), "int64"),
            "sources": ((count,), "int64"),
        }
        np.testing.assert_array_equal(arrays["labels"], read_scans()[1][arrays["sources"]])
    assert read_json(folder / "dataset.json")["classes"] == [str(digit) for digit in range(10)]


def test_classes_are_balanced(dataset):
    counts = np.bincount(dataset.labels("val"), minlength=10)
    assert counts.min() >= 9 and counts.max() <= 10


def _hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_same_seed_same_bytes_and_another_seed_other_images(folder, tmp_path):
    write_dataset(CFG, tmp_path / "again")
    write_dataset(CFG | {"seed": 4}, tmp_path / "other")
    assert _hashes(tmp_path / "again") == _hashes(folder)
    other = load_arrays(tmp_path / "other" / "train.safetensors")["images"]
    assert (other != load_arrays(folder / "train.safetensors")["images"]).mean() > 0.9


def test_digits_stand_out_from_their_background():
    """The scan's ink brightens the image where it is drawn: mean over images, centre against border."""
    scans, labels = read_scans()
    images = render(scans[labels == 8], 32, np.random.default_rng(0)).mean(axis=(0, 1))
    border = np.concatenate([images[:2].ravel(), images[-2:].ravel()])
    assert images[10:22, 12:20].mean() > border.mean() + 40


def test_images_are_normalised_by_training_statistics(dataset):
    images = np.concatenate([images for images, _ in dataset.array_batches("train", 64)])
    assert images.dtype == np.float32
    np.testing.assert_allclose(images.mean(axis=(0, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(images.std(axis=(0, 2, 3)), 1, atol=1e-3)


def test_batches_cover_a_split_in_stored_order(dataset):
    batches = list(dataset.batches("val", 40))
    assert [len(images) for images, _ in batches] == [40, 40, 15]
    assert batches[0][0].dtype == torch.float32 and batches[0][1].dtype == torch.int64
    np.testing.assert_array_equal(torch.cat([labels for _, labels in batches]), dataset.labels("val"))


def test_shuffled_batches_are_a_permutation_given_by_the_seed(dataset):
    def labels(seed):
        return np.concatenate([labels for _, labels in dataset.array_batches("val", 40, shuffle=seed)])

    assert np.array_equal(labels(1), labels(1)) and not np.array_equal(labels(1), labels(2))
    assert np.array_equal(np.sort(labels(1)), np.sort(dataset.labels("val")))


def test_calibration_is_drawn_from_train_without_replacement(dataset):
    images = dataset.calibration(200, seed=5)
    every = torch.cat([images for images, _ in dataset.batches("train", 64)])
    key = lambda batch: sorted(map(bytes, batch.numpy()))  # noqa: E731
    assert key(images) == key(every)
    torch.testing.assert_close(dataset.calibration(16, seed=5), images[:16], rtol=0, atol=0)
    assert not torch.equal(dataset.calibration(16, seed=6), images[:16])


@pytest.mark.parametrize("count", [0, 201])
def test_calibration_beyond_the_training_images_is_refused(dataset, count):
    with pytest.raises(Qwt2Error, match="between 1 and the 200"):
        dataset.calibration(count, seed=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_classes": 7}, "num_classes is 7.*10 classes"),
        ({"train_images": 3}, "data.train_images is 3"),
        ({"val_images": None}, "data.val_images is None"),
        ({"name": "cifar"}, "unknown dataset 'cifar'; use one of: coco, .*digits, .*digits_coco, docstrings, fashion_mnist, imagefolder, photos"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(change, message, tmp_path):
    with pytest.raises(Qwt2Error, match=message):
        write_dataset(CFG | change, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_and_damaged_files_are_named(folder, tmp_path):
    with pytest.raises(Qwt2Error, match="dataset.json does not exist"):
        open_dataset(CFG, tmp_path)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:500])
    with pytest.raises(Qwt2Error, match="train.safetensors is damaged"):
        open_dataset(CFG, tmp_path)
