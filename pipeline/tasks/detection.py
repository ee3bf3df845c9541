"""Detection: mmdet's detectors, which run their parts on engines and are scored by mmdet's own COCO metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.common.stage import Cell
from pipeline.tasks import TASKS, Figures, Task, calibration_size
from pipeline.tasks.files import FileExporter
from qwt2.data import open_dataset
from qwt2.io import atomic_path, read_json, write_json

if TYPE_CHECKING:
    from torch import nn

    from qwt2.capture.batch import Inputs
    from qwt2.capture.graph import GraphModel
    from qwt2.detection.network import Detector
    from qwt2.detection.scenes import Batches
    from qwt2.engines import Engine

PICTURES = 6  # validation scenes in the report


@dataclass
class Train:
    """Keys of ``train`` in the configuration of a detector."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    seed: int


@dataclass
class MmdetModel:
    """Keys of the configuration of an mmdet detector."""

    name: str
    mmdet: str
    options: dict[str, Any]
    parts: list[str]
    boxes: int
    mask_boxes: int
    checkpoint: str | None
    train: Train | None


@TASKS.register("detection")
class Detection(Task):
    """Networks that find objects, scored by the average precision of boxes and masks.

    Engines run the dense part and the heads. Everything else stays mmdet's.
    """

    NAME = "detection"
    MODELS = {"mmdet": MmdetModel}
    DELTAS = {"bbox_ap": "engine_bbox_ap_delta", "segm_ap": "engine_segm_ap_delta"}
    TIMED = "dense"

    def __init__(self, cfg: Any, cell: Cell):
        from qwt2.detection.models import detector_config

        super().__init__(cfg, cell)
        self.scenes = open_dataset(cfg["data"], self.folder)
        self.config = detector_config(cfg["model"])

    def trained(self) -> nn.Module:
        from qwt2.detection.models import build_detector
        from qwt2.detection.network import Detector
        from qwt2.detection.training import train

        training = self.cfg["model"]["train"]
        detector = build_detector(self.cfg["model"], training["seed"] if training else 0)
        return Detector(train(detector, self.config, self.scenes, training) if training else detector)

    def baseline(self) -> nn.Module:
        for _ in self.validation:  # loads the images, so that the processes of a stage share them
            pass
        return self.network

    @cached_property
    def network(self) -> Detector:
        """The full-precision detector."""
        from qwt2.detection.models import build_detector
        from qwt2.detection.network import Detector

        return Detector(build_detector({**self.cfg["model"], "checkpoint": self.cell.baseline / "model.safetensors"}))

    def weights(self, network: nn.Module) -> dict[str, Any]:
        return network.detector.state_dict()

    def predict(self, network: nn.Module, path: Path) -> None:
        """Store average precision and what is found in the first scenes, as ``.json``.

        A quantized network computes the parts of the detector, in place of an engine.
        """
        from qwt2.capture.graph import GraphModel
        from qwt2.detection.parts import running_on, simulation_runs

        if isinstance(network, GraphModel):
            sized = network.of_size(network.tensors_of(self.example(self.network)))
            with running_on(self.network, simulation_runs(sized), self.largest_image) as detector:
                found = self.measure(detector)
        else:
            found = self.measure(network.detector)
        write_json(path.with_suffix(".json"), found)

    def measure(self, detector: nn.Module) -> dict[str, Any]:
        """Return a detector's average precision on the validation set and what it finds in the first scenes."""
        from qwt2.detection.scenes import detect, score, shown

        found = detect(detector, self.validation)
        return {"metrics": score(found, self.scenes), "pictures": [shown(sample) for sample in found[:PICTURES]]}

    def fp32_figures(self) -> Figures:
        return self.figures(self.cell.predictions)

    def figures(self, path: Path) -> Figures:
        return read_json(path.with_suffix(".json"))["metrics"]

    def scores(self, path: Path) -> np.ndarray:
        """Return box AP in percent, float32 (1,): average precision is no mean over images."""
        return np.float32([self.figures(path)["bbox_ap"]])

    @cached_property
    def validation(self) -> Batches:
        """The validation set, in the batches of the detector's test configuration."""
        from qwt2.detection.scenes import Batches, build_dataset

        dataset = build_dataset(self.config, self.scenes, "val")
        return Batches(self.config, dataset, self.config.test_dataloader.batch_size)

    def calibration(self, network: nn.Module, seed: int) -> Iterator[Inputs]:
        from qwt2.detection.scenes import Batches, draw_calibration

        images, batch_size = calibration_size(self.cfg)
        chosen = draw_calibration(len(self.training), images, seed)
        batches = Batches(self.config, self.training, batch_size, chosen)
        return (self._with_regions(network, *batch) for batch in batches)

    @cached_property
    def training(self) -> Any:
        """The training images, prepared as for a test."""
        from qwt2.detection.scenes import build_dataset

        return build_dataset(self.config, self.scenes, "train")

    def quantized_parts(self, network: nn.Module) -> list[str]:
        from qwt2.detection.network import parts

        return parts(network.detector, self.cfg["model"]["parts"])

    def example(self, network: nn.Module) -> Inputs:
        return self._first_scenes(network, 2)

    def mismatch_inputs(self, network: nn.Module) -> Inputs:
        return self._first_scenes(network, self.cfg["evaluate"]["mismatch_images"])

    def _first_scenes(self, network: nn.Module, count: int) -> Inputs:
        """Return scenes padded to the size of the largest validation image, which files are exported for."""
        from qwt2.detection.parts import padded
        from qwt2.detection.scenes import Batches

        dataset = self.validation.dataset
        [batch] = Batches(self.config, dataset, count, np.arange(min(count, len(dataset))))
        inputs = self._with_regions(network, *batch)
        return inputs | {"images": padded(inputs["images"], self.largest_image)}

    @cached_property
    def largest_image(self) -> tuple[int, int]:
        """Height and width in which every validation image fits."""
        sizes = [images.shape[-2:] for images, _ in self.validation]
        return max(height for height, _ in sizes), max(width for _, width in sizes)

    def _with_regions(self, network: nn.Module, images, samples) -> Inputs:
        from qwt2.detection.network import regions

        counts = self.cfg["model"]["boxes"], self.cfg["model"]["mask_boxes"]
        return regions(network.detector, images, samples, *counts)

    def exporters(self, captured: GraphModel, inputs: Inputs) -> dict[str, FileExporter]:
        return part_exporters(captured, inputs)

    def load_for_engines(self) -> None:
        self.baseline()

    def files(self) -> list[str]:
        from qwt2.detection.parts import part_names

        return part_names(self.network)

    def scored_files(self, seed: int) -> list[str]:
        """Leave out the mask heads except at the first seed, because masks take half of the time."""
        from qwt2.detection.network import mask_heads

        masks = set() if seed == self.cfg["seeds"][0] else set(mask_heads(self.network.detector))
        return [part for part in self.files() if part not in masks]

    def engine_figures(self, engines: dict[str, Engine]) -> Figures:
        from qwt2.detection.parts import running_on, without_masks

        with ExitStack() as stack:
            if len(engines) < len(self.files()):
                stack.enter_context(without_masks(self.network.detector))
            detector = stack.enter_context(running_on(self.network, engines, image_size(engines[self.TIMED])))
            return self.measure(detector)["metrics"]

    def latency_input(self, batch_size: int) -> np.ndarray:
        return np.resize(self._images, (batch_size, *self._images.shape[1:]))

    @cached_property
    def _images(self) -> np.ndarray:
        images, _ = next(iter(self.validation))
        return images.numpy()

    def write_pictures(self, path: Path, predictions: Mapping[str, Path]) -> None:
        from qwt2.detection.pictures import draw_grid

        found = {heading: read_json(file.with_suffix(".json"))["pictures"] for heading, file in predictions.items()}
        with atomic_path(path) as temporary:
            temporary.write_bytes(draw_grid(found, self.scenes.images["val"], self.scenes.classes))


def image_size(engine: Engine) -> tuple[int, int]:
    """Return the height and width of an exported file's input."""
    *_, height, width = (dim.dim_value for dim in engine.input.type.tensor_type.shape.dim)
    return height, width


class PartExporter(FileExporter):
    """Writes files of one part of a detector.

    Args:
        name: the part's name.
        inputs: inputs of the whole detector.
        example_input: the part's inputs when the detector gets ``inputs``.
        heads: names of the parts that are heads.
    """

    def __init__(self, name: str, inputs: Inputs, example_input: Inputs, heads: list[str]):
        super().__init__(example_input)
        self.name, self.inputs, self.heads = name, inputs, heads

    def export(self, folded: GraphModel, path: Path) -> Path:
        return super().export(self._part(folded), path)

    def structure(self, folded: GraphModel) -> str:
        return super().structure(self._part(folded))

    def holds(self, module: str) -> bool:
        inside = [head for head in self.heads if module.startswith(f"{head}.")]
        return inside == ([self.name] if self.name in self.heads else [])

    def _part(self, folded: GraphModel) -> GraphModel:
        from qwt2.detection.parts import split

        return split(folded.of_size(folded.tensors_of(self.inputs)))[self.name]


def part_exporters(captured: GraphModel, inputs: Inputs) -> dict[str, FileExporter]:
    """Return one exporter per part of a captured detector, by the part's name."""
    from qwt2.detection.parts import DENSE, part_inputs

    examples = part_inputs(captured.of_size(captured.tensors_of(inputs)), inputs)
    heads = [name for name in examples if name != DENSE]
    return {name: PartExporter(name, inputs, example, heads) for name, example in examples.items()}
