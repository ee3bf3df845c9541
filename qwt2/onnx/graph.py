"""Queries and changes of ONNX graphs that several passes share.

Graphs are onnx-ir's: every value knows the node that makes it and the nodes that read it, also after a change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

_ROUNDING = ("Clip", "QuantizeLinear")


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of a constant value (an initializer or a Constant node's output), or ``None``."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def stored(value: ir.Value | None) -> np.ndarray:
    """Return the array of a value that is known to be constant."""
    array = constant(value)
    assert array is not None, value
    return array


def sizes(value: ir.Value) -> list[int]:
    """Return a value's shape, with 0 for sizes that depend on the batch size; empty if the shape is unknown."""
    return [size if isinstance(size, int) else 0 for size in value.shape or ()]


def readers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read a value, one entry per operand."""
    return [usage.node for usage in value.uses()]


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the only node that reads a value; ``None`` if there are several or the value is a graph output."""
    nodes = readers(value)
    return nodes[0] if len(nodes) == 1 and not value.is_graph_output() else None


def maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    """Return the node that makes a value, if it is of this kind, else ``None``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def quantizer_from(node: ir.Node) -> list[ir.Node]:
    """Return the quantizer whose first node is ``node``.

    A quantizer is a QuantizeLinear, a Clip of its codes (if any) and a DequantizeLinear. A Clip of values may precede
    them. The list is empty if no quantizer starts at ``node``.
    """
    chain = [node]
    while chain[-1].op_type in _ROUNDING and len(nodes := readers(chain[-1].outputs[0])) == 1:
        chain += nodes
    kinds = [n.op_type for n in chain]
    return chain if kinds[-1] == "DequantizeLinear" and "QuantizeLinear" in kinds else []


def quantizer_before(dequantize: ir.Node) -> list[ir.Node]:
    """Return the QuantizeLinear in front of a dequantizer, with the Clips (if any) around it, in the graph's order.

    The list is empty if there is no QuantizeLinear, or if anything else reads the codes.
    """
    chain: list[ir.Node] = []
    value = dequantize.inputs[0]
    while (node := value.producer()) is not None and node.op_type in _ROUNDING and only_reader(value):
        chain.insert(0, node)
        value = node.inputs[0]
    return chain if any(node.op_type == "QuantizeLinear" for node in chain) else []


def grid(quantizer: Sequence[ir.Node]) -> tuple[tuple[bytes, ...], ...]:
    """Return a key of the parameters of a quantizer's nodes; quantizers with equal keys give equal values."""

    def number(value: ir.Value) -> bytes:
        array = constant(value)
        # An activation's bounds may be computed by the graph.
        return str(value.name).encode() if array is None else array.tobytes()

    return tuple(tuple(number(value) for value in node.inputs[1:] if value is not None) for node in quantizer)


def make(kind: str, inputs: Sequence[ir.Value | None], name: str, **attributes) -> ir.Node:
    """Return a node with one output. Node and output have the same name."""
    return ir.node(kind, inputs, attributes, name=name, outputs=[ir.val(name)])


def make_constant(name: str, array: np.ndarray | np.generic) -> ir.Node:
    """Return a Constant node that holds an array or a single number."""
    return make("Constant", [], name, value=ir.tensor(np.asarray(array)))


def copy_node(node: ir.Node, inputs: Sequence[ir.Value | None], rename: Callable[[str], str]) -> ir.Node:
    """Return a new node of the same kind and attributes that is in no graph yet."""
    outputs = [ir.val(rename(value.name)) for value in node.outputs]
    return ir.Node(node.domain, node.op_type, inputs, node.attributes, outputs=outputs, name=rename(node.name))


def store(value: ir.Value, array: np.ndarray) -> None:
    """Set an initializer's numbers, type and shape to those of an array."""
    value.const_value = ir.tensor(array, name=value.name)
    value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray | np.generic) -> ir.Value:
    """Store an array or a single number under a new name and return its value."""
    value = ir.Value(name=name)
    store(value, np.asarray(array))
    graph.register_initializer(value)
    return value


def take_over(new: ir.Value, old: ir.Value) -> None:
    """Replace ``old`` by ``new`` for all readers; ``new`` takes the name, type and shape of ``old``."""
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, new.type, new.shape = old.name, old.type, old.shape


def bypass(node: ir.Node) -> None:
    """Remove a node; the readers of its output read its first input instead."""
    node.outputs[0].replace_all_uses_with(node.inputs[0])
    node.graph.remove(node, safe=True)


def forget(*values: ir.Value) -> None:
    """Clear the recorded shapes and types of values whose shape or type has changed."""
    for value in values:
        value.type = value.shape = None
