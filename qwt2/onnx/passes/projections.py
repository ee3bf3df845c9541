"""Splitting projections of exported graphs: one layer that makes query, key and value becomes one layer for each.

Behind each then lies a quantizer alone, which belongs to the integer kernel: engines write codes of a byte, where they
would write floats for all, take those apart and quantize them after. Every value stays what it was, bit for bit: a layer's
output channels do not depend on each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qwt2.onnx.file import part_name, stored_values
from qwt2.onnx.graph import OnnxGraph


def split_projections(model: onnx.ModelProto) -> None:
    """Split every layer whose output is reshaped, transposed and taken apart into equal pieces, in place.

    Stored tensors become `<name>/0of3`, `<name>/1of3`, ... (:func:`qwt2.onnx.file.part_name`).
    """
    graph = model.graph
    finder = _Finder(model)
    found = [projection for node in finder.nodes if node.op_type == "Gemm" and (projection := finder.projection(node))]
    if not found:
        return
    stored = {tensor.name: tensor for tensor in graph.initializer}
    gone = {id(node) for projection in found for node in projection.nodes}
    # In the transpose's place: what its shape is computed from may come behind the layer.
    replaced = {id(projection.transpose): projection.parts() for projection in found}
    nodes = []
    for node in finder.nodes:
        nodes += replaced.get(id(node), [] if id(node) in gone else [node])
    for projection in found:
        for name in projection.constants:
            parts = [part_name(name, number, projection.count) for number in range(projection.count)]
            whole = {name: numpy_helper.to_array(stored[name])}
            graph.initializer.remove(stored[name])
            graph.initializer.extend(numpy_helper.from_array(stored_values(part, whole), part) for part in parts)
    finder.replace_nodes(nodes)


@dataclass
class _Projection:
    """A layer and how its output is taken apart.

    Attributes:
        gemm, weight, bias: the layer and its dequantizers.
        reshapes, transpose: behind it.
        sizes: constants and sizes that make the last reshape's shape, one for each axis.
        order: the transpose's; its first axis counts the pieces.
        pieces: for each piece the nodes that select it.
    """

    gemm: onnx.NodeProto
    weight: onnx.NodeProto
    bias: onnx.NodeProto
    reshapes: list[onnx.NodeProto]
    transpose: onnx.NodeProto
    sizes: list[str]
    order: list[int]
    pieces: list[list[onnx.NodeProto]]

    @property
    def count(self) -> int:
        return len(self.pieces)

    @property
    def constants(self) -> list[str]:
        return [*self.weight.input, *self.bias.input]

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """What the parts replace."""
        selecting = [node for piece in self.pieces for node in piece]
        return [self.gemm, self.weight, self.bias, *self.reshapes, self.transpose, *selecting]

    def parts(self) -> list[onnx.NodeProto]:
        """The layers of all pieces, each with a reshape and a transpose behind it."""
        return [node for number in range(self.count) for node in self._part(number)]

    def _part(self, number: int) -> list[onnx.NodeProto]:
        def own(name: str) -> str:
            return part_name(name, number, self.count)

        def copy(node: onnx.NodeProto, inputs: list[str]) -> onnx.NodeProto:
            same = onnx.NodeProto.FromString(node.SerializeToString())
            same.name, same.input[:], same.output[0] = own(node.name), inputs, own(node.output[0])
            return same

        counted, reshape = self.order[0], self.reshapes[-1]
        sizes = [size for axis, size in enumerate(self.sizes) if axis != counted]
        order = [axis - (axis > counted) for axis in self.order[1:]]
        shape, selected = own(reshape.input[1]), self.pieces[number][-1].output[0]
        layer = copy(self.gemm, [self.gemm.input[0], *map(own, self.gemm.input[1:])])
        return [
            copy(self.weight, list(map(own, self.weight.input))),
            copy(self.bias, list(map(own, self.bias.input))),
            layer,
            helper.make_node("Concat", sizes, [shape], f"{own(reshape.name)}/shape", axis=0),
            copy(reshape, [layer.output[0], shape]),
            helper.make_node("Transpose", [own(reshape.output[0])], [selected], own(self.transpose.name), perm=order),
        ]


class _Finder(OnnxGraph):
    def __init__(self, model: onnx.ModelProto):
        super().__init__(model)
        self.stored = {tensor.name for tensor in model.graph.initializer}

    def projection(self, gemm: onnx.NodeProto) -> _Projection | None:
        """What is behind a layer, if it can be split."""
        weight, bias = (self.made.get(name) for name in gemm.input[1:])
        if not self._own_constants(weight) or not self._own_constants(bias):
            return None
        reshapes, tensor = [], gemm.output[0]
        while (node := self.only_reader(tensor)) is not None and node.op_type == "Reshape":
            reshapes.append(node)
            tensor = node.output[0]
        if node is None or node.op_type != "Transpose" or not reshapes or node.output[0] in self.outputs:
            return None
        order = list(helper.get_attribute_value(node.attribute[0]))
        sizes = self.made.get(reshapes[-1].input[1])
        shape = self.shapes.get(tensor, [])
        pieces = self._pieces(node.output[0], shape[order[0]] if len(shape) == len(order) else 0)
        if not pieces or sizes is None or sizes.op_type != "Concat" or len(sizes.input) != len(order):
            return None
        # The pieces lie one after the other along the layer's channels, if the axis that counts them leads these.
        width = self.shapes.get(gemm.output[0], [0])[-1]
        if not width or np.prod(shape[order[0] :]) != width:
            return None
        return _Projection(gemm, weight, bias, reshapes, node, list(sizes.input), order, pieces)

    def _own_constants(self, node: onnx.NodeProto | None) -> bool:
        """Whether a node dequantizes what is stored for it alone."""
        return (
            node is not None and node.op_type == "DequantizeLinear" and len(self.readers[node.output[0]]) == 1
            and all(name in self.stored and len(self.readers[name]) == 1 for name in node.input)
        )  # fmt: skip

    def _pieces(self, tensor: str, count: int) -> list[list[onnx.NodeProto]]:
        """For every index of a tensor's first axis the nodes that select it, if nothing else reads the tensor."""
        found: dict[int, list[onnx.NodeProto]] = {}
        for reader in self.readers[tensor]:
            index, nodes = self._selected(reader)
            if index is None:
                return []
            found[index % count if count else index] = nodes
        complete = count > 1 and sorted(found) == list(range(count)) and len(self.readers[tensor]) == count
        return [found[i] for i in range(count)] if complete else []

    def _selected(self, node: onnx.NodeProto) -> tuple[int | None, list[onnx.NodeProto]]:
        """Which index of its input's first axis a node selects (with a Squeeze behind a Slice)."""
        if node.op_type == "Gather":
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            index = self._constant(node.input[1])
            return (index.item(), [node]) if axis == 0 and index is not None and index.ndim == 0 else (None, [])
        if node.op_type != "Slice" or len(node.input) < 4:
            return None, []
        start, end, axis = (self._constant(name) for name in node.input[1:4])
        squeeze = self.only_reader(node.output[0])
        known = all(value is not None and value.size == 1 for value in (start, end, axis))
        if not known or squeeze is None or squeeze.op_type != "Squeeze" or axis.item() != 0 or end.item() != start.item() + 1:
            return None, []
        squeezed = self._constant(squeeze.input[1]) if len(squeeze.input) > 1 else None
        return (start.item(), [node, squeeze]) if squeezed is not None and squeezed.tolist() == [0] else (None, [])

    def _constant(self, name: str) -> np.ndarray | None:
        tensor = self.constants.get(name)
        if tensor is not None:
            return numpy_helper.to_array(tensor)
        node = self.made.get(name)
        if node is None or node.op_type != "Constant":
            return None
        return np.asarray(helper.get_attribute_value(node.attribute[0]))
