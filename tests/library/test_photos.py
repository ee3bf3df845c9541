"""Photographs of a table, on generated pictures; and the files that installed packages carry."""

import csv
import sys

import numpy as np
import pytest
from PIL import Image

from qwt2.data import open_dataset, write_dataset
from qwt2.data.dataset import UNLABELLED
from qwt2.data.photos import TABLE, read_photo, read_table
from qwt2.errors import Qwt2Error
from qwt2.extras import packaged_file

MODEL = {"name": "vit", "timm": "vit_tiny_patch16_224", "kwargs": {"img_size": 32}}
ROWS = [("a.png", "3"), ("b.png", ""), ("c.png", ""), ("some_photos:d.png", ""), ("e.png", "0"), ("f.png", "")]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of photographs, one of them in a package, and their table; one picture is not in the table."""
    package = tmp_path / "site" / "some_photos"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a package is only looked for, not imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, (file, _) in enumerate([*ROWS, ("drawing.png", "")]):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(package / file.partition(":")[2] if ":" in file else folder / file)
    write_table(folder / "table.csv", ROWS)
    return folder


def write_table(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *rows])


@pytest.fixture
def cfg(root):
    return {
        "name": "photos", "path": str(root), "table": str(root / "table.csv"), "num_classes": 5, "train_images": 2,
        "seed": 0,
    }  # fmt: skip


def test_calibration_takes_photographs_without_a_class_and_none_that_is_validated_on(cfg, tmp_path):
    write_dataset(cfg, tmp_path / "out")
    dataset = open_dataset(cfg, tmp_path / "out", MODEL)
    assert dataset.labels("train").tolist() == [UNLABELLED] * 2
    assert sorted(dataset.labels("val")) == [UNLABELLED, UNLABELLED, 0, 3]
    every = np.concatenate([dataset.images(split, np.arange(dataset.size(split))) for split in ("train", "val")])
    assert every.shape == (6, 3, 32, 32) and len({image.tobytes() for image in every}) == 6
    assert dataset.calibration(2, seed=1).shape == (2, 3, 32, 32)


def test_the_draw_depends_on_the_seed_only(cfg, tmp_path):
    texts = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_dataset(cfg | {"seed": seed}, tmp_path / name)
        texts[name] = (tmp_path / name / "index.json").read_text()
    assert texts["a"] == texts["b"] != texts["c"]


def test_transparent_parts_become_white(tmp_path):
    pixels = np.zeros((2, 3, 4), np.uint8)  # black everywhere
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    assert np.asarray(read_photo(tmp_path / "half.png"))[:, 0, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([*ROWS, ("g.png", "")], r"g\.png does not exist; data\.path must name the folder"),
        ([("a.png", "5"), ("b.png", "")], r"a\.png has the label '5', but labels are class numbers from 0 to 4"),
        ([("a.png", "cat"), ("b.png", "")], r"a\.png has the label 'cat', but labels are class numbers"),
        ([("a.png", ""), ("b.png", "")], r"table\.csv gives no photograph a label, so no accuracy can be measured"),
        ([("a.png", "1"), ("b.png", "")], r"data\.train_images is 2, but only 1 photographs have no class"),
        ([], r"table\.csv must have the columns file and label, and a row for each photograph"),
        ([*ROWS, ("a.png", "4")], r"table\.csv: row 7 below the headings names a\.png a second time"),
        ([*ROWS, ("", "4")], r"table\.csv: row 7 below the headings names no file"),
        ([("no_package:x.png", ""), ("a.png", "1")], r"no_package is not installed.*pip install 'qwt2\[real\]'"),
        ([("some_photos:x.png", ""), ("a.png", "1")], r"the installed package some_photos has no file 'x\.png'"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_written(cfg, root, tmp_path, rows, sentence):
    write_table(root / "table.csv", rows)
    with pytest.raises(Qwt2Error, match=sentence):
        write_dataset(cfg, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_table_and_a_damaged_photograph(cfg, root, tmp_path):
    with pytest.raises(Qwt2Error, match=r"none\.csv does not exist; data\.table must name a CSV file"):
        write_dataset(cfg | {"table": str(root / "none.csv")}, tmp_path / "out")
    (root / "a.png").write_bytes((root / "a.png").read_bytes()[:500])
    with pytest.raises(Qwt2Error, match=r"a\.png cannot be decoded .*; repair or remove it$"):
        write_dataset(cfg, tmp_path / "out")


def test_tables_of_spreadsheets_are_read_and_other_encodings_refused(cfg, root, tmp_path):
    table = root / "table.csv"
    plain = read_table(table, 5)
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert read_table(table, 5) == plain
    table.write_bytes("file,label\nB\u00e4r.png,3\n".encode("latin-1"))
    with pytest.raises(Qwt2Error, match=r"table\.csv is not in UTF-8 \(.* at byte 12\); save it as UTF-8"):
        write_dataset(cfg, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_this_librarys_table_has_imagenets_labels_under_their_names():
    from timm.data import ImageNetInfo

    names = ImageNetInfo()
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels = read_table(TABLE, 1000)
    assert len(labels) == len(rows) and sum(label != UNLABELLED for label in labels.values()) > 100
    for row in rows:
        expected = names.index_to_description(int(row["label"])).split(",")[0] if row["label"] else ""
        assert row["class"] == expected


def test_a_package_is_not_imported_to_find_its_files(root):
    assert packaged_file("some_photos:d.png").is_file() and "some_photos" not in sys.modules
