"""A detector as a network that can be quantized: all modules with weights, run on given regions.

A two-stage detector chooses the regions for its heads from its own outputs. The full-precision and the quantized
network therefore choose different regions, and their outputs cannot be compared. Here the regions are inputs, chosen by
the full-precision network (:func:`regions`). The dense part and each head are captured separately. mmdet's own
extraction of region features, which cannot be traced, stays between them.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from qwt2.capture.check import evaluation_mode
from qwt2.capture.export import capture
from qwt2.capture.graph import GraphModel, Signature
from qwt2.detection.patching import replaced_forward
from qwt2.errors import Qwt2Error

PARTS = ("backbone", "neck", "heads")
REGIONS = "_regions"  # suffix of a head's name: the module that extracts the features of the head's regions


class Detector(nn.Module):
    """Backbone, neck, dense head, and the box and mask heads of an mmdet detector on given regions.

    Args:
        detector: an mmdet detector with a RoI head of one stage (Mask R-CNN) or several stages (Cascade Mask R-CNN), or
            without a RoI head.
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, boxes: Tensor | None = None, mask_boxes: Tensor | None = None) -> list[Any]:
        """Return the raw outputs of the dense head, then of the box heads, then of the mask heads.

        Args:
            images: (N, 3, H, W), normalized.
            boxes: regions (N, stages, K, 4) for the box heads, in pixels.
            mask_boxes: regions (N, L, 4) for the mask heads, in pixels.
        """
        features = self.detector.extract_feat(images)
        outputs = [self.dense_head(features, images)]
        if boxes is not None:
            extractors = stages(self.detector.roi_head.bbox_roi_extractor)
            for stage, (extract, head) in enumerate(zip(extractors, box_heads(self.detector).values())):
                outputs.append(head(RegionFeatures(extract, stage)(boxes, *features)))
        if mask_boxes is not None:
            extractors = stages(self.detector.roi_head.mask_roi_extractor)
            for extract, head in zip(extractors, mask_heads(self.detector).values()):
                outputs.append(head(RegionFeatures(extract)(mask_boxes, *features)))
        return outputs

    def capture_parts(self, example: dict[str, Tensor]) -> GraphModel:
        """Capture the parts (:func:`qwt2.capture.export.capture`), and join them by :class:`RegionFeatures`.

        Args:
            example: example inputs by name, from :func:`regions`.

        Returns:
            One graph of all parts.
        """
        images = example["images"]
        extraction = self._extraction(example)
        with torch.no_grad(), evaluation_mode(self):
            features = self.detector.extract_feat(images)
            regions = {name: module(boxes, *features) for name, (module, boxes) in extraction.items()}
            outputs = self(**example)
        join = _Join(self, example)
        dense = join.add(capture(DensePart(self), images), join.inputs["images"])
        levels, found = dense[: len(features)], dense[len(features) :]
        for name, (module, _) in extraction.items():
            node = join.extract(name, module, levels, regions[name])
            found += join.add(capture(HeadPart(self, name), regions[name]), node)
        return join.finish(found, tree_flatten(outputs)[1])

    def _extraction(self, example: dict[str, Tensor]) -> dict[str, tuple[RegionFeatures, Tensor]]:
        """Return, for every head, the module that extracts its features, and its regions."""
        found = {}
        for key, heads, kind in (
            ("boxes", box_heads, "bbox_roi_extractor"),
            ("mask_boxes", mask_heads, "mask_roi_extractor"),
        ):
            if example.get(key) is None:
                continue
            extractors = stages(getattr(self.detector.roi_head, kind))
            for stage, (extract, name) in enumerate(zip(extractors, heads(self.detector))):
                found[name] = RegionFeatures(extract, stage if key == "boxes" else None), example[key]
        return found

    def dense_head(self, features: tuple[Tensor, ...], images: Tensor) -> Any:
        """Return the outputs of the dense head at every position, or of a transformer for the whole image."""
        if hasattr(self.detector, "forward_transformer"):
            return self.detector.bbox_head(**self.detector.forward_transformer(features, _whole_images(images)))
        head = getattr(self.detector, "rpn_head", None) or self.detector.bbox_head
        return head(features)


class DensePart(nn.Module):
    """Backbone, neck and dense head: images (N, 3, H, W) to the features of every level, then the head's outputs."""

    def __init__(self, network: Detector):
        super().__init__()
        self.detector, self.dense_head = network.detector, network.dense_head

    def forward(self, images: Tensor) -> list[Any]:
        """Return the features of all levels, then the outputs of the dense head, for images (N, 3, H, W)."""
        features = self.detector.extract_feat(images)
        return [*features, *tree_flatten(self.dense_head(features, images))[0]]


class HeadPart(nn.Module):
    """One head, with modules named as in the network: features of regions (K, C, h, w) to the head's outputs."""

    def __init__(self, network: Detector, name: str):
        super().__init__()
        self.name = name
        holder: nn.Module = self
        *parents, child = name.split(".")
        for parent in parents:
            holder.add_module(parent, nn.Module())
            holder = holder.get_submodule(parent)
        holder.add_module(child, network.get_submodule(name))

    def forward(self, regions: Tensor) -> list[Any]:
        """Return the head's outputs, in order, for features of regions (K, C, h, w)."""
        return tree_flatten(self.get_submodule(self.name)(regions))[0]


class RegionFeatures(nn.Module):
    """Extracts features (N * K, C, h, w) of regions (N, K, 4), or of one stage of regions (N, stages, K, 4).

    Args:
        extract: mmdet's extractor.
        stage: number of the stage; ``None`` for regions without stages.
    """

    def __init__(self, extract: nn.Module, stage: int | None = None):
        super().__init__()
        self.extract, self.stage = extract, stage

    def forward(self, boxes: Tensor, *features: Tensor) -> Tensor:
        """Return features (N * K, C, h, w) of boxes (N, [stages,] K, 4) from the features of every level."""
        boxes = boxes if self.stage is None else boxes[:, self.stage]
        numbers = torch.arange(len(boxes), dtype=boxes.dtype, device=boxes.device).repeat_interleave(boxes.shape[1])
        return self.extract(features[: self.extract.num_inputs], torch.cat([numbers[:, None], boxes.flatten(0, 1)], 1))


class _Join:
    """Joins the graphs of parts into one."""

    def __init__(self, network: Detector, example: dict[str, Tensor]):
        self.network, self.example = network, example
        self.graph = fx.Graph()
        self.parts: list[GraphModel] = []
        self.extractions: dict[str, RegionFeatures] = {}
        self.inputs = {name: self._input(name, tensor) for name, tensor in example.items()}

    def _input(self, name: str, tensor: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta = {"module": "", "shape": (None, *tensor.shape[1:]), "dtype": tensor.dtype, "leaf": False, "call": ""}
        return node

    def add(self, part: GraphModel, source: fx.Node) -> list[fx.Node]:
        """Add a part that reads the node ``source``, and return the nodes of its outputs."""
        self.parts.append(part)
        copied: Any = self.graph.graph_copy(part.graph, {part.inputs[0]: source})
        return list(copied)

    def extract(self, head: str, module: RegionFeatures, levels: list[fx.Node], like: Tensor) -> fx.Node:
        boxes = self.inputs["boxes" if module.stage is not None else "mask_boxes"]
        self.extractions[f"{head}{REGIONS}"] = module
        node = self.graph.call_module(f"{head}{REGIONS}", (boxes, *levels))
        node.meta = levels[0].meta | {"module": "", "call": "", "shape": (None, *like.shape[1:])}
        return node

    def finish(self, outputs: list[fx.Node], out_spec: TreeSpec) -> GraphModel:
        self.graph.output(outputs)
        signature = Signature.of(self.network.forward, (), self.example, out_spec)
        joined = GraphModel(self.graph, {}, signature, type(self.network.detector).__name__)
        for part in self.parts:
            joined.share(part, part.graph.nodes)
        for name, module in self.extractions.items():
            joined.set_module(name, module)
        joined.prune()
        return joined


def stages(module: nn.Module) -> list[nn.Module]:
    """Return a cascade's modules of one kind, one per stage; for other detectors, a list of the only one."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def box_heads(detector: nn.Module) -> dict[str, nn.Module]:
    """Return a two-stage detector's box heads by their names in :class:`Detector`, in the order of the stages."""
    return _heads(detector, "bbox_head")


def mask_heads(detector: nn.Module) -> dict[str, nn.Module]:
    """Return a two-stage detector's mask heads by their names in :class:`Detector`, in the order of the stages."""
    return _heads(detector, "mask_head")


def parts(detector: nn.Module, names: list[str]) -> list[str]:
    """Return the names of the modules to quantize for some of :data:`PARTS`.

    Every child with layers that is neither backbone nor neck counts as a head.

    Raises:
        Qwt2Error: ``names`` is empty or has a name that is not in :data:`PARTS`.
    """
    if unknown := set(names) - set(PARTS) or (not names and {""}):
        raise Qwt2Error(f"model.parts names {sorted(unknown)[0]!r}; choose some of {', '.join(PARTS)}")
    layers = (nn.Linear, nn.Conv2d)
    children = {
        name for name, child in detector.named_children() if any(isinstance(m, layers) for m in child.modules())
    }
    members = {"backbone": ["backbone"], "neck": ["neck"], "heads": sorted(children - {"backbone", "neck"})}
    return [f"detector.{child}" for name in PARTS if name in names for child in members[name] if child in children]


def regions(detector: nn.Module, images: Tensor, samples: list[Any], count: int, mask_count: int) -> dict[str, Tensor]:
    """Return the inputs of :class:`Detector` for a batch, with the regions that the full-precision detector chooses.

    Args:
        detector: the full-precision mmdet detector.
        images: (N, 3, H, W), from the detector's data preprocessor.
        samples: mmdet's data samples of the images.
        count: regions per image and box head. If there are fewer proposals, they are repeated.
        mask_count: regions per image and mask head.

    Returns:
        ``images``; for a two-stage detector also ``boxes`` and, with mask heads, ``mask_boxes``.
    """
    if not hasattr(detector, "roi_head"):
        return {"images": images}
    chosen: dict[str, list[Tensor]] = {"bbox": [], "mask": []}
    with ExitStack() as stack, torch.no_grad():
        of_boxes = stages(detector.roi_head.bbox_roi_extractor)
        for extractor in of_boxes:
            stack.enter_context(replaced_forward(extractor, _watching(extractor.forward, chosen["bbox"])))
        for extractor in stages(getattr(detector.roi_head, "mask_roi_extractor", nn.ModuleList())):
            if extractor not in of_boxes:
                stack.enter_context(replaced_forward(extractor, _stopping(chosen["mask"])))
        with suppress(_AllChosen):  # the masks themselves are not needed
            detector.predict(images, samples, rescale=False)
    stage_boxes = [_by_image(rois, len(images), count) for rois in chosen["bbox"]]
    inputs = {"images": images, "boxes": torch.stack(stage_boxes, 1)}
    if mask_heads(detector):
        # In images without detections, the proposals of the first stage are used instead.
        rois = chosen["mask"][0] if chosen["mask"] else chosen["bbox"][0][:0]
        inputs["mask_boxes"] = _by_image(rois, len(images), mask_count, fallback=stage_boxes[0])
    return inputs


class _AllChosen(Exception):  # noqa: N818, it ends a forward pass
    pass


def _watching(forward, seen: list[Tensor]):
    def watch(features, rois, *args, **kwargs):
        seen.append(rois)
        return forward(features, rois, *args, **kwargs)

    return watch


def _stopping(seen: list[Tensor]):
    def stop(features, rois, *args, **kwargs):
        seen.append(rois)
        raise _AllChosen

    return stop


def _by_image(rois: Tensor, images: int, count: int, fallback: Tensor | None = None) -> Tensor:
    """Group regions (K, 5), whose first column is the image number, into (N, count, 4).

    Regions are repeated in turn in images that have fewer than ``count``.

    Args:
        rois: the regions.
        images: number of images, N.
        count: regions per image.
        fallback: regions (N, count, 4) for images without any; zeros if it is not given.
    """
    result = []
    for number in range(images):
        boxes = rois[rois[:, 0] == number, 1:]
        if not len(boxes):
            boxes = fallback[number] if fallback is not None else rois.new_zeros(1, 4)
        result.append(boxes[torch.arange(count) % len(boxes)])
    return torch.stack(result)


def _heads(detector: nn.Module, kind: str) -> dict[str, nn.Module]:
    head = getattr(getattr(detector, "roi_head", None), kind, None)
    if head is None:
        return {}
    name = f"detector.roi_head.{kind}"
    return {f"{name}.{i}": m for i, m in enumerate(head)} if isinstance(head, nn.ModuleList) else {name: head}


def _whole_images(images: Tensor) -> list[Any]:
    """Return one data sample which says that no image of the batch is padded; it applies to any batch size."""
    from mmdet.structures import DetDataSample

    size = tuple(images.shape[-2:])
    return [DetDataSample(metainfo={"batch_input_shape": size, "img_shape": size})]
