"""Zero points of layers' inputs, folded into the layers' biases.

    sum_k (x_k - z) w_k + b = sum_k x_k w_k + (b - z sum_k w_k)

in integers on both sides. The dequantizer in front of a layer then has the zero point 0, whatever its quantizer's is; the
accumulators, once the bias is in them, and all that follows stay what they were, bit for bit. OpenVINO (2026.4) takes a zero
point off behind the product, in an operation of its own that also keeps scale and bias out of the kernel's fast path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from qwt2.onnx.graph import OnnxGraph

FOLDED = "zero_point/folded"  # the zero point of dequantizers whose own went into biases
_MOVES = ("Flatten", "Reshape", "Transpose")
_BIASES = np.iinfo(np.int32)


def fold_zero_points(model: onnx.ModelProto) -> None:
    """Fold the zero point of every quantized tensor that layers alone read, in place.

    Left as they are: what convolutions pad, since zeros would have to be padded with another code; layers that share a
    bias; and zero points with which a bias would leave int32.
    """
    graph = OnnxGraph(model)
    folded = 0
    for dequantize in graph.nodes:
        folded += _fold(dequantize, graph)
    if folded:
        model.graph.initializer.append(numpy_helper.from_array(np.uint8(0), FOLDED))


def unfold_zero_points(model: onnx.ModelProto) -> None:
    """Give dequantizers the zero points of their quantizers again, in place, for biases that are yet to be written."""
    graph = OnnxGraph(model)
    for dequantize in graph.readers[FOLDED]:
        dequantize.input[2] = f"{dequantize.input[1].removesuffix('.scale')}.zero_point"
    if FOLDED in graph.constants:
        model.graph.initializer.remove(graph.constants[FOLDED])


@dataclass(frozen=True)
class _Layer:
    """A layer's stored weight codes, the axis of their output channels, and the name of its bias codes."""

    weight: np.ndarray
    axis: int
    bias: str

    def sums(self) -> np.ndarray:
        others = tuple(axis for axis in range(self.weight.ndim) if axis != self.axis)
        return self.weight.astype(np.int64).sum(others)


def _fold(dequantize: onnx.NodeProto, graph: OnnxGraph) -> bool:
    zero_point = _zero_point(dequantize, graph)
    layers = _layers(dequantize.output[0], graph) if zero_point else []
    stored = [graph.constants[layer.bias] for layer in layers]
    biases = [numpy_helper.to_array(s).astype(np.int64) - zero_point * layer.sums() for s, layer in zip(stored, layers)]
    if not layers or any(bias.min() < _BIASES.min or bias.max() > _BIASES.max for bias in biases):
        return False
    for tensor, bias in zip(stored, biases):
        tensor.CopyFrom(numpy_helper.from_array(bias.astype(np.int32), tensor.name))
    dequantize.input[2] = FOLDED
    return True


def _zero_point(dequantize: onnx.NodeProto, graph: OnnxGraph) -> int:
    """Of an activation's dequantizer; 0 of anything else."""
    if dequantize.op_type != "DequantizeLinear" or dequantize.input[0] in graph.constants:
        return 0
    stored = numpy_helper.to_array(graph.constants[dequantize.input[2]])
    return int(stored) if stored.ndim == 0 and stored.dtype == np.uint8 else 0


def _layers(tensor: str, graph: OnnxGraph) -> list[_Layer]:
    """The layers that read a tensor, perhaps moved; none if anything else does, or a layer that cannot take its zero point."""
    names, layers = [tensor], []
    while names:
        name = names.pop()
        if name in graph.outputs:
            return []
        for reader in graph.readers[name]:
            if reader.op_type in _MOVES:
                names.append(reader.output[0])
            elif (layer := _layer(reader, name, graph)) is not None:
                layers.append(layer)
            else:
                return []
    return layers


def _layer(node: onnx.NodeProto, tensor: str, graph: OnnxGraph) -> _Layer | None:
    if node.op_type not in ("Conv", "Gemm") or node.input[0] != tensor or len(node.input) < 3 or _pads(node):
        return None
    weight, bias = (graph.made.get(name) for name in node.input[1:3])
    if any(made is None or made.op_type != "DequantizeLinear" or made.input[0] not in graph.constants for made in (weight, bias)):
        return None
    if len(graph.readers[bias.output[0]]) > 1 or len(graph.readers[bias.input[0]]) > 1:
        return None
    axis = next(attribute.i for attribute in weight.attribute if attribute.name == "axis")
    return _Layer(numpy_helper.to_array(graph.constants[weight.input[0]]), axis, bias.input[0])


def _pads(node: onnx.NodeProto) -> bool:
    return any(any(attribute.ints) for attribute in node.attribute if attribute.name == "pads")
