"""Detection data: the embedded scenes, folders in COCO's layout, sound and broken, and the score."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from qwt2.data import open_dataset, write_dataset
from qwt2.data.digits import read_scans, split_sources
from qwt2.detection.models import detector_config
from qwt2.detection.scenes import Batches, build_dataset, draw_calibration, score
from qwt2.errors import Qwt2Error
from qwt2.io import read_json
from tests.support import tiny_detectors

pytestmark = pytest.mark.slow

DATA = tiny_detectors.DATA


@pytest.fixture(scope="module")
def config():
    return detector_config(tiny_detectors.settings("swin"))


# The embedded scenes.


def test_scenes_are_the_same_every_time_and_follow_the_seed(tmp_path):
    small = DATA | {"train_images": 2, "val_images": 2}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        write_dataset(small | {"seed": seed}, tmp_path / name)

    def content(name: str) -> dict:
        return {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}

    assert content("first") == content("again")
    assert content("first") != content("other")


def test_no_scan_is_in_both_splits():
    scenes = tiny_detectors.scenes()
    sources = {s: {a["source"] for a in read_json(scenes.annotations[s])["annotations"]} for s in ("train", "val")}
    assert sources["train"] and sources["val"] and not sources["train"] & sources["val"]
    # The same division as classification's, so that no figure of either task has seen the other's validation scans.
    division = split_sources(read_scans()[1], DATA["seed"])
    assert all(sources[split] <= set(division[split]) for split in sources)


def test_annotations_fit_the_pictures():
    scenes = tiny_detectors.scenes()
    _, labels = read_scans()
    for split in ("train", "val"):
        content = read_json(scenes.annotations[split])
        assert len(content["images"]) == DATA[f"{split}_images"]
        for image in content["images"]:
            assert Image.open(scenes.images[split] / image["file_name"]).size == (112, 112)
        for annotation in content["annotations"]:
            mask = coco_mask.decode({**annotation["segmentation"], "counts": annotation["segmentation"]["counts"].encode()})
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            left, top, width, height = annotation["bbox"]
            assert (left, top, left + width, top + height) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert annotation["area"] == mask.sum() > 0
            assert annotation["category_id"] == labels[annotation["source"]]
        digits = np.bincount([a["image_id"] for a in content["annotations"]], minlength=len(content["images"]))
        assert digits.min() >= 1 and digits.max() <= 5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_classes": 9}, "num_classes is 9, but the digits have 10 classes"),
        ({"image_size": 100}, "image_size is 100, too small for the scenes; use at least 108"),
        ({"val_images": 0}, "val_images is 0; make at least one scene"),
    ],
)
def test_scenes_that_cannot_be_made_are_refused(change, message, tmp_path):
    with pytest.raises(Qwt2Error, match=message):
        write_dataset(DATA | change, tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()


# Folders in COCO's layout.


@pytest.fixture
def root(tmp_path):
    """Three training and two validation images of different sizes; the last training image shows nothing."""
    for split, count in (("train", 3), ("val", 2)):
        (tmp_path / "coco" / f"{split}2017").mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            name, size = f"{number:012d}.jpg", (100 + 20 * number, 80)
            Image.new("RGB", size, (40 * number, 90, 60)).save(tmp_path / "coco" / f"{split}2017" / name)
            images.append({"id": 7 + number, "file_name": name, "width": size[0], "height": size[1]})
            if (split, number) != ("train", 2):
                box = [10, 20, 30, 40]
                annotations.append(
                    {"id": number, "image_id": 7 + number, "category_id": 18, "bbox": box, "area": 1200, "iscrowd": 0,
                     "segmentation": [[10, 20, 40, 20, 40, 60, 10, 60]]}
                )  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]}
        (tmp_path / "coco" / "annotations").mkdir(exist_ok=True)
        (tmp_path / "coco" / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return tmp_path / "coco"


@pytest.fixture
def cfg(root):
    return {"name": "coco", "path": str(root), "num_classes": 2, "train_images": None, "val_images": None, "seed": 0}


def edit(root, split: str, change) -> None:
    path = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_coco_images_stay_where_they_are(cfg, root, tmp_path, config):
    write_dataset(cfg, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.json", "val.json", "dataset.json"}
    scenes = open_dataset(cfg, tmp_path / "out")
    assert scenes.classes == ["person", "dog"] and scenes.images["val"] == root / "val2017"
    # COCO's category numbers have gaps; the model's classes are counted.
    sample = build_dataset(config, scenes, "val")[0]["data_samples"]
    assert sample.img_path == str(root / "val2017" / "000000000000.jpg")


def test_fewer_coco_images_are_drawn_by_seed(cfg, tmp_path):
    drawn = {}
    for seed in range(6):
        write_dataset(cfg | {"train_images": 1, "seed": seed}, tmp_path / str(seed))
        content = read_json(tmp_path / str(seed) / "train.json")
        drawn[seed] = [image["id"] for image in content["images"]]
        assert len(drawn[seed]) == 1 and {a["image_id"] for a in content["annotations"]} <= set(drawn[seed])
    assert len({tuple(ids) for ids in drawn.values()}) > 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["annotations"][0].update(category_id=99), "annotation 0 is of category 99, which the file does not define"),
        (lambda c: c["annotations"][0].update(image_id=99), "annotation 0 is of image 99, which the file does not list"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), r"annotation 1 has the box \[1, 2, 3\]; give four numbers"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, "x", 4]), "annotation 1 has the box .*; give four numbers"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, float("nan"), 4]), "annotation 1 has the box .*; give four numbers"),
        (lambda c: c.update(annotations=[]), "has no annotations; give a COCO instances file"),
        (lambda c: c.pop("categories"), "has no categories; give a COCO instances file"),
        (lambda c: c["images"][1].pop("file_name"), "entry 1 of images has no 'file_name'"),
        (lambda c: c["images"].__setitem__(1, 3), "entry 1 of images has no 'id'"),
        (lambda c: c["images"][1].update(file_name="gone.jpg"), "lists gone.jpg, but .*val2017 does not hold it"),
        (lambda c: c["categories"].reverse(), "must define the same categories in one order"),
        (lambda c: c["categories"].append({"id": 3, "name": "cat"}), "must define the same categories in one order"),
    ],
)
def test_broken_coco_files_are_named_in_one_sentence(change, message, cfg, root, tmp_path):
    edit(root, "val", change)
    with pytest.raises(Qwt2Error, match=message) as caught:
        write_dataset(cfg, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda root: (root / "annotations" / "instances_val2017.json").write_text('{"images": ['), "instances_val2017.json"),
        (lambda root: (root / "annotations" / "instances_val2017.json").write_text("[]"), "has no images; give a COCO instances file"),
        (lambda root: (root / "annotations" / "instances_val2017.json").unlink(), "instances_val2017.json"),
        (lambda root: (root / "val2017").rename(root / "val2014"), "val2017 is not a folder"),
        (lambda root: (root / "val2017" / "000000000000.jpg").unlink(), "does not hold it; complete the images"),
    ],
)
def test_missing_and_unreadable_coco_files_are_named(damage, message, cfg, root, tmp_path):
    damage(root)
    with pytest.raises(Qwt2Error, match=message):
        write_dataset(cfg, tmp_path / "out")


def test_other_settings_than_the_folder_has_are_refused(cfg, tmp_path):
    with pytest.raises(Qwt2Error, match="has 2 categories, but data.num_classes is 80"):
        write_dataset(cfg | {"num_classes": 80}, tmp_path / "out")
    with pytest.raises(Qwt2Error, match="data.path is not set"):
        write_dataset(cfg | {"path": None}, tmp_path / "out")


def test_boxes_outside_and_images_without_objects_are_handled_as_mmdet_does(cfg, root, tmp_path, config):
    def outside(content):
        content["annotations"].append(dict(content["annotations"][0], id=50, bbox=[300, 300, 10, 10]))
        content["annotations"].append(dict(content["annotations"][0], id=51, bbox=[5, 5, 0, 10]))

    edit(root, "train", outside)
    write_dataset(cfg, tmp_path / "out")
    scenes = open_dataset(cfg, tmp_path / "out")
    dataset = build_dataset(config, scenes, "train")
    assert len(dataset) == 3  # for testing and calibration, images without objects count
    assert [len(dataset.get_data_info(i)["instances"]) for i in range(3)] == [1, 1, 0]


def test_images_of_several_sizes_are_padded_to_one_in_a_batch(cfg, tmp_path, config):
    write_dataset(cfg, tmp_path / "out")
    dataset = build_dataset(config, open_dataset(cfg, tmp_path / "out"), "train")
    [(images, samples)] = Batches(config, dataset, 3)
    # mmdet pads to the largest, rounded up to the detector's pad_size_divisor.
    assert images.shape == (3, 3, 96, 160)
    assert [sample.img_shape for sample in samples] == [(80, 100), (80, 120), (80, 140)]
    assert (images[0, :, :, 100:] == 0).all() and (images[0, :, :80, :100] != 0).any()


def test_calibration_images_follow_the_seed_and_are_nested():
    few, many = draw_calibration(100, 10, 3), draw_calibration(100, 20, 3)
    np.testing.assert_array_equal(few, many[:10])
    assert len(set(many)) == 20 and not np.array_equal(few, draw_calibration(100, 10, 4))
    for count in (0, 101):
        with pytest.raises(Qwt2Error, match="must be between 1 and the 100 training images"):
            draw_calibration(100, count, 0)


# The score.


def found(config, shift: float = 0.0, classes: int = 0):
    """What a detector would find that sees the annotations; boxes and masks may be moved, classes changed."""
    import torch
    from mmengine.structures import InstanceData

    scenes = tiny_detectors.scenes()
    content = read_json(scenes.annotations["val"])
    samples = [item["data_samples"] for item in build_dataset(config, scenes, "val")]
    for sample, image in zip(samples, content["images"]):
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in mine])
        masks = [coco_mask.decode({**a["segmentation"], "counts": a["segmentation"]["counts"].encode()}) for a in mine]
        sample.pred_instances = InstanceData(
            bboxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1) + shift,
            labels=torch.tensor([(a["category_id"] + classes) % 10 for a in mine]),
            scores=torch.linspace(0.5, 1, len(mine)),
            masks=torch.from_numpy(np.stack(masks)).bool(),
        )
    return samples


def test_score_is_100_for_the_annotations_themselves_and_0_for_other_classes(config):
    scenes = tiny_detectors.scenes()
    assert score(found(config), scenes) == {"bbox_ap": 100.0, "bbox_ap50": 100.0, "segm_ap": 100.0}
    assert score(found(config, classes=1), scenes)["bbox_ap"] < 5
    moved = score(found(config, shift=1.0), scenes)
    assert moved["bbox_ap"] < 90 and moved["bbox_ap50"] == 100 and moved["segm_ap"] == 100


def test_score_is_what_mmdets_own_metric_gives(config):
    """Of detections that are off by more and more, with CocoMetric as mmdet ships it."""
    from mmdet.evaluation.metrics import CocoMetric

    scenes, samples = tiny_detectors.scenes(), found(config)
    for number, sample in enumerate(samples):
        sample.pred_instances.bboxes += 0.5 * number
        sample.pred_instances.masks = sample.pred_instances.masks.roll(number, -1)
    metric = CocoMetric(ann_file=str(scenes.annotations["val"]), metric=["bbox", "segm"])
    metric.dataset_meta = {"classes": tuple(scenes.classes)}
    metric.process({}, [sample.to_dict() for sample in samples])
    expected = metric.evaluate(len(samples))
    mine = score(samples, scenes)
    assert mine == {n: round(100 * expected[f"coco/{k}"], 1) for n, k in (("bbox_ap", "bbox_mAP"), ("bbox_ap50", "bbox_mAP_50"), ("segm_ap", "segm_mAP"))}
    assert 0 < mine["bbox_ap"] < 100 and 0 < mine["segm_ap"] < 100


def test_score_of_nothing_found_is_0(config):
    samples = found(config)
    for sample in samples:
        sample.pred_instances = sample.pred_instances[:0]
    assert score(samples, tiny_detectors.scenes())["bbox_ap"] == 0


def test_score_refuses_what_is_not_finite(config):
    samples = found(config)
    samples[1].pred_instances.bboxes[0, 0] = float("nan")
    with pytest.raises(Qwt2Error, match="NaN or infinity; check the weights"):
        score(samples, tiny_detectors.scenes())
