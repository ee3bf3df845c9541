"""Splitting of projections: one layer that computes query, key and value becomes one layer for each.

Only a quantizer then follows each layer, and engines compute it in the layer's integer kernel, which writes codes of
one byte. Without the split they write floats for all three, take them apart and quantize them afterwards. No value
changes, bit for bit, because a layer's output channels do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from qwt2.onnx.graph import (
    add_initializer,
    constant,
    copy_node,
    make,
    maker,
    only_reader,
    readers,
    sizes,
    stored,
    take_over,
)
from qwt2.onnx.names import part_name, stored_values


def split_projections(graph: ir.Graph) -> None:
    """Split every layer whose output is reshaped, transposed and taken apart into equal pieces.

    Stored tensors become ``<name>/0of3``, ``<name>/1of3``, ... (:func:`qwt2.onnx.names.part_name`).
    """
    for gemm in list(graph):
        projection = _projection(gemm) if gemm.op_type == "Gemm" and len(gemm.inputs) == 3 else None
        if projection is not None:
            projection.split(graph)


@dataclass
class _Projection:
    """A layer and the nodes that take its output apart.

    Attributes:
        gemm, weight, bias: the layer's Gemm and the dequantizers of its weight and bias.
        reshapes, transpose: the nodes behind the layer.
        lengths: the sizes in the last reshape's shape, one value per axis.
        order: the transpose's permutation; its first axis counts the pieces.
        pieces: for each piece, the nodes that select it.
    """

    gemm: ir.Node
    weight: ir.Node
    bias: ir.Node
    reshapes: list[ir.Node]
    transpose: ir.Node
    lengths: list[ir.Value]
    order: list[int]
    pieces: list[list[ir.Node]]

    def split(self, graph: ir.Graph) -> None:
        """Replace these nodes by a layer, a reshape and a transpose per piece, inserted where the transpose is."""
        whole = [*self.weight.inputs, *self.bias.inputs]
        parts = [self._store_part(graph, number, whole) for number in range(len(self.pieces))]
        # Not where the layer is: the nodes that compute the shape may come after it.
        self.transpose.prepend([node for number, part in enumerate(parts) for node in self._part(number, part)])
        selecting = [node for piece in self.pieces for node in piece]
        graph.remove([self.gemm, self.weight, self.bias, *self.reshapes, self.transpose, *selecting], safe=True)
        for value in whole:
            del graph.initializers[value.name]

    def _store_part(self, graph: ir.Graph, number: int, whole: list[ir.Value]) -> dict[ir.Value, ir.Value]:
        """Store one piece's parts of the layer's tensors; return a dictionary from whole tensor to part."""
        parts: dict[ir.Value, ir.Value] = {}
        for value in whole:
            name = part_name(value.name, number, len(self.pieces))
            array = stored_values(name, {value.name: stored(value)})
            assert array is not None, name  # the name is a part's
            parts[value] = add_initializer(graph, name, array)
        return parts

    def _part(self, number: int, parts: Mapping[ir.Value, ir.Value]) -> list[ir.Node]:
        """Return the nodes of one piece's layer, reshape and transpose; the transpose's output replaces the piece."""

        def own(name: str) -> str:
            return part_name(name, number, len(self.pieces))

        counted, last = self.order[0], self.reshapes[-1]
        lengths = [length for axis, length in enumerate(self.lengths) if axis != counted]
        order = [axis - (axis > counted) for axis in self.order[1:]]
        weight = copy_node(self.weight, [parts[value] for value in self.weight.inputs], own)
        bias = copy_node(self.bias, [parts[value] for value in self.bias.inputs], own)
        for whole, dequantize in ((self.weight, weight), (self.bias, bias)):
            dequantize.outputs[0].type, dequantize.outputs[0].shape = whole.outputs[0].type, dequantize.inputs[0].shape
        layer = copy_node(self.gemm, [self.gemm.inputs[0], *weight.outputs, *bias.outputs], own)
        shape = make("Concat", lengths, own(last.inputs[1].name), axis=0)
        reshape = copy_node(last, [*layer.outputs, *shape.outputs], own)
        transpose = make("Transpose", reshape.outputs, own(self.transpose.name), perm=order)
        take_over(transpose.outputs[0], self.pieces[number][-1].outputs[0])
        return [weight, bias, layer, shape, reshape, transpose]


def _projection(gemm: ir.Node) -> _Projection | None:
    """Return the layer with the nodes behind it if it can be split, else ``None``."""
    weight, bias = (maker(value, "DequantizeLinear") for value in gemm.inputs[1:])
    if not _has_own_constants(weight) or not _has_own_constants(bias):
        return None
    reshapes: list[ir.Node] = []
    while (node := only_reader((reshapes or [gemm])[-1].outputs[0])) is not None and node.op_type == "Reshape":
        reshapes.append(node)
    if node is None or node.op_type != "Transpose" or not reshapes or node.outputs[0].is_graph_output():
        return None
    order, shape = list(node.attributes.get_ints("perm")), sizes(node.inputs[0])
    pieces = _pieces(node.outputs[0], shape[order[0]] if len(shape) == len(order) else 0)
    joined = maker(reshapes[-1].inputs[1], "Concat")
    if not pieces or joined is None or len(joined.inputs) != len(order):
        return None
    # The pieces are contiguous in the layer's channels only if the axis that counts them is the first of those axes.
    width = (sizes(gemm.outputs[0]) or [0])[-1]
    if not width or np.prod(shape[order[0] :]) != width:
        return None
    return _Projection(gemm, weight, bias, reshapes, node, list(joined.inputs), order, pieces)


def _has_own_constants(dequantize: ir.Node | None) -> TypeGuard[ir.Node]:
    """Return whether a node dequantizes stored tensors that no other node reads."""
    if dequantize is None or not all(value.is_initializer() for value in dequantize.inputs):
        return False
    return all(len(value.uses()) == 1 for value in (*dequantize.inputs, *dequantize.outputs))


def _pieces(value: ir.Value, count: int) -> list[list[ir.Node]]:
    """Return, for every index of a tensor's first axis, the nodes that select it; empty if anything else reads it."""
    found: dict[int, list[ir.Node]] = {}
    for reader in readers(value):
        index, nodes = _selected(reader)
        if index is None:
            return []
        found[index % count if count else index] = nodes
    complete = count > 1 and sorted(found) == list(range(count)) and len(value.uses()) == count
    return [found[i] for i in range(count)] if complete else []


def _selected(node: ir.Node) -> tuple[int | None, list[ir.Node]]:
    """Return the index of its input's first axis that a Gather, or a Slice with a Squeeze, selects, and these nodes."""
    if node.op_type == "Gather":
        index = constant(node.inputs[1])
        if index is None or index.ndim or node.attributes.get_int("axis", 0) != 0:
            return None, []
        return index.item(), [node]
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return None, []
    ends = [end for end in map(constant, node.inputs[1:4]) if end is not None and end.size == 1]
    squeeze = only_reader(node.outputs[0])
    if squeeze is None or squeeze.op_type != "Squeeze" or len(ends) != 3:
        return None, []
    start, end, axis = (value.item() for value in ends)
    squeezed = constant(squeeze.inputs[1]) if len(squeeze.inputs) > 1 else None
    is_one = axis == 0 and end == start + 1 and squeezed is not None and squeezed.tolist() == [0]
    return (start, [node, squeeze]) if is_one else (None, [])
