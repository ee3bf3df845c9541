"""Detection for the stages: mmdet's detectors, scored by mmdet's own COCO metric."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pipeline.common.stage import Cell
from pipeline.tasks.task import Task, calibration_size
from qwt2.capture.batch import Inputs
from qwt2.capture.graph import GraphModel
from qwt2.data.coco import open_scenes
from qwt2.detection.models import build_detector, detector_config
from qwt2.detection.network import Detector, parts, regions
from qwt2.detection.parts import padded, running_on, simulation_runs
from qwt2.detection.scenes import Batches, build_dataset, detect, draw_calibration, score, shown
from qwt2.io import read_json, write_json

PICTURES = 6  # validation scenes in the report


class Detection(Task):
    """mmdet's detectors."""

    def __init__(self, cfg: Any, cell: Cell):
        super().__init__(cfg, cell)
        self.scenes = open_scenes(cfg["data"], self.folder)
        self.config = detector_config(cfg["model"])

    def trained(self) -> nn.Module:
        from qwt2.detection.training import train

        training = self.cfg["model"]["train"]
        detector = build_detector(self.cfg["model"], training["seed"] if training else 0)
        return Detector(train(detector, self.config, self.scenes, training) if training else detector)

    def baseline(self, cell: Cell) -> nn.Module:
        for _ in self.validation:  # kept, so that the processes of a stage share it
            pass
        self.network = Detector(build_detector({**self.cfg["model"], "checkpoint": cell.baseline / "model.safetensors"}))
        return self.network

    def weights(self, network: nn.Module) -> dict[str, Any]:
        return network.detector.state_dict()

    def predict(self, network: nn.Module, path: Path) -> None:
        """Average precision, and what is found in the first scenes, `.json`.

        A quantized network computes the parts of the detector, as engines do.
        """
        if isinstance(network, GraphModel):
            sized = network.of_size(list(self.example(self.network).values()))
            with running_on(self.network, simulation_runs(sized), self.largest_image) as detector:
                found = self.measure(detector)
        else:
            found = self.measure(network.detector)
        write_json(path.with_suffix(".json"), found)

    def measure(self, detector: nn.Module) -> dict[str, Any]:
        """Average precision of a detector on the validation set, and what it finds in the first scenes."""
        found = detect(detector, self.validation)
        return {"metrics": score(found, self.scenes), "pictures": [shown(sample) for sample in found[:PICTURES]]}

    def figures(self, path: Path) -> dict[str, float]:
        return read_json(path.with_suffix(".json"))["metrics"]

    @cached_property
    def validation(self) -> Batches:
        """In the batches that the detector's configuration tests with."""
        dataset = build_dataset(self.config, self.scenes, "val")
        return Batches(self.config, dataset, self.config.test_dataloader.batch_size)

    def calibration(self, network: nn.Module, seed: int) -> Iterator[Inputs]:
        images, batch_size = calibration_size(self.cfg)
        chosen = draw_calibration(len(self.training), images, seed)
        batches = Batches(self.config, self.training, batch_size, chosen)
        return (self._with_regions(network, *batch) for batch in batches)

    @cached_property
    def training(self) -> Any:
        """The training images, as a detector is tested with them."""
        return build_dataset(self.config, self.scenes, "train")

    def parts(self, network: nn.Module) -> list[str]:
        return parts(network.detector, self.cfg["model"]["parts"])

    def example(self, network: nn.Module) -> Inputs:
        return self._first_scenes(network, 2)

    def mismatch_inputs(self, network: nn.Module) -> Inputs:
        return self._first_scenes(network, self.cfg["evaluate"]["mismatch_images"])

    def _first_scenes(self, network: nn.Module, count: int) -> Inputs:
        """Of the size of the largest validation image, which is what files are exported for."""
        dataset = self.validation.dataset
        [batch] = Batches(self.config, dataset, count, np.arange(min(count, len(dataset))))
        inputs = self._with_regions(network, *batch)
        return inputs | {"images": padded(inputs["images"], self.largest_image)}

    @cached_property
    def largest_image(self) -> tuple[int, int]:
        """Height and width that hold every validation image."""
        sizes = [images.shape[-2:] for images, _ in self.validation]
        return max(height for height, _ in sizes), max(width for _, width in sizes)

    def _with_regions(self, network: nn.Module, images, samples) -> Inputs:
        counts = self.cfg["model"]["boxes"], self.cfg["model"]["mask_boxes"]
        return regions(network.detector, images, samples, *counts)
