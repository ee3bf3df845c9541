"""Zero-shot classification: an image's class is the one whose caption's vector agrees best (experimental)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.common.stage import Cell
from pipeline.experimental.arrays import Arrays, split, tensors
from pipeline.experimental.captions import TEMPLATES, captions
from pipeline.experimental.figures import show
from pipeline.experimental.settings import Train
from pipeline.tasks import TASKS, Figures, Task, calibration_size
from qwt2.data import open_dataset
from qwt2.evaluation.metrics import agreement_percent, cosine, sqnr_db, topk_percent
from qwt2.io import load_arrays, save_arrays
from qwt2.report.metrics import Metric, signed

if TYPE_CHECKING:
    from torch import nn

    from qwt2.capture.batch import Inputs
    from qwt2.engines import Engine

VECTORS = ("image_vectors", "text_vectors")

show(
    "zero_shot",
    ("zero_shot_top1",),
    hard_loss=3.0,
    metrics={
        "zero_shot_top1": Metric(
            "percent", "zero-shot %", "share of images nearest to the caption of their class", "{:.2f}".format
        ),
        "engine_zero_shot_top1_delta": Metric(
            "points", "Δ sim", "zero-shot top-1 of the engine minus that of the simulation, points", signed
        ),
    },
)


@dataclass
class Encoders:
    """Keys of ``clip``: the arguments of :class:`pipeline.experimental.clip.CLIP`."""

    image: dict[str, Any]
    text: dict[str, Any]
    dimensions: int


@dataclass
class TrainClip(Train):
    """Keys of ``train`` in the configuration of a CLIP."""

    temperature: float


@dataclass
class ClipModel:
    """Keys of the configuration of a CLIP."""

    name: str
    clip: Encoders
    train: TrainClip


@TASKS.register("zero_shot")
class ZeroShot(Task):
    """Networks that take images and texts, and give one vector of unit length for each.

    Image i is paired with the caption of class i mod 10 (in calibration with that of its own class), because a network
    takes as many texts as images.
    """

    NAME = "zero_shot"
    MODELS = {"clip": ClipModel}
    DELTAS = {"zero_shot_top1": "engine_zero_shot_top1_delta"}

    def __init__(self, cfg: Any, cell: Cell):
        super().__init__(cfg, cell)
        self.dataset = open_dataset(cfg["data"], self.folder, cfg["model"])
        self.captions = captions(TEMPLATES[0])

    def trained(self) -> nn.Module:
        from pipeline.experimental import clip

        training = self.cfg["model"]["train"]
        return clip.train(clip.build(self.cfg["model"]["clip"], training["seed"]), self.dataset, training)

    def baseline(self) -> nn.Module:
        from pipeline.experimental import clip
        from qwt2.classification.models import load_weights

        network = clip.build(self.cfg["model"]["clip"])
        load_weights(network, self.cell.baseline / "model.safetensors")
        return network

    def predict(self, network: nn.Module, path: Path) -> None:
        """Store the vectors of all images (N, dimensions) and of one caption per class (10, dimensions), float32."""
        import torch

        from qwt2.capture.batch import call

        def vectors(inputs: Arrays) -> Arrays:
            with torch.inference_mode():
                return {name: vector.numpy() for name, vector in call(network, tensors(inputs)).items()}

        save_arrays(path.with_suffix(".vectors.safetensors"), self._vectors(vectors, 100))

    def _vectors(self, network: Callable[[Arrays], Arrays], batch_size: int) -> Arrays:
        batch_size = max(batch_size, len(self.captions))
        found = [network(self._val(start, batch_size)) for start in range(0, self.dataset.size("val"), batch_size)]
        images, texts = (np.concatenate([vectors[name] for vectors in found]) for name in VECTORS)
        return dict(zip(VECTORS, (images, texts[: len(self.captions)])))

    def fp32_figures(self) -> Figures:
        return {"zero_shot_top1": self._top1(self._reference)}

    def figures(self, path: Path) -> Figures:
        return self._compared(self._stored(path))

    def scores(self, path: Path) -> np.ndarray:
        """Return 100 for every image nearest to the caption of its class, and 0 for the others, float32 (images,)."""
        return 100 * (_agreement(self._stored(path)).argmax(1) == self.dataset.labels("val")).astype(np.float32)

    def engine_figures(self, engines: dict[str, Engine]) -> Figures:
        [model] = engines.values()
        return self._compared(self._vectors(model, self.cfg["evaluate"]["batch_size"]))

    def _compared(self, vectors: Arrays) -> Figures:
        ours, theirs = (np.concatenate([of[name] for name in VECTORS]) for of in (vectors, self._reference))
        return {
            "zero_shot_top1": self._top1(vectors),
            "agreement": agreement_percent(_agreement(vectors), _agreement(self._reference)),
            "cosine": cosine(ours, theirs), "logits_sqnr_db": sqnr_db(ours, theirs),
        }  # fmt: skip

    def _top1(self, vectors: Arrays) -> float:
        return topk_percent(_agreement(vectors), self.dataset.labels("val"), 1)

    @cached_property
    def _reference(self) -> Arrays:
        return self._stored(self.cell.predictions)

    def _stored(self, path: Path) -> Arrays:
        return load_arrays(path.with_suffix(".vectors.safetensors"))

    def calibration(self, network: nn.Module, seed: int) -> list[Inputs]:
        """Return training images, each with the caption of its class."""
        images, batch_size = calibration_size(self.cfg)
        chosen = np.random.default_rng(seed).permutation(self.dataset.size("train"))[:images]
        tokens = self.captions[self.dataset.labels("train")[chosen]]
        inputs = {"images": self.dataset.images("train", chosen), "tokens": tokens}
        return [tensors(part) for part in split(inputs, batch_size)]

    def example(self, network: nn.Module) -> Inputs:
        return tensors(self.latency_input(2))

    def mismatch_inputs(self, network: nn.Module) -> Inputs:
        return tensors(self.latency_input(self.cfg["evaluate"]["mismatch_images"]))

    def latency_input(self, batch_size: int) -> Arrays:
        return self._val(0, batch_size)

    def _val(self, start: int, count: int) -> Arrays:
        """Return validation images from ``start`` on, with as many captions."""
        chosen = np.arange(start, min(start + count, self.dataset.size("val")))
        tokens = self.captions[(chosen - start) % len(self.captions)]
        return {"images": self.dataset.images("val", chosen), "tokens": tokens}


def _agreement(vectors: Arrays) -> np.ndarray:
    """Return the cosine (images, classes) of each image's vector and each caption's."""
    return vectors["image_vectors"] @ vectors["text_vectors"].T
