"""Detours around wrong kernels of OpenVINO 2026.4 that need no more than another form of the same computation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwt2.onnx.graph import constant, forget, make, make_constant, maker, readers, sizes, take_over

_REDUCTIONS = ("ReduceMax", "ReduceMin")
_ELEMENTWISE = ("Add", "Clip", "Div", "Gelu", "HardSigmoid", "Mul", "Neg", "Relu", "Sigmoid", "Sub", "Tanh")
_BETWEEN = (*_ELEMENTWISE, "Flatten", "Reshape", "Squeeze", "Unsqueeze")


def part_reductions(graph: ir.Graph) -> None:
    """Keep maxima and minima over axes apart from quantizers: computed in one kernel, they are wrong.

    A change of the number of axes in between keeps them apart. If there is none, axes that a node would drop are kept
    and then removed by a Squeeze, and the reverse.
    """
    for node in [node for node in graph if node.op_type == "GlobalMaxPool"]:
        _reduce_instead(node)
    for node in [node for node in graph if node.op_type in _REDUCTIONS]:
        is_known = len(node.inputs) > 1 and constant(node.inputs[1]) is not None
        if is_known and len(sizes(node.outputs[0])) in _quantized_axes(node.outputs[0]):
            kept = node.attributes.get_int("keepdims", 1)
            node.attributes["keepdims"] = ir.AttrInt64("keepdims", 1 - kept)
            _append(node, "Unsqueeze" if kept else "Squeeze")


def _quantized_axes(value: ir.Value) -> set[int]:
    """Return the numbers of axes with which a value is quantized, directly or behind elementwise operations."""
    found: set[int] = set()
    for reader in readers(value):
        if reader.op_type == "QuantizeLinear":
            found.add(len(sizes(value)))
        elif reader.op_type in _BETWEEN:
            found |= _quantized_axes(reader.outputs[0])
    return found


def _append(node: ir.Node, kind: str) -> None:
    output = node.outputs[0]
    name = output.name
    change = make(kind, [None, node.inputs[1]], f"{name}/{kind.lower()}")
    take_over(change.outputs[0], output)
    change.replace_input_with(0, output)
    output.name = f"{name}/reduced"
    forget(output)
    node.append(change)


def _reduce_instead(pooling: ir.Node) -> None:
    axes = make_constant(f"{pooling.outputs[0].name}/axes", np.arange(2, len(sizes(pooling.inputs[0]))))
    reduction = make("ReduceMax", [pooling.inputs[0], axes.outputs[0]], f"{pooling.outputs[0].name}/max", keepdims=1)
    pooling.prepend([axes, reduction])
    take_over(reduction.outputs[0], pooling.outputs[0])
    pooling.graph.remove(pooling, safe=True)


def widen_rotary_tables(graph: ir.Graph) -> None:
    """Repeat the cosines and sines of a rotary embedding over all channels, if there is one for all of them.

    OpenVINO takes x cos + [-x2, x1] sin for an operation of its own, which reads one number per channel.
    """
    for addition in [node for node in graph if node.op_type == "Add"]:
        products = [node for value in addition.inputs if (node := maker(value, "Mul")) is not None]
        if len(products) == 2 and any(_turns(value) for product in products for value in product.inputs):
            for product in products:
                _widen(product)


def _turns(value: ir.Value) -> bool:
    """Return whether a value is [-x2, x1], of x = [x1, x2]."""
    concat = maker(value, "Concat")
    return concat is not None and maker(concat.inputs[0], "Neg") is not None


def _widen(product: ir.Node) -> None:
    for number, value in enumerate(product.inputs):
        table, width = constant(value), sizes(product.inputs[1 - number])[-1:]
        if table is not None and table.ndim and table.shape[-1] == 1 and width and width[0] > 1:
            wide = make_constant(f"{product.name}/table", np.repeat(table, width[0], axis=-1))
            product.prepend(wide)
            product.replace_input_with(number, wide.outputs[0])
