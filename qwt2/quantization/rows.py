"""A layer as a matrix product: rows of its input, its weight and its output, per convolution group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from qwt2.quantization.layers import QuantizedConv2d, QuantizedLayer

_VALUES = 2**24  # values of the input's rows that are made at a time, about


def groups_of(layer: QuantizedLayer) -> int:
    """Return the number of a layer's groups; a Linear has one."""
    return layer.groups if isinstance(layer, QuantizedConv2d) else 1


def weight_rows(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """Reshape a weight (C_out, ...) to (groups, C_out / groups, d), where d counts the inputs of one output."""
    return weight.reshape(groups_of(layer), layer.out_channels // groups_of(layer), -1)


def by_row(layer: QuantizedLayer, values: Tensor) -> Tensor:
    """Reshape one value per output channel, (C_out,) or (), to float64 (groups, C_out / groups, 1)."""
    return weight_rows(layer, values.double().expand(layer.out_channels))


def rows(layer: QuantizedLayer, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the layer's inputs (groups, n, d) and their outputs (groups, n, C_out / groups), in parts.

    The layer computes outputs = inputs @ weight_rows', plus its bias.

    Args:
        layer: a Linear or a convolution.
        x: its input, (..., C_in) or (N, C_in, H, W).
        y: values in the shape of its output, (..., C_out) or (N, C_out, H', W').
    """
    for part_x, part_y in parts(layer, x, y):
        if isinstance(layer, QuantizedConv2d):
            yield input_rows(layer, part_x), by_group(part_y.flatten(2), layer.groups)
        else:
            yield input_rows(layer, part_x), part_y.reshape(1, -1, y.shape[-1])


def parts(layer: QuantizedLayer, x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split a layer's input, and tensors that belong to it, by images: rows of convolutions take much memory."""
    images = len(x)
    if isinstance(layer, QuantizedConv2d):
        copies = layer.weight[0, 0].numel() / math.prod(layer.stride)
        images = max(1, int(_VALUES / (x[0].numel() * copies)))
    return zip(*(values.split(images) for values in (x, *others)))


def input_rows(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """Return the rows (groups, n, d) of an input (..., C_in) or (N, C_in, H, W)."""
    if not isinstance(layer, QuantizedConv2d):
        return x.reshape(1, -1, x.shape[-1])
    padding: Any = layer.padding  # capture leaves no named padding
    return by_group(F.unfold(x, layer.weight.shape[2:], layer.dilation, padding, layer.stride), layer.groups)


def by_group(values: Tensor, groups: int) -> Tensor:
    """Reshape (N, groups * d, positions) to (groups, N * positions, d)."""
    count, _, positions = values.shape
    values = values.reshape(count, groups, -1, positions).permute(1, 0, 3, 2)
    return values.reshape(groups, count * positions, -1)
