"""Questions that passes ask of a graph, and the changes that several of them make.

A graph is onnx-ir's: every value knows the node that makes it and the nodes that read it, also after a change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

_ROUNDING = ("Clip", "QuantizeLinear")


def constant(value: ir.Value | None) -> np.ndarray | None:
    """What is stored of a value: an initializer, or what a Constant node holds; else ``None``."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def stored(value: ir.Value | None) -> np.ndarray:
    """As :func:`constant`, of a value that is known to be one."""
    array = constant(value)
    assert array is not None, value
    return array


def sizes(value: ir.Value) -> list[int]:
    """A value's sizes, 0 where one depends on the number of images; empty where they are not known."""
    return [size if isinstance(size, int) else 0 for size in value.shape or ()]


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, one entry per operand."""
    return [usage.node for usage in value.uses()]


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads a value, if no other does and the value is no output of the graph."""
    nodes = readers(value)
    return nodes[0] if len(nodes) == 1 and not value.is_graph_output() else None


def maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node that makes a value, if it is of this kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def quantizer_from(node: ir.Node) -> list[ir.Node]:
    """The QuantizeLinear, Clip (if any) and DequantizeLinear that start with ``node``, perhaps behind another Clip.

    Empty if something else starts with it.
    """
    chain = [node]
    while chain[-1].op_type in _ROUNDING and len(nodes := readers(chain[-1].outputs[0])) == 1:
        chain += nodes
    kinds = [n.op_type for n in chain]
    return chain if kinds[-1] == "DequantizeLinear" and "QuantizeLinear" in kinds else []


def quantizer_before(dequantize: ir.Node) -> list[ir.Node]:
    """The QuantizeLinear, and the Clips (if any) around it, that make what only this dequantizer reads; else empty."""
    chain: list[ir.Node] = []
    value = dequantize.inputs[0]
    while (node := value.producer()) is not None and node.op_type in _ROUNDING and only_reader(value):
        chain.insert(0, node)
        value = node.inputs[0]
    return chain if any(node.op_type == "QuantizeLinear" for node in chain) else []


def grid(quantizer: Sequence[ir.Node]) -> tuple[tuple[bytes, ...], ...]:
    """The numbers that a quantizer's nodes compute with; equal for quantizers that give equal values."""

    def number(value: ir.Value) -> bytes:
        array = constant(value)
        # An activation's bounds may be computed.
        return str(value.name).encode() if array is None else array.tobytes()

    return tuple(tuple(number(value) for value in node.inputs[1:] if value is not None) for node in quantizer)


def make(kind: str, inputs: Sequence[ir.Value | None], name: str, **attributes) -> ir.Node:
    """A node with one output; both bear the name."""
    return ir.node(kind, inputs, attributes, name=name, outputs=[ir.val(name)])


def make_constant(name: str, array: np.ndarray | np.generic) -> ir.Node:
    """A Constant node that holds an array or a single number."""
    return make("Constant", [], name, value=ir.tensor(np.asarray(array)))


def copy_node(node: ir.Node, inputs: Sequence[ir.Value | None], rename: Callable[[str], str]) -> ir.Node:
    """A node of the same kind and attributes, in no graph yet."""
    outputs = [ir.val(rename(value.name)) for value in node.outputs]
    return ir.Node(node.domain, node.op_type, inputs, node.attributes, outputs=outputs, name=rename(node.name))


def store(value: ir.Value, array: np.ndarray) -> None:
    """Give an initializer these numbers, and their type and shape."""
    value.const_value = ir.tensor(array, name=value.name)
    value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray | np.generic) -> ir.Value:
    """Store an array or a single number under a new name."""
    value = ir.Value(name=name)
    store(value, np.asarray(array))
    graph.register_initializer(value)
    return value


def take_over(new: ir.Value, old: ir.Value) -> None:
    """Let ``new`` be read in place of ``old``, under its name and with its shape; ``old`` is then read by none."""
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, new.type, new.shape = old.name, old.type, old.shape


def bypass(node: ir.Node) -> None:
    """Let what reads a node's output read its first input, and remove the node."""
    node.outputs[0].replace_all_uses_with(node.inputs[0])
    node.graph.remove(node, safe=True)


def forget(*values: ir.Value) -> None:
    """Drop the shapes and types that are noted of values that have others now."""
    for value in values:
        value.type = value.shape = None
