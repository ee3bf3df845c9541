"""Figures of one cell of detection: mmdet's detectors with engines inside them."""

from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.stage import Cell
from pipeline.tasks.detection import Detection as Task
from pipeline.tasks.evaluation import Evaluation, Figures
from qwt2.detection.network import mask_heads
from qwt2.detection.parts import DENSE, part_names, running_on, without_masks
from qwt2.detection.pictures import draw_grid
from qwt2.engines import Engine
from qwt2.io import atomic_path, read_json


class Detection(Evaluation):
    """COCO's average precision; the dense part is timed."""

    TASK = "detection"
    DELTAS = {"bbox_ap": "engine_bbox_ap_delta", "segm_ap": "engine_segm_ap_delta"}
    TIMED = DENSE

    def __init__(self, cfg: Any, cell: Cell):
        super().__init__(cfg, cell)
        self.task = Task(cfg, cell)
        self.network = self.task.baseline(cell)
        self.parts = part_names(self.network)

    def stored_figures(self, path: Path) -> Figures:
        return self.task.figures(path)

    def parts_scored(self, seed: int) -> list[str]:
        """Masks of the first seed alone: they take half of the time."""
        masks = set() if seed == self.seeds[0] else set(mask_heads(self.network.detector))
        return [part for part in self.parts if part not in masks]

    def engine_figures(self, engines: dict[str, Engine]) -> Figures:
        with ExitStack() as stack:
            if len(engines) < len(self.parts):
                stack.enter_context(without_masks(self.network.detector))
            detector = stack.enter_context(running_on(self.network, engines, image_size(engines[DENSE])))
            return self.task.measure(detector)["metrics"]

    def write_pictures(self, path: Path) -> None:
        """What fp32, plain PTQ and CWAC find, side by side."""
        seed, known = self.seeds[0], {"ptq": "PTQ", "cwac": "PTQ + CWAC"}
        files = {"fp32": self.cell.predictions} | {
            heading: self.cell.quantized("default", method, seed) for method, heading in known.items() if method in self.methods
        }
        found = {heading: read_json(file.with_suffix(".json"))["pictures"] for heading, file in files.items()}
        scenes = self.task.scenes
        with atomic_path(path) as temporary:
            temporary.write_bytes(draw_grid(found, scenes.images["val"], scenes.classes))

    def latency_input(self, batch_size: int) -> np.ndarray:
        return np.resize(self.images, (batch_size, *self.images.shape[1:]))

    @cached_property
    def images(self) -> np.ndarray:
        images, _ = next(iter(self.task.validation))
        return images.numpy()


def image_size(engine: Engine) -> tuple[int, int]:
    """Height and width that an exported file takes."""
    *_, height, width = (dim.dim_value for dim in engine.input.type.tensor_type.shape.dim)
    return height, width
