"""TensorRT's rules for quantized ONNX files, checked without TensorRT.

The rules follow NVIDIA's "Working with Quantized Types" and onnx-tensorrt's list of operators, for TensorRT 10. Codes
are int8, zero points are 0, and scales are positive constants. An activation has one scale and a weight one per output
channel. Biases are float. Every operand of a product that is to run in integers comes from a dequantizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from qwt2.onnx.graph import constant, readers, sizes

MAX_OPSET = 20
_PRODUCTS = ("Conv", "Gemm", "MatMul")
# Operations that TensorRT moves quantizers across.
_MOVES = (
    "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip


@dataclass(frozen=True)
class Violation:
    """A node that TensorRT would refuse or run in float.

    Attributes:
        node: the node's name, or the name of its output tensor; "model" if the whole file breaks a rule.
        reason: what breaks a rule, as a sentence whose subject is ``node``.
    """

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


def check(model: onnx.ModelProto) -> list[Violation]:
    """Return the places where a file breaks TensorRT's rules for int8, in the graph's order."""
    return violations(ir.from_proto(model))


def violations(model: ir.Model) -> list[Violation]:
    """Return the violations, as :func:`check` does, of a model that is not a file yet."""
    return [*_of_model(model), *_of_nodes(model.graph)]


def _of_model(model: ir.Model) -> Iterator[Violation]:
    for domain, version in model.opset_imports.items():
        if domain:
            yield Violation("model", f"uses operators of {domain}, which TensorRT does not have")
        elif version > MAX_OPSET:
            yield Violation("model", f"is of opset {version}, TensorRT 10 reads up to {MAX_OPSET}")
    for value in model.graph.inputs:
        if not all(sizes(value)[1:]):
            yield Violation(value.name, "has a dynamic dimension besides the batch")


def _of_nodes(graph: ir.Graph) -> Iterator[Violation]:
    rules = {"QuantizeLinear": _quantizer, "DequantizeLinear": _dequantizer} | dict.fromkeys(_PRODUCTS, _product)
    for node in graph:
        for reason in rules.get(node.op_type, lambda node: ())(node):
            yield Violation(node.name or node.outputs[0].name, reason)


def _quantizer(node: ir.Node) -> Iterator[str]:
    yield from _scale(node)
    scale = constant(node.inputs[1])
    if scale is not None and scale.ndim:
        yield "quantizes an activation with more than one scale"
    if _zero_type(node) != ir.DataType.INT8:
        yield "makes codes that are not int8"
    for reader in readers(node.outputs[0]):
        if reader.op_type not in ("DequantizeLinear", *_MOVES):
            yield f"makes codes that {reader.op_type} reads before they are dequantized"


def _dequantizer(node: ir.Node) -> Iterator[str]:
    yield from _scale(node)
    kind = _type(node.inputs[0]) or _zero_type(node)
    if kind != ir.DataType.INT8:
        yield f"dequantizes {kind.name.lower()}; only int8 can be, and biases must be float"


def _scale(node: ir.Node) -> Iterator[str]:
    scale, zero_point = map(constant, (*node.inputs[1:], None)[:2])
    if scale is None:
        yield "has a scale that is not a constant"
    elif not (np.isfinite(scale) & (scale > 0)).all():
        yield "has a scale that is not positive"
    if zero_point is not None and zero_point.any():
        yield "has a zero point other than 0"


def _type(value: ir.Value) -> ir.DataType | None:
    """Return the type of a constant; ``None`` for a computed value."""
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.dtype


def _zero_type(node: ir.Node) -> ir.DataType:
    """Return the type of a node's zero point; if it is left out, ONNX's default is uint8."""
    return (_type(node.inputs[2]) or ir.DataType.UNDEFINED) if len(node.inputs) > 2 else ir.DataType.UINT8


def _product(node: ir.Node) -> Iterator[str]:
    sources = [_source(value) for value in node.inputs[:2]]
    quantized = [source is not None for source in sources]
    if any(quantized) and not all(quantized):
        yield f"has one dequantized operand and one ({node.inputs[quantized.index(False)].name}) in float"
    if len(node.inputs) > 2 and any(quantized) and constant(node.inputs[2]) is None:
        yield "has a bias that is not a float constant"
    if sources[1] is not None:
        yield from _weight_axis(node, sources[1])


def _weight_axis(product: ir.Node, weight: ir.Node) -> Iterator[str]:
    codes, scale = map(constant, weight.inputs[:2])
    if codes is None or scale is None or not scale.ndim:
        return
    axis = weight.attributes.get_int("axis", 1)
    wanted = 0 if product.op_type == "Conv" or product.attributes.get_int("transB", 0) != 0 else codes.ndim - 1
    if axis != wanted:
        yield f"has a weight with one scale per entry of axis {axis}, its output channels are axis {wanted}"


def _source(value: ir.Value) -> ir.Node | None:
    """Return the dequantizer that a tensor comes from, if only nodes that move values lie between."""
    node = value.producer()
    while node is not None and node.op_type in _MOVES:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None
