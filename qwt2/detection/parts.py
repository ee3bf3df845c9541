"""Execution of a detector's parts on an integer engine, inside the mmdet detector that does the rest.

There is one file for the dense part (backbone, neck and dense head) and one for each box and mask head. Anchors, NMS,
RoIAlign and the pasting of masks stay in PyTorch, where mmdet's own code turns the engine's outputs into detections.
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
_REGIONS_AT_ONCE = 32  # engines are compiled for one number of regions; the last batch is padded with zeros

Run = Callable[[np.ndarray], Any]


def part_names(network: Detector) -> list[str]:
    """Return the names of a network's parts, the dense part first."""
    return [DENSE, *box_heads(network.detector), *mask_heads(network.detector)]


def split(model: GraphModel) -> dict[str, GraphModel]:
    """Split a captured detector into its parts.

    Args:
        model: the captured :class:`qwt2.detection.network.Detector`.

    Returns:
        Parts by name, the dense part first. Each takes one tensor and returns a tuple. The dense part returns the
        features of every level, if there are box or mask heads, and then the outputs of the dense head.
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
    """Return the name of the part that computes a node."""
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
    """Return the input of every part, by name, when the captured detector is called with ``inputs``."""
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
    """Return a function per part of a captured detector that runs it in PyTorch, with the interface of an engine.

    Each function takes an array and returns the part's outputs as arrays by number.
    """

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
    """Let ``runs`` compute the parts of the mmdet detector inside the ``with`` block.

    Args:
        network: the network of the mmdet detector. Its own parts do not run.
        runs: a function per part that takes an array and returns arrays (:class:`qwt2.engines.Engine`).
        size: height and width of the dense part's input, in pixels. Smaller images are padded, as mmdet pads the images
            of a batch. A transformer would treat the padding as a part of the image, so its images must have this size.

    Yields:
        The mmdet detector.

    Raises:
        Qwt2Error: inside the block, for an image that is larger than ``size``, or smaller if the detector is a
            transformer.
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
    """Let a detector find only boxes inside the ``with`` block. Masks take half of its time."""
    masks = detector.roi_head.mask_head
    detector.roi_head.mask_head = None
    try:
        yield
    finally:
        detector.roi_head.mask_head = masks


class _Dense:
    """Runs the dense part once per batch. The detector asks for neck features first and for head outputs later."""

    def __init__(self, detector: nn.Module, run: Run, size: tuple[int, int]):
        self.detector, self.run, self.size = detector, run, size
        self.outputs: list[Tensor] = []

    def replacements(self) -> Iterator[tuple[nn.Module, str, Callable]]:
        yield self.detector, "extract_feat", self.features
        if hasattr(self.detector, "forward_transformer"):
            # mmdet indexes the last hidden state before it calls ``forward``.
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
        """Return scores and box offsets, each as a list over the levels."""
        levels = len(self.outputs) // 2
        return self.outputs[:levels], self.outputs[levels:]


def padded(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad images with zeros at the bottom and on the right.

    Args:
        images: (N, C, H, W).
        size: height and width of the result.

    Returns:
        Images (N, C, height, width).

    Raises:
        Qwt2Error: the images are larger than ``size``.
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
    """Temporarily replace any method of a module; see :func:`replaced_forward`."""
    setattr(target, name, new)
    try:
        yield
    finally:
        delattr(target, name)
