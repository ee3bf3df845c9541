"""The parts of a detector that an integer engine runs, inside the mmdet detector that does the rest.

Files hold the dense part (backbone, neck and dense head), and each box and mask head. Anchors, NMS, RoIAlign and the
pasting of masks stay in PyTorch, so that mmdet's own code makes detections of what the engine computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qwt2.capture.graph import GraphModel
from qwt2.detection.network import REGIONS, Detector, RegionFeatures, box_heads, mask_heads
from qwt2.detection.patching import replaced_forward
from qwt2.errors import Qwt2Error

DENSE = "dense"
_REGIONS_AT_ONCE = 32  # engines are compiled for one number of regions; the last ones are filled up with zeros

Run = Callable[[np.ndarray], Any]


def part_names(network: Detector) -> list[str]:
    """The names of a network's parts, the dense one first."""
    return [DENSE, *box_heads(network.detector), *mask_heads(network.detector)]


def split(model: GraphModel) -> dict[str, GraphModel]:
    """A captured detector's parts by name, the dense one first; each takes one tensor and gives a tuple.

    The dense part gives the features of every level, if there are heads, and then what the dense head gives.
    """
    regions = model.calls(RegionFeatures)
    sources = {name.removesuffix(REGIONS): call for name, [call] in regions.items()}
    outputs: dict[str, list[fx.Node]] = {DENSE: [], **{name: [] for name in sources}}
    for [call] in list(regions.values())[:1]:
        outputs[DENSE] += call.args[1:]
    for node in model.output.args[0]:
        outputs[_head_of(node, sources)].append(node)
    starts = {DENSE: model.inputs[0], **sources}
    return {name: model.between(starts[name], nodes) for name, nodes in outputs.items()}


def _head_of(node: fx.Node, sources: dict[str, fx.Node]) -> str:
    """Which part computes a node."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        for name, source in sources.items():
            if current is source:
                return name
        new = [other for other in current.all_input_nodes if other not in seen]
        seen.update(new)
        waiting += new
    return DENSE


def part_inputs(model: GraphModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a captured detector, and what each is called with when the whole is called with ``inputs``."""
    seen = {DENSE: inputs["images"]}

    def note(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        value = model.evaluate(node, values)
        if isinstance(model.module_of(node), RegionFeatures):
            seen[node.target.removesuffix(REGIONS)] = value
        return value

    with torch.no_grad():
        model.walk(inputs, note)
    return seen


def simulation_runs(model: GraphModel) -> dict[str, Run]:
    """What computes each part of a captured detector, as an engine does: arrays in, arrays by number out."""

    def run_of(part: GraphModel) -> Run:
        def run(x: np.ndarray) -> dict[int, np.ndarray]:
            with torch.inference_mode():
                return {number: y.numpy() for number, y in enumerate(part(torch.from_numpy(x)))}

        return run

    return {name: run_of(part) for name, part in split(model).items()}


def _arrays(outputs: Any) -> list[np.ndarray]:
    return list(outputs.values()) if isinstance(outputs, Mapping) else [outputs]


@contextmanager
def running_on(network: Detector, runs: Mapping[str, Run], size: tuple[int, int]) -> Iterator[nn.Module]:
    """The mmdet detector, its parts computed by ``runs`` inside the `with` block.

    Args:
        network: its parts are not run.
        runs: for every part, arrays in and arrays out (:class:`qwt2.engines.Engine`).
        size: height and width that the dense part takes; smaller images are padded, as mmdet pads those of a batch. A
            transformer would take padding for a part of the image, so its images must have this size.
    """
    detector = network.detector
    dense = _Dense(detector, runs[DENSE], size)
    with ExitStack() as stack:
        for target, name, new in dense.replacements():
            stack.enter_context(_replaced(target, name, new))
        for name in part_names(network)[1:]:
            stack.enter_context(replaced_forward(network.get_submodule(name), _on_regions(runs[name])))
        yield detector


@contextmanager
def without_masks(detector: nn.Module) -> Iterator[None]:
    """A detector that finds only boxes inside the `with` block; their masks take it half of its time."""
    masks = detector.roi_head.mask_head
    detector.roi_head.mask_head = None
    try:
        yield
    finally:
        detector.roi_head.mask_head = masks


class _Dense:
    """Runs the dense part once an image batch; neck features and head outputs are asked for one after the other."""

    def __init__(self, detector: nn.Module, run: Run, size: tuple[int, int]):
        self.detector, self.run, self.size = detector, run, size
        self.outputs: list[Tensor] = []

    def replacements(self) -> Iterator[tuple[nn.Module, str, Callable]]:
        yield self.detector, "extract_feat", self.features
        if hasattr(self.detector, "forward_transformer"):
            # The head looks up its last layer's input before it is called.
            yield self.detector, "forward_transformer", lambda *args, **kwargs: {"hidden_states": torch.zeros(1, 1)}
            yield self.detector.bbox_head, "forward", lambda *args, **kwargs: tuple(self.outputs)
        else:
            head = self.detector.rpn_head if _is_two_stage(self.detector) else self.detector.bbox_head
            yield head, "forward", lambda *args, **kwargs: self.by_kind()

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        if hasattr(self.detector, "forward_transformer") and images.shape[-2:] != torch.Size(self.size):
            raise Qwt2Error(
                f"an image of {_times(images.shape[-2:])} pixels does not have the exported size {_times(self.size)}; "
                "resize all images to one size, without keeping their ratio"
            )
        outputs = [torch.from_numpy(array) for array in _arrays(self.run(padded(images, self.size).numpy()))]
        levels = len(outputs) // 3 if _is_two_stage(self.detector) else 0
        self.outputs = outputs[levels:]
        return tuple(outputs[:levels])

    def by_kind(self) -> tuple[list[Tensor], list[Tensor]]:
        """Scores and box offsets, each a list over the levels."""
        levels = len(self.outputs) // 2
        return self.outputs[:levels], self.outputs[levels:]


def padded(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images with zeros at the bottom and on the right, up to a height and width.

    Raises `Qwt2Error` for larger ones.
    """
    height, width = images.shape[-2:]
    if height > size[0] or width > size[1]:
        raise Qwt2Error(f"an image of {height} x {width} pixels is larger than the exported {_times(size)}")
    return F.pad(images, (0, size[1] - width, 0, size[0] - height))


def _times(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


def _on_regions(run: Run) -> Callable[[Tensor], Any]:
    def forward(x: Tensor) -> Any:
        filled = F.pad(x, (0, 0, 0, 0, 0, 0, 0, -len(x) % _REGIONS_AT_ONCE)).numpy()
        pieces = [
            _arrays(run(np.ascontiguousarray(piece))) for piece in np.split(filled, len(filled) // _REGIONS_AT_ONCE)
        ]
        outputs = tuple(torch.from_numpy(np.concatenate(arrays)[: len(x)]) for arrays in zip(*pieces))
        return outputs[0] if len(outputs) == 1 else outputs

    return forward


def _is_two_stage(detector: nn.Module) -> bool:
    return hasattr(detector, "roi_head")


@contextmanager
def _replaced(target: nn.Module, name: str, new: Callable) -> Iterator[None]:
    """Like `replaced_forward`, for any method."""
    setattr(target, name, new)
    try:
        yield
    finally:
        delattr(target, name)
