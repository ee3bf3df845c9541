"""Replacement of mmcv's compiled operators by torchvision's NMS and RoIAlign where mmcv is not compiled.

mmcv has no wheels for recent PyTorch releases, and compiling it takes minutes and a compiler. mmcv-lite is mmcv without
the operators. Detectors need two of them, and torchvision has both. A compiled mmcv is used as it is.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch import Tensor

from qwt2.errors import Qwt2Error
from qwt2.extras import extra

_EXTENSION = "mmcv._ext"


def ensure_operators() -> str:
    """Make ``mmcv.ops`` importable. Call this before mmdet's models are imported.

    Returns:
        "mmcv" if its own operators are compiled, else "torchvision".

    Raises:
        Qwt2Error: torchvision, mmcv or mmengine is missing; the message names the extra that installs it.
    """
    if isinstance(sys.modules.get(_EXTENSION), _Bridge):
        return "torchvision"
    with extra("detection"):
        if importlib.util.find_spec(_EXTENSION) is not None:  # imports mmcv, which needs mmengine
            return "mmcv"
        import torchvision  # noqa: F401  # registers the operators

    sys.modules[_EXTENSION] = _Bridge(_EXTENSION)
    return "torchvision"


class _Bridge(ModuleType):
    """Stands in for mmcv's extension module. Operators that it does not have can be imported but raise when called."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, loader=None)  # importlib.util.find_spec needs it

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(name)

    @staticmethod
    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
        """Return the indices of the boxes (N, 4) that are kept, by decreasing score."""
        from torchvision.ops import nms

        # With mmcv's offset a box has the width x2 - x1 + offset. Moving its far corner has the same effect.
        return nms(boxes + boxes.new_tensor([0, 0, offset, offset]) if offset else boxes, scores, iou_threshold)

    @staticmethod
    def roi_align_forward(
        x,
        rois,
        output,
        argmax_y,
        argmax_x,
        aligned_height,
        aligned_width,
        spatial_scale,
        sampling_ratio,
        pool_mode,
        aligned,
    ) -> None:
        """Write the features of regions (K, 5) into ``output`` (K, C, aligned_height, aligned_width)."""
        _refuse_max_pooling(pool_mode)
        size = (aligned_height, aligned_width)
        output.copy_(torch.ops.torchvision.roi_align(x, rois, spatial_scale, *size, sampling_ratio, aligned))

    @staticmethod
    def roi_align_backward(
        gradient, rois, argmax_y, argmax_x, gradient_x, aligned_height, aligned_width, spatial_scale, sampling_ratio,
        pool_mode, aligned,
    ) -> None:  # fmt: skip
        """Write the gradient of the input into ``gradient_x`` (N, C, H, W)."""
        _refuse_max_pooling(pool_mode)
        size, shape = (aligned_height, aligned_width), gradient_x.shape
        gradient_x.copy_(
            torch.ops.torchvision._roi_align_backward(
                gradient, rois, spatial_scale, *size, *shape, sampling_ratio, aligned
            )
        )


def _refuse_max_pooling(pool_mode: int) -> None:
    if pool_mode != 1:
        raise Qwt2Error(
            "RoIAlign with pool_mode='max' needs a compiled mmcv; use pool_mode='avg' or install mmcv with operators"
        )


def _missing(name: str):
    def refuse(*args, **kwargs):
        raise Qwt2Error(
            f"this detector needs mmcv's operator {name}, which mmcv-lite does not have; install a compiled mmcv 2.1"
        )

    return refuse
