"""Detection data through mmdet's own pipelines, and mmdet's CocoMetric on what a detector finds."""

from __future__ import annotations

import contextlib
import io
from typing import Any, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qwt2.data.coco import Scenes
from qwt2.detection.network import regions
from qwt2.errors import Qwt2Error
from qwt2.inputs import Inputs

METRICS = {"bbox_ap": "coco/bbox_mAP", "bbox_ap50": "coco/bbox_mAP_50", "segm_ap": "coco/segm_mAP"}


def dataset_config(config: Any, scenes: Scenes, split: str, training: bool = False) -> dict[str, Any]:
    """mmdet's settings of a split, with the pipeline that the detector's configuration has for it."""
    loader = config.train_dataloader if training else config.test_dataloader
    settings = loader.dataset
    while "pipeline" not in settings:  # wrapped (RepeatDataset and the like)
        settings = settings.dataset
    return {
        "type": "CocoDataset",
        "metainfo": {"classes": tuple(scenes.classes)},
        "ann_file": str(scenes.annotations[split]),
        "data_prefix": {"img": f"{scenes.images[split]}/"},
        "pipeline": settings.pipeline,
        "test_mode": not training,
    }


def build_dataset(config: Any, scenes: Scenes, split: str) -> Any:
    """mmdet's `CocoDataset` of a split for testing, in the order of its annotation file."""
    from mmdet.registry import DATASETS

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells how long it took
        return DATASETS.build(dataset_config(config, scenes, split))


def batches(detector: nn.Module, dataset: Any, indices: Any, batch_size: int) -> Iterator[tuple[Tensor, list[Any]]]:
    """Images (N, 3, H, W) as the detector wants them, and their data samples."""
    indices = list(indices)
    for start in range(0, len(indices), batch_size):
        items = [dataset[int(index)] for index in indices[start : start + batch_size]]
        data = {key: [item[key] for item in items] for key in ("inputs", "data_samples")}
        prepared = detector.data_preprocessor(data, False)
        yield prepared["inputs"], prepared["data_samples"]


def calibration(
    detector: nn.Module, dataset: Any, count: int, seed: int, batch_size: int, boxes: int, mask_boxes: int
) -> list[Inputs]:
    """Inputs of `qwt2.detection.network.Detector` for ``count`` images drawn by ``seed``, in batches.

    Args:
        detector: the full-precision detector, which chooses the regions.
        boxes, mask_boxes: regions an image for the box and the mask heads.

    Raises:
        Qwt2Error: fewer images than asked for.
    """
    if not 0 < count <= len(dataset):
        raise Qwt2Error(f"calibration asks for {count} images, but must be between 1 and the {len(dataset)} training images")
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:count]
    return [
        regions(detector, images, samples, boxes, mask_boxes)
        for images, samples in batches(detector, dataset, chosen, batch_size)
    ]


@torch.no_grad()
def detect(detector: nn.Module, dataset: Any, batch_size: int, progress: bool = False) -> list[Any]:
    """mmdet's data samples of a whole dataset with what the detector finds (`pred_instances`)."""
    found = []
    bar = tqdm(total=len(dataset), desc="detect", unit="image", disable=None if progress else True)
    for images, samples in batches(detector, dataset, range(len(dataset)), batch_size):
        found += detector.predict(images, samples)
        bar.update(len(samples))
    return found


def score(found: list[Any], scenes: Scenes, split: str = "val") -> dict[str, float]:
    """Average precision in percent, from mmdet's `CocoMetric`: `bbox_ap`, `bbox_ap50`, and `segm_ap` where there are masks.

    Raises `Qwt2Error` where a detector gives something that is not finite.
    """
    from mmdet.evaluation.metrics import CocoMetric

    for sample in found:
        instances = sample.pred_instances
        if not (torch.isfinite(instances.scores).all() and torch.isfinite(instances.bboxes).all()):
            raise Qwt2Error("the detector's boxes or scores hold NaN or infinity; check the weights and the precision")
    kinds = ["bbox", "segm"] if any("masks" in sample.pred_instances for sample in found) else ["bbox"]
    with contextlib.redirect_stdout(io.StringIO()), _no_log():
        metric = CocoMetric(ann_file=str(scenes.annotations[split]), metric=kinds)
        metric.dataset_meta = {"classes": tuple(scenes.classes)}
        metric.process({}, [sample.to_dict() for sample in found])
        figures = metric.evaluate(len(found))
    # Where nothing at all is found, mmdet gives no figures.
    return {name: 100.0 * float(figures.get(key, 0.0)) for name, key in METRICS.items() if key.partition("/")[2][:4] in kinds}


@contextlib.contextmanager
def _no_log() -> Iterator[None]:
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
