"""Folding of the zero points of layers' inputs into the layers' biases.

    sum_k (x_k - z) w_k + b = sum_k x_k w_k + (b - z sum_k w_k)

holds exactly in integers. The dequantizer in front of a layer then has zero point 0, whatever its quantizer's is. The
accumulators including the bias, and all values that follow, do not change, bit for bit. Without the folding, OpenVINO
(2026.4) subtracts a zero point after the product, in a separate operation that also keeps scale and bias out of the
kernel's fast path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwt2.onnx.graph import add_initializer, constant, maker, store, stored

FOLDED = "zero_point/folded"  # the zero point (0) of dequantizers whose own was folded into biases
_MOVES = ("Flatten", "Reshape", "Transpose")
_BIASES = np.iinfo(np.int32)


def fold_zero_points(graph: ir.Graph) -> None:
    """Fold the zero point of every quantized tensor that only layers read.

    Three cases stay as they are: inputs of convolutions with padding, which would need another code for the padded
    zeros; layers that share a bias; and zero points with which a bias would not fit into int32.
    """
    for dequantize in graph:
        layers = _layers(dequantize.outputs[0]) if (zero_point := _zero_point(dequantize)) else []
        biases = [layer.bias_without(zero_point) for layer in layers]
        if not layers or any(bias.min() < _BIASES.min or bias.max() > _BIASES.max for bias in biases):
            continue
        for layer, bias in zip(layers, biases):
            store(layer.bias, bias.astype(np.int32))
        folded = graph.initializers.get(FOLDED) or add_initializer(graph, FOLDED, np.uint8(0))
        dequantize.replace_input_with(2, folded)


def unfold_zero_points(graph: ir.Graph) -> None:
    """Undo :func:`fold_zero_points` for dequantizers, for a graph whose biases were replaced by unfolded ones."""
    folded = graph.initializers.pop(FOLDED, None)
    for dequantize, position in [] if folded is None else folded.uses():
        name = f"{dequantize.inputs[1].name.removesuffix('.scale')}.zero_point"
        dequantize.replace_input_with(position, graph.initializers[name])


@dataclass(frozen=True)
class _Layer:
    """A layer's stored weight codes, the axis of their output channels, and its stored bias codes."""

    weight: ir.Value
    axis: int
    bias: ir.Value

    def bias_without(self, zero_point: int) -> np.ndarray:
        """Return the int64 bias codes that include ``-zero_point * sum(weight)``."""
        weight = stored(self.weight)
        others = tuple(axis for axis in range(weight.ndim) if axis != self.axis)
        return stored(self.bias).astype(np.int64) - zero_point * weight.sum(others, dtype=np.int64)


def _zero_point(dequantize: ir.Node) -> int:
    """Return the zero point of an activation's dequantizer with uint8 codes; 0 for any other node."""
    if dequantize.op_type != "DequantizeLinear" or constant(dequantize.inputs[0]) is not None:
        return 0
    code = constant(dequantize.inputs[2])
    return int(code) if code is not None and code.ndim == 0 and code.dtype == np.uint8 else 0


def _layers(value: ir.Value) -> list[_Layer]:
    """Return the layers that read a tensor, directly or behind nodes that move values.

    The list is empty if anything else reads the tensor, or a layer that cannot take its zero point.
    """
    values, layers = [value], []
    while values:
        read = values.pop()
        if read.is_graph_output():
            return []
        for reader, position in read.uses():
            if reader.op_type in _MOVES:
                values.append(reader.outputs[0])
            elif position == 0 and (layer := _layer(reader)) is not None:
                layers.append(layer)
            else:
                return []
    return layers


def _layer(node: ir.Node) -> _Layer | None:
    if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 3 or any(node.attributes.get_ints("pads", ())):
        return None
    weight, bias = (maker(value, "DequantizeLinear") for value in node.inputs[1:3])
    if weight is None or constant(weight.inputs[0]) is None or bias is None or constant(bias.inputs[0]) is None:
        return None
    if len(bias.outputs[0].uses()) > 1 or len(bias.inputs[0].uses()) > 1:
        return None
    return _Layer(weight.inputs[0], weight.attributes.get_int("axis"), bias.inputs[0])
