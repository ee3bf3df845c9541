"""What TensorRT accepts of quantized ONNX files: rules, checked without TensorRT.

After NVIDIA's "Working with Quantized Types" and onnx-tensorrt's list of operators, for TensorRT 10: int8 codes alone,
zero points of 0, positive scales that are constants, one scale for an activation and one an output channel for a
weight, biases in float, and a dequantizer before every operand of a product that is to run in integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from qwt2.onnx.graph import OnnxGraph

MAX_OPSET = 20
_PRODUCTS = ("Conv", "Gemm", "MatMul")
# TensorRT moves quantizers across these.
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Expand", "Identity", "Flatten", "Gather", "Concat", "Split")


@dataclass(frozen=True)
class Violation:
    """A node that TensorRT would refuse or run in float.

    Attributes:
        node: its name, or that of the tensor it makes; "model" for what concerns the whole file.
        reason: one sentence.
    """

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


def check(model: onnx.ModelProto) -> list[Violation]:
    """The places where a model breaks TensorRT's rules for int8, in the graph's order; none if it is fine."""
    return list(_Check(model).violations())


class _Check:
    def __init__(self, model: onnx.ModelProto):
        self.model = model
        self.graph = OnnxGraph(model)
        self.constants = {name: numpy_helper.to_array(tensor) for name, tensor in self.graph.constants.items()}
        self.types = {name: tensor.data_type for name, tensor in self.graph.constants.items()}

    def violations(self) -> Iterator[Violation]:
        for entry in self.model.opset_import:
            if entry.domain:
                yield Violation("model", f"uses operators of {entry.domain}, which TensorRT has not")
            elif entry.version > MAX_OPSET:
                yield Violation("model", f"is of opset {entry.version}, TensorRT 10 reads up to {MAX_OPSET}")
        for value in self.model.graph.input:
            if not all(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]):
                yield Violation(value.name, "has a dynamic dimension besides the batch")
        rules = {"QuantizeLinear": self._quantizer, "DequantizeLinear": self._dequantizer} | dict.fromkeys(_PRODUCTS, self._product)
        for node in self.graph.nodes:
            for reason in rules.get(node.op_type, lambda node: ())(node):
                yield Violation(node.name or node.output[0], reason)

    def _quantizer(self, node: onnx.NodeProto) -> Iterator[str]:
        yield from self._scale(node)
        if self.constants.get(node.input[1], np.empty(0)).ndim:
            yield "quantizes an activation with more than one scale"
        if self._zero_type(node) != TensorProto.INT8:
            yield "makes codes that are not int8"
        for reader in self.graph.readers[node.output[0]]:
            if reader.op_type not in ("DequantizeLinear", *_MOVES):
                yield f"makes codes that {reader.op_type} reads before they are dequantized"

    def _dequantizer(self, node: onnx.NodeProto) -> Iterator[str]:
        yield from self._scale(node)
        kind = self.types.get(node.input[0], self._zero_type(node))
        if kind != TensorProto.INT8:
            yield f"dequantizes {TensorProto.DataType.Name(kind).lower()}; only int8 can be, and biases must be float"

    def _scale(self, node: onnx.NodeProto) -> Iterator[str]:
        scale, zero_point = (self.constants.get(name) for name in (*node.input[1:], None)[:2])
        if scale is None:
            yield "has a scale that is not a constant"
        elif not (np.isfinite(scale) & (scale > 0)).all():
            yield "has a scale that is not positive"
        if zero_point is not None and zero_point.any():
            yield "has a zero point other than 0"

    def _zero_type(self, node: onnx.NodeProto) -> int:
        """ONNX's default, where the zero point is left out, is uint8."""
        return self.types.get(node.input[2], TensorProto.UNDEFINED) if len(node.input) > 2 else TensorProto.UINT8

    def _product(self, node: onnx.NodeProto) -> Iterator[str]:
        sources = [self._source(name) for name in node.input[:2]]
        quantized = [source is not None for source in sources]
        if any(quantized) and not all(quantized):
            yield f"has one dequantized operand and one ({node.input[quantized.index(False)]}) in float"
        if len(node.input) > 2 and any(quantized) and node.input[2] not in self.constants:
            yield "has a bias that is not a float constant"
        weight = sources[1]
        if weight is not None and {weight.input[0], weight.input[1]} <= self.constants.keys() and self.constants[weight.input[1]].ndim:
            axis = next((a.i for a in weight.attribute if a.name == "axis"), 1)
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            wanted = 0 if node.op_type == "Conv" or transposed else self.constants[weight.input[0]].ndim - 1
            if axis != wanted:
                yield f"has a weight with one scale an entry of axis {axis}, its output channels are axis {wanted}"

    def _source(self, name: str) -> onnx.NodeProto | None:
        """The dequantizer that a tensor comes from through nothing but movement, if it does."""
        node = self.graph.made.get(name)
        while node is not None and node.op_type in _MOVES:
            node = self.graph.made.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None
