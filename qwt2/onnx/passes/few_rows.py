"""A detour around a wrong kernel of OpenVINO.

OpenVINO (2026.4) computes a linear layer, a multiplication behind it and the quantizer behind that in one kernel. For
fewer than sixteen rows the kernel's results are wrong by orders of magnitude. A typical case is a classifier's Linear,
ReLU, BatchNorm1d, Linear on a single image. The kernel is not used if a Reshape stands in front of the multiplication.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qwt2.onnx.graph import bypass, constant, forget, make, make_constant, maker, only_reader, sizes, take_over

_FEW = 16
# The exporter writes a BatchNorm of (N, C) as one node; OpenVINO makes a multiplication and an addition of it.
_SCALINGS = ("BatchNormalization", "Div", "Mul", "Neg", "Sub")
_BETWEEN = (*_SCALINGS, "Add", "Clip", "Relu")


def reshape_before_scaling(graph: ir.Graph) -> None:
    """Compute what lies between a layer of few rows (N, C) and a quantizer with three axes, if it scales."""
    for gemm in [node for node in graph if node.op_type == "Gemm"]:
        chain = _until_quantizer(gemm)
        if any(node.op_type in _SCALINGS for node in chain) and _rows_per_image(gemm) < _FEW:
            for node in [node for node in chain if node.op_type == "Reshape"]:
                bypass(node)
                chain.remove(node)
            _reshape_around(chain, sizes(gemm.inputs[1])[-1])


def _until_quantizer(gemm: ir.Node) -> list[ir.Node]:
    """Return the elementwise nodes between a layer and the quantizer behind it; empty if anything else reads them."""
    chain: list[ir.Node] = []
    while (node := only_reader((chain or [gemm])[-1].outputs[0])) is not None and _is_between(node):
        chain.append(node)
    return chain if node is not None and node.op_type == "QuantizeLinear" else []


def _is_between(node: ir.Node) -> bool:
    """Return whether a node keeps the shape (N, C) of the only value it reads that is not constant."""
    if node.op_type == "Reshape":  # the exporter writes one behind every layer
        return len(sizes(node.outputs[0])) == 2
    return node.op_type in _BETWEEN and len(_computed(node)) == 1


def _rows_per_image(gemm: ir.Node) -> int:
    """Return the rows that a layer computes for one image: 1, or the product of the axes that were flattened."""
    flattened = maker(gemm.inputs[0], "Reshape")
    shape = [] if flattened is None else sizes(flattened.inputs[0])
    return math.prod(shape[1:-1])


def _reshape_around(chain: list[ir.Node], channels: int) -> None:
    # A BatchNorm's channels are the second axis, and those of a constant the last one.
    norms = [node for node in chain if node.op_type == "BatchNormalization"]
    chain = norms[-1:] or chain
    output = chain[-1].outputs[0]
    name = output.name
    three = make_constant(f"{name}/three", np.array([-1, channels, 1] if norms else [-1, 1, channels]))
    two = make_constant(f"{name}/two", np.array([-1, channels]))
    [position] = _computed(chain[0])
    before = make("Reshape", [chain[0].inputs[position], three.outputs[0]], f"{name}/spread")
    after = make("Reshape", [None, two.outputs[0]], f"{name}/joined")
    take_over(after.outputs[0], output)
    after.replace_input_with(0, output)
    output.name = f"{name}/scaled"
    forget(*(node.outputs[0] for node in chain))
    chain[0].replace_input_with(position, before.outputs[0])
    chain[0].prepend([three, two, before])
    chain[-1].append(after)


def _computed(node: ir.Node) -> list[int]:
    """Return the positions of a node's inputs that are not constant."""
    return [number for number, value in enumerate(node.inputs) if value is not None and not _is_constant(value)]


def _is_constant(value: ir.Value) -> bool:
    cast = maker(value, "Cast")  # the exporter casts numbers to the type of the values
    return constant(value if cast is None else cast.inputs[0]) is not None
