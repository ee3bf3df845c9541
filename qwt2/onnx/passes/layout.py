"""Passes that move reshapes and transposes out from between nodes that engines compute in one kernel.

No value changes: only elementwise nodes are moved past nodes that move values.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwt2.onnx.graph import bypass, constant, forget, make, make_constant, maker, only_reader, sizes, take_over

_ACTIVATIONS = ("Gelu", "Relu", "HardSwish", "Sigmoid", "Tanh")
_SCALINGS = ("Mul",)
_QUANTIZERS = ("Clip", "QuantizeLinear", "DequantizeLinear")


def drop_identities(graph: ir.Graph) -> None:
    """Remove Identity nodes and zero-width Pads: engines match fusion patterns on adjacent nodes."""
    for node in graph:
        if _is_identity(node) and not node.outputs[0].is_graph_output():
            bypass(node)


def _is_identity(node: ir.Node) -> bool:
    if node.op_type == "Pad":
        widths = constant(node.inputs[1])
        return widths is not None and not widths.any()
    return node.op_type == "Identity"


def store_clip_bounds(graph: ir.Graph) -> None:
    """Store the bounds of clamps as numbers: the exporter casts them to the type of what is clamped.

    ONNX Runtime takes a ReLU6 for a part of the quantizer behind it only if its bounds are constants. Otherwise it
    computes the convolution in front in float.
    """
    for clip in [node for node in graph if node.op_type == "Clip"]:
        for position, bound in enumerate(clip.inputs[1:], 1):
            cast = maker(bound, "CastLike")
            number = None if cast is None else constant(cast.inputs[0])
            if number is not None:
                stored = make_constant(f"{clip.name}/bound_{position}", number.astype(np.float32).reshape(()))
                clip.prepend(stored)
                clip.replace_input_with(position, stored.outputs[0])


def quantize_before_transposes(graph: ir.Graph) -> None:
    """Move quantizers in front of a Transpose of the last axis.

    Engines' products take a transposed operand directly if nothing lies between the Transpose and the product.
    """
    for node in list(graph):
        order = node.attributes.get_ints("perm") if node.op_type == "Transpose" else None
        if order and order[-1] != len(order) - 1:
            _move_below(node, _QUANTIZERS)


def scale_before_heads(graph: ir.Graph) -> None:
    """Move scaling and quantizing in front of the Transpose that splits a layer's output into heads.

    Engines then compute both in the layer's kernel.
    """
    for node in list(graph):
        if node.op_type == "Transpose" and _is_reshaped_layer(node.inputs[0].producer()):
            _move_below(node, (*_SCALINGS, *_QUANTIZERS))


def activate_before_reshapes(graph: ir.Graph) -> None:
    """Move activation, scaling and quantizing in front of the Reshape behind a linear layer.

    Linear layers are exported with two dimensions, but the activation that follows belongs to their kernel.
    """
    for node in list(graph):
        if _is_reshaped_layer(node):
            _move_below(node, (*_ACTIVATIONS, *_SCALINGS, *_QUANTIZERS))


def _is_reshaped_layer(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Reshape" and maker(node.inputs[0], "Gemm") is not None


def _move_below(node: ir.Node, kinds: tuple[str, ...]) -> None:
    """Move a node that moves values behind the nodes of these kinds that follow it, as far as it has one reader.

    Args:
        node: the node to move.
        kinds: operations that are elementwise if their other inputs are single numbers.
    """
    chain: list[ir.Node] = []
    while (reader := only_reader((chain or [node])[-1].outputs[0])) is not None and reader.op_type in kinds:
        if not all(_is_number(value) for value in reader.inputs[1:] if value is not None):
            break
        chain.append(reader)
    if not chain:
        return
    moved, end = node.outputs[0], chain[-1].outputs[0]
    chain[0].replace_input_with(0, node.inputs[0])
    take_over(moved, end)
    node.replace_input_with(0, end)
    end.name = f"{end.name}/unmoved"
    forget(*(reader.outputs[0] for reader in chain))
    node.graph.remove(node)
    chain[-1].append(node)


def _is_number(value: ir.Value) -> bool:
    stored = constant(value)
    return stored is not None and stored.size == 1


def normalize_rows(graph: ir.Graph) -> None:
    """Reshape maps (N, H, W, C) to rows (N, H W, C) around layer norms: OpenVINO has a kernel only for rows."""
    for node in list(graph):
        shape = sizes(node.inputs[0]) if node.op_type == "LayerNormalization" else []
        if len(shape) >= 4 and 0 not in shape[1:] and node.attributes.get_int("axis", -1) in (-1, len(shape) - 1):
            _normalize_rows(node, shape)


def _normalize_rows(norm: ir.Node, shape: list[int]) -> None:
    output = norm.outputs[0]
    name = output.name
    rows = make_constant(f"{name}/rows", np.array([-1, np.prod(shape[1:-1]), shape[-1]]))
    whole = make_constant(f"{name}/maps", np.array([-1, *shape[1:]]))
    read = make("Reshape", [norm.inputs[0], rows.outputs[0]], f"{name}/read")
    maps = make("Reshape", [None, whole.outputs[0]], f"{name}/written")
    take_over(maps.outputs[0], output)
    maps.replace_input_with(0, output)
    output.name = f"{name}/normalized"
    forget(output)
    norm.replace_input_with(0, read.outputs[0])
    norm.attributes["axis"] = ir.AttrInt64("axis", -1)
    norm.prepend([rows, whole, read])
    norm.append(maps)


def merge_reshapes(graph: ir.Graph) -> None:
    """Merge consecutive Reshapes: engines match fusion patterns on adjacent nodes."""
    for node in graph:
        before = maker(node.inputs[0], "Reshape") if node.op_type == "Reshape" else None
        if before is not None and _is_absolute(node):
            node.replace_input_with(0, before.inputs[0])
            if not before.outputs[0].uses() and not before.outputs[0].is_graph_output():
                graph.remove(before, safe=True)


def _is_absolute(reshape: ir.Node) -> bool:
    """Return whether a Reshape's shape has no 0. In ONNX, 0 copies the size from the Reshape's input."""
    joined = maker(reshape.inputs[1], "Concat")
    stored = map(constant, reshape.inputs[1:] if joined is None else joined.inputs)
    return all(values.all() for values in stored if values is not None)
