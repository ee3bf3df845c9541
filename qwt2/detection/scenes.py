"""Detection data from mmdet's own pipelines, and scores of detections from mmdet's CocoMetric."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwt2.data.coco import Scenes
from qwt2.detection.models import quiet
from qwt2.errors import Qwt2Error

_KEEP_BYTES = 2**28
METRICS = {"bbox_ap": "coco/bbox_mAP", "bbox_ap50": "coco/bbox_mAP_50", "segm_ap": "coco/segm_mAP"}


def dataset_config(config: Any, scenes: Scenes, split: str, training: bool = False) -> dict[str, Any]:
    """Return mmdet's settings of a split as a dataset, with the pipeline of the detector's configuration.

    Args:
        config: the detector's configuration.
        scenes: the dataset.
        split: "train" or "val".
        training: whether to use the pipeline for training instead of the one for testing.
    """
    loader = config.train_dataloader if training else config.test_dataloader
    settings = loader.dataset
    while "pipeline" not in settings:  # a wrapper such as RepeatDataset
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
    """Return mmdet's ``CocoDataset`` of a split for testing, in the order of the annotation file."""
    from mmdet.registry import DATASETS

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints how long it took
        return DATASETS.build(dataset_config(config, scenes, split))


class Batches:
    """An iterable of batches: images (N, 3, H, W), padded to one size, and their data samples.

    Small sets are kept in memory, because they are read many times.

    Args:
        config: the detector's configuration.
        dataset: the mmdet dataset.
        batch_size: images per batch; the last batch may be smaller.
        indices: numbers of the images, in order; without it, all images.
    """

    def __init__(self, config: Any, dataset: Any, batch_size: int, indices: np.ndarray | None = None):
        from mmdet.registry import MODELS

        self.dataset, self.batch_size = dataset, batch_size
        self.indices = np.arange(len(dataset)) if indices is None else indices
        self._preprocess = MODELS.build(config.model.data_preprocessor)
        self._kept: list[tuple[Tensor, list[Any]]] = []

    def __iter__(self) -> Iterator[tuple[Tensor, list[Any]]]:
        yield from self._kept
        kept = sum(images.nbytes for images, _ in self._kept)
        for start in range(len(self._kept) * self.batch_size, len(self.indices), self.batch_size):
            batch = self._load(self.indices[start : start + self.batch_size])
            kept += batch[0].nbytes
            if kept <= _KEEP_BYTES:
                self._kept.append(batch)
            yield batch

    def _load(self, indices: np.ndarray) -> tuple[Tensor, list[Any]]:
        items = [self.dataset[int(index)] for index in indices]
        data = self._preprocess({key: [item[key] for item in items] for key in ("inputs", "data_samples")}, False)
        return data["inputs"], data["data_samples"]


def draw_calibration(available: int, count: int, seed: int) -> np.ndarray:
    """Draw the training images for calibration without replacement.

    A larger count with the same seed starts with the images of a smaller count.

    Args:
        available: number of training images.
        count: number of images to draw.
        seed: seed of the draw.

    Returns:
        Indices (count,) of training images.

    Raises:
        Qwt2Error: ``count`` is not positive or larger than ``available``.
    """
    if not 0 < count <= available:
        raise Qwt2Error(
            f"calibration asks for {count} images, but must be between 1 and the {available} training images"
        )
    return np.random.default_rng(seed).permutation(available)[:count]


@torch.inference_mode()
def detect(detector: nn.Module, batches: Batches) -> list[Any]:
    """Return mmdet's data samples of all images, with the detections as ``pred_instances``."""
    return [sample for images, samples in batches for sample in detector.predict(images, samples)]


def shown(sample: Any, least_score: float = 0.3) -> dict[str, Any]:
    """Return what a picture of one image shows.

    Args:
        sample: the image's data sample, from :func:`detect`.
        least_score: smallest score of the detections to show.

    Returns:
        The image's ``file`` name, and ``boxes``, ``labels``, ``scores`` and ``masks`` (COCO run lengths) of the
        detections.
    """
    from pycocotools import mask as coco_mask

    found = sample.pred_instances[sample.pred_instances.scores >= least_score].to_dict()
    masks = found.get("masks")
    encoded = (
        [] if masks is None else [coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]
    )
    return {
        "file": os.path.basename(sample.img_path),
        "boxes": found["bboxes"].tolist(),
        "labels": found["labels"].tolist(),
        "scores": found["scores"].tolist(),
        "masks": [{"size": list(mask["size"]), "counts": mask["counts"].decode()} for mask in encoded],
    }


def score(found: list[Any], scenes: Scenes, split: str = "val") -> dict[str, float]:
    """Compute average precision with mmdet's ``CocoMetric``.

    Args:
        found: the detections in all images of the split, from :func:`detect`.
        scenes: the dataset.
        split: "train" or "val".

    Returns:
        ``bbox_ap``, ``bbox_ap50`` and, if there are masks, ``segm_ap``, in percent.

    Raises:
        Qwt2Error: boxes or scores hold NaN or infinity.
    """
    from mmdet.evaluation.metrics import CocoMetric

    for sample in found:
        instances = sample.pred_instances
        if not (torch.isfinite(instances.scores).all() and torch.isfinite(instances.bboxes).all()):
            raise Qwt2Error("the detector's boxes or scores hold NaN or infinity; check the weights and the precision")
    kinds = ["bbox", "segm"] if any("masks" in sample.pred_instances for sample in found) else ["bbox"]
    with contextlib.redirect_stdout(io.StringIO()), quiet(), _only_what_is_asked():
        metric = CocoMetric(ann_file=str(scenes.annotations[split]), metric=kinds)
        metric.dataset_meta = {"classes": tuple(scenes.classes)}
        metric.process({}, [sample.to_dict() for sample in found])
        figures = metric.evaluate(len(found))
    # mmdet rounds to three digits, and returns no figures if there are no detections at all.
    return {
        name: round(100.0 * figures.get(key, 0.0), 1)
        for name, key in METRICS.items()
        if key.partition("/")[2][:4] in kinds
    }


@contextlib.contextmanager
def _only_what_is_asked() -> Iterator[None]:
    """Halve CocoMetric's time inside the block: write no JSON files, and do not score object sizes separately."""
    from mmdet.evaluation.metrics import coco_metric

    def of_all_areas(*args: Any) -> Any:
        evaluation = originals["COCOeval"](*args)
        params = evaluation.params
        params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
        return evaluation

    files: dict[str, Any] = {}
    replacements = {
        "dump": lambda results, path: files.update({path: results}), "load": files.__getitem__, "COCOeval": of_all_areas
    }  # fmt: skip
    originals = {name: getattr(coco_metric, name) for name in replacements}
    try:
        vars(coco_metric).update(replacements)
        yield
    finally:
        vars(coco_metric).update(originals)
