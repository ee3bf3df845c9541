"""Rewrite other kinds of convolutions as plain 2-d ones, for which integer engines have kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qwt2.capture.graph import GraphModel, insert, replace

aten = torch.ops.aten


def as_convolution(model: GraphModel, node: fx.Node) -> None:
    """Replace a 1-d or transposed convolution, or one with named padding; leave it if that is not possible."""
    if node.target is aten.conv_transpose2d.input:
        _transposed(model, node)
    elif node.target in (aten.conv1d.default, aten.conv_transpose1d.default, aten.conv1d.padding):
        _one_dimensional(model, node)
    else:
        _named_padding(node)


def _named_padding(node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, groups = _arguments(node, None, [1, 1], "valid", [1, 1], 1)
    sizes = weight.meta["shape"][2:]
    dilation = list(dilation) * (len(sizes) // len(dilation))
    total = [0] * len(sizes) if padding == "valid" else [d * (k - 1) for d, k in zip(dilation, sizes)]
    before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    if before != after:
        pads = [p for pair in zip(reversed(before), reversed(after)) for p in pair]
        shape = (*x.meta["shape"][:2], *(s and s + t for s, t in zip(x.meta["shape"][2:], total)))
        x = insert(node.graph, node, aten.constant_pad_nd.default, (x, pads, 0.0), x, shape)
        before = [0] * len(sizes)
    target = aten.conv2d.default if len(sizes) == 2 else aten.conv1d.default
    replace(node, insert(node.graph, node, target, (x, weight, bias, stride, before, dilation, groups), node))


def _arguments(node: fx.Node, *defaults: Any) -> list[Any]:
    """Return a convolution's input, weight and further arguments, with defaults for those that are left out."""
    return [*node.args, *defaults[len(node.args) - 2 :]]


def _one_dimensional(model: GraphModel, node: fx.Node) -> None:
    """Treat (N, C, L) as images of height 1."""

    def wide(x: fx.Node) -> fx.Node:
        shape = (*x.meta["shape"][:-1], 1, x.meta["shape"][-1])
        return insert(node.graph, node, aten.unsqueeze.default, (x, -2), x, shape)

    named = node.target is aten.conv1d.padding
    transposed = node.target is aten.conv_transpose1d.default
    if transposed:
        x, weight, bias, stride, padding, extra, groups, dilation = _arguments(node, None, [1], [0], [0], 1, [1])
        rest: tuple[Any, ...] = (bias, [1, *stride], [0, *padding], [0, *extra], groups, [1, *dilation])
    else:
        defaults = (None, [1], "valid" if named else [0], [1], 1)
        x, weight, bias, stride, padding, dilation, groups = _arguments(node, *defaults)
        rest = (bias, [1, *stride], padding if named else [0, *padding], [1, *dilation], groups)
    target = aten.conv_transpose2d.input if transposed else aten.conv2d.padding if named else aten.conv2d.default
    shape = (*node.meta["shape"][:-1], 1, node.meta["shape"][-1])
    weight_wide = model.add_constant(node, model.get_tensor(weight.target).unsqueeze(-2))
    y = insert(node.graph, node, target, (wide(x), weight_wide, *rest), node, shape)
    replace(node, insert(node.graph, node, aten.squeeze.dim, (y, -2), node))
    if target is not aten.conv2d.default:
        as_convolution(model, y)


def _transposed(model: GraphModel, node: fx.Node) -> None:
    """Replace a transposed convolution by a convolution followed by a pixel shuffle.

    Output pixel s q + r reads the inputs q - m with the weights s m + r. So each offset r is a convolution with
    ceil(k / s) weights per axis, and one convolution with s * s times as many channels computes all of them (Shi et
    al., "Is the deconvolution layer the same as a convolutional layer?", arXiv 1609.07009).
    """
    defaults = (None, [1, 1], [0, 0], [0, 0], 1, [1, 1])
    x, weight, bias, stride, padding, extra, groups, dilation = _arguments(node, *defaults)
    stride, padding, extra, dilation = (list(v) * (2 // len(v)) for v in (stride, padding, extra, dilation))
    kernel, size = weight.meta["shape"][2:], x.meta["shape"][2:]
    taps = [-(-k // s) for k, s in zip(kernel, stride)]
    reaches = all(t * s >= k - p + e for t, s, k, p, e in zip(taps, stride, kernel, padding, extra))
    if set(dilation) != {1} or None in size or not reaches:
        return
    spread, channels = stride[0] * stride[1], node.meta["shape"][1]
    new = model.add_constant(node, _subpixel_weight(model.get_tensor(weight.target), stride, taps, groups))
    if bias is not None:
        bias = model.add_constant(node, model.get_tensor(bias.target).repeat_interleave(spread))
    high, wide = (n + t - 1 for n, t in zip(size, taps))
    batch = node.meta["shape"][0]
    arguments = (x, new, bias, [1, 1], [t - 1 for t in taps], [1, 1], groups)
    y = insert(node.graph, node, aten.conv2d.default, arguments, node, (batch, channels * spread, high, wide))
    y = _spread_out(node, y, channels, stride, high, wide)
    for axis in (0, 1):
        length = node.meta["shape"][2 + axis]
        if padding[axis] or length != y.meta["shape"][2 + axis]:
            shape = tuple(length if number == 2 + axis else n for number, n in enumerate(y.meta["shape"]))
            y = insert(
                node.graph, node, aten.slice.Tensor, (y, 2 + axis, padding[axis], padding[axis] + length), node, shape
            )
    replace(node, y)


def _spread_out(node: fx.Node, y: fx.Node, channels: int, stride: list[int], high: int, wide: int) -> fx.Node:
    batch, (rows, columns) = node.meta["shape"][0], stride
    shape = (batch, channels, high * rows, wide * columns)
    if rows == columns:
        return y if rows == 1 else insert(node.graph, node, aten.pixel_shuffle.default, (y, rows), node, shape)
    six = (batch, channels, rows, columns, high, wide)
    y = insert(node.graph, node, aten.reshape.default, (y, [-1, *six[1:]]), node, six)
    y = insert(
        node.graph,
        node,
        aten.permute.default,
        (y, [0, 1, 4, 2, 5, 3]),
        node,
        (batch, channels, high, rows, wide, columns),
    )
    return insert(node.graph, node, aten.reshape.default, (y, [-1, *shape[1:]]), node, shape)


def _subpixel_weight(weight: Tensor, stride: list[int], taps: list[int], groups: int) -> Tensor:
    """(C_in, C_out / groups, k, k) -> (C_out * s * s, C_in / groups, taps, taps), channels in PixelShuffle's order."""
    (rows, columns), (high, wide) = stride, taps
    grown = F.pad(weight, (0, wide * columns - weight.shape[3], 0, high * rows - weight.shape[2]))
    split = grown.reshape(groups, weight.shape[0] // groups, weight.shape[1], high, rows, wide, columns).flip(3, 5)
    return split.permute(0, 2, 4, 6, 1, 3, 5).reshape(-1, weight.shape[0] // groups, high, wide).contiguous()
