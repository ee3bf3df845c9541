"""A layer as a matrix product: rows of its input, its weight and its output, per convolution group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from qwt2.quantization.layers import QuantizedConv2d, QuantizedLayer

_VALUES = 2**24  # values of the input's rows that are made at a time


def groups_of(layer: QuantizedLayer) -> int:
    """Return the number of a layer's groups; a Linear has one."""
    return layer.groups if isinstance(layer, QuantizedConv2d) else 1


def weight_rows(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """Reshape a weight (C_out, ...) to (groups, C_out / groups, d), where d counts the inputs of one output."""
    return weight.reshape(groups_of(layer), layer.out_channels // groups_of(layer), -1)


def rows(layer: QuantizedLayer, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the layer's inputs (groups, n, d) and their outputs (groups, n, C_out / groups), in parts.

    The layer computes outputs = inputs @ weight_rows', plus its bias.

    Args:
        layer: a Linear or a convolution.
        x: its input, (..., C_in) or (N, C_in, H, W).
        y: values in the shape of its output, (..., C_out) or (N, C_out, H', W').
    """
    if not isinstance(layer, QuantizedConv2d):
        yield x.reshape(1, -1, x.shape[-1]), y.reshape(1, -1, y.shape[-1])
        return
    taps = layer.weight[0, 0].numel() * y.shape[2] * y.shape[3]
    images = max(1, _VALUES // (x.shape[1] * taps))
    for part_x, part_y in zip(x.split(images), y.split(images)):
        padding: Any = layer.padding  # capture leaves no named padding
        patches = F.unfold(part_x, layer.weight.shape[2:], layer.dilation, padding, layer.stride)
        yield _by_group(patches, layer.groups), _by_group(part_y.flatten(2), layer.groups)


def _by_group(values: Tensor, groups: int) -> Tensor:
    """Reshape (N, groups * d, positions) to (groups, N * positions, d)."""
    count, _, positions = values.shape
    values = values.reshape(count, groups, -1, positions).permute(1, 0, 3, 2)
    return values.reshape(groups, count * positions, -1)
