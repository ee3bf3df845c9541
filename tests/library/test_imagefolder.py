"""Folders in ImageNet's layout, on generated images of every awkward kind."""

import numpy as np
import pytest
import torch
from PIL import Image

from qwt2.data import open_dataset, write_dataset
from qwt2.errors import Qwt2Error
from qwt2.io import read_json

MODEL = {"name": "vit", "timm": "vit_tiny_patch16_224", "kwargs": {"img_size": 64}}
SWIN = {"name": "swin", "timm": "swin_tiny_patch4_window7_224", "kwargs": {}}


def _picture(seed: int, size=(90, 70)) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path):
    """Two classes; in `val/cat` a JPEG, a grayscale, a CMYK and an upper-case suffix, beside a text file."""
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                _picture(10 * number + index).save(folder / f"{index}.jpg")
    cat = tmp_path / "images" / "val" / "cat"
    _picture(5).convert("L").save(cat / "gray.jpg")
    _picture(6).convert("CMYK").save(cat / "cmyk.jpg")
    _picture(7).save(cat / "LARGE.JPEG")
    (cat / "notes.txt").write_text("not an image")
    return tmp_path / "images"


@pytest.fixture
def cfg(root):
    return {
        "name": "imagefolder", "path": str(root), "num_classes": 2, "train_images": None, "val_images": None,
        "seed": 0, "skip_corrupt": False,
    }  # fmt: skip


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_index_lists_relative_files_and_labels(cfg, tmp_path):
    write_dataset(cfg, tmp_path / "out")
    index = read_json(tmp_path / "out" / "index.json")
    assert index["classes"] == ["cat", "dog"] and index["skipped"] == []
    assert index["val"]["files"] == [
        *("cat/0.jpg", "cat/1.jpg", "cat/2.jpg", "cat/LARGE.JPEG", "cat/cmyk.jpg", "cat/gray.jpg"),
        *("dog/0.jpg", "dog/1.jpg", "dog/2.jpg"),
    ]
    assert index["val"]["labels"] == [0] * 6 + [1] * 3


def test_every_colour_mode_becomes_normalised_rgb(cfg, tmp_path):
    write_dataset(cfg, tmp_path / "out")
    dataset = open_dataset(cfg, tmp_path / "out", MODEL)
    (images, labels), = dataset.batches("val", 100)
    assert images.shape == (9, 3, 64, 64) and images.dtype == torch.float32
    assert labels.tolist() == dataset.labels("val").tolist() == [0] * 6 + [1] * 3
    gray = images[5]  # grey before normalisation; ViT's mean and deviation are equal in all channels
    torch.testing.assert_close(gray[0], gray[1])
    assert not torch.equal(images[4][0], images[4][1])  # CMYK has kept its colours


@pytest.mark.parametrize("model", [MODEL, SWIN], ids=["vit", "swin"])
def test_the_transform_is_timms_own_of_the_model(cfg, root, tmp_path, model):
    import timm
    from timm.data import create_transform, resolve_data_config

    write_dataset(cfg, tmp_path / "out")
    dataset = open_dataset(cfg, tmp_path / "out", model)
    built = timm.create_model(model["timm"], **model["kwargs"])
    transform = create_transform(**resolve_data_config(dict(model["kwargs"]), model=built))
    expected = transform(Image.open(root / "val" / "dog" / "1.jpg").convert("RGB"))
    np.testing.assert_array_equal(dataset.images("val", np.array([7]))[0], expected.numpy())


def test_drawn_images_follow_the_seed(cfg, tmp_path):
    def files(seed):
        write_dataset(cfg | {"train_images": 3, "seed": seed}, tmp_path / str(seed))
        return read_json(tmp_path / str(seed) / "index.json")["train"]["files"]

    draws = [files(seed) for seed in range(5)]
    assert all(len(draw) == 3 and draw == sorted(draw) for draw in draws)
    assert files(0) == draws[0] and len({tuple(draw) for draw in draws}) > 1


@pytest.mark.parametrize("damage", [_truncate, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"hello")])
def test_corrupt_image_is_named_or_skipped(cfg, root, tmp_path, damage):
    damage(root / "val" / "dog" / "1.jpg")
    with pytest.raises(Qwt2Error, match=r"val/dog/1\.jpg cannot be decoded .* data\.skip_corrupt to true"):
        write_dataset(cfg, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_dataset(cfg | {"skip_corrupt": True}, tmp_path / "out")
    index = read_json(tmp_path / "out" / "index.json")
    assert index["skipped"] == ["val/dog/1.jpg"] and "dog/1.jpg" not in index["val"]["files"]
    dataset = open_dataset(cfg, tmp_path / "out", MODEL)
    assert [len(images) for images, _ in dataset.batches("val", 4)] == [4, 4]


def test_file_gone_after_indexing_is_named(cfg, root, tmp_path):
    write_dataset(cfg, tmp_path / "out")
    (root / "val" / "cat" / "0.jpg").unlink()
    with pytest.raises(Qwt2Error, match=r"cat/0\.jpg does not exist any more"):
        next(open_dataset(cfg, tmp_path / "out", MODEL).batches("val", 2))


def test_opening_without_a_model_is_refused(cfg, tmp_path):
    write_dataset(cfg, tmp_path / "out")
    with pytest.raises(Qwt2Error, match="give open_dataset the model too"):
        open_dataset(cfg, tmp_path / "out")


def _remove(folder):
    import shutil

    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "change, spoil, message",
    [
        ({"path": None}, None, "data.path is not set"),
        ({"path": "/nowhere"}, None, "/nowhere/train is not a folder"),
        ({"num_classes": 1000}, None, "has 2 classes, but data.num_classes is 1000"),
        ({}, lambda root: _remove(root / "val"), "val is not a folder"),
        ({}, lambda root: _remove(root / "val" / "dog"), "same class folders, but only one has dog"),
        ({}, lambda root: [_remove(root / "train" / name) for name in ("cat", "dog")], "train has no class folders"),
        ({}, lambda root: [p.unlink() for p in (root / "train" / "dog").iterdir()], "dog holds no images"),
    ],
)
def test_unusable_folders_are_refused(cfg, root, tmp_path, change, spoil, message):
    if spoil:
        spoil(root)
    with pytest.raises(Qwt2Error, match=message):
        write_dataset(cfg | change, tmp_path / "out")
    assert not (tmp_path / "out").exists()
