"""Rewriting of exported graphs into equal ones that engines fuse better; every value stays what it was, bit for bit.

Only nodes that compute value by value are moved past nodes that move values, rounding to a grid is repeated only on what
lies on it already, and sums of integers are added up in another order. (:func:`qwt2.onnx.passes.windowed_attention.limit_masks` tells of
the one exception.)
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qwt2.onnx.file import POOLED, set_shared_quantizers, shared_quantizers
from qwt2.onnx.graph import OnnxGraph
from qwt2.onnx.passes.projections import split_projections
from qwt2.onnx.passes.windowed_attention import limit_masks, move_codes, repeat_masks
from qwt2.onnx.passes.zero_points import fold_zero_points, unfold_zero_points

_ACTIVATIONS = ("Gelu", "Relu", "HardSwish", "Sigmoid", "Tanh")
_SCALINGS = ("Mul",)
_QUANTIZERS = ("Clip", "QuantizeLinear", "DequantizeLinear")
# What OpenVINO computes, behind an addition, in a convolution's kernel.
_FUSED = ("Gelu", "HardSigmoid", "HardSwish", "Relu", "Sigmoid", "Tanh")


def rewrite_for_engines(model: onnx.ModelProto, clipped: Collection[str] = (), keeps_pairs: bool = False) -> None:
    """Apply every pass of this module, in place.

    Args:
        clipped: names of the quantizers that do not round.
        keeps_pairs: whether nothing may lie between a quantizer and its dequantizer, and both have one zero point.
    """
    drop_identities(model)
    split_projections(model)
    move_below(model, _transposes_of_last_axis(model), _QUANTIZERS)
    move_below(model, _transposes_behind_layers(model), (*_SCALINGS, *_QUANTIZERS))
    move_below(model, _reshapes_behind_layers(model), (*_ACTIVATIONS, *_SCALINGS, *_QUANTIZERS))
    limit_masks(model)
    repeat_masks(model)
    normalize_rows(model)
    merge_reshapes(model)
    if not keeps_pairs:
        move_codes(model)
    quantize_before_pooling(model)
    fuse_additions(model, clipped)
    share_quantizers(model)
    if not keeps_pairs:
        fold_zero_points(model)


def rewrite_for_numbers(model: onnx.ModelProto, clipped: Collection[str]) -> None:
    """Apply the passes that depend on stored numbers to a rewritten graph that got others, in place.

    Args:
        clipped: as in :func:`rewrite_for_engines`.
    """
    unfold_zero_points(model)
    quantize_before_pooling(model)
    fuse_additions(model, clipped)
    fold_zero_points(model)


def drop_identities(model: onnx.ModelProto) -> None:
    """Let readers of an Identity, or of a Pad by nothing, read what it reads; engines match their patterns on neighbours."""
    graph = OnnxGraph(model)
    source: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        node.input[:] = [source.get(name, name) for name in node.input]
        if _is_identity(node, graph.constants) and node.output[0] not in graph.outputs:
            source[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    graph.replace_nodes(kept)


def _is_identity(node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> bool:
    if node.op_type == "Pad":
        return node.input[1] in stored and not numpy_helper.to_array(stored[node.input[1]]).any()
    return node.op_type == "Identity"


def normalize_rows(model: onnx.ModelProto) -> None:
    """Show layer norms of maps (N, H, W, C) rows (N, H W, C), in place: OpenVINO has a kernel for those alone."""
    graph = OnnxGraph(model)
    nodes = []
    for node in graph.nodes:
        shape = graph.shapes.get(node.input[0], []) if node.op_type == "LayerNormalization" else []
        if len(shape) < 4 or 0 in shape[1:] or _axis(node) not in (-1, len(shape) - 1):
            nodes.append(node)
            continue
        output = node.output[0]
        sizes = {"rows": [-1, int(np.prod(shape[1:-1])), shape[-1]], "maps": [-1, *shape[1:]]}
        for name, size in sizes.items():
            nodes.append(helper.make_node("Constant", [], [f"{output}/{name}"], value=numpy_helper.from_array(np.array(size))))
        rows = helper.make_node("Reshape", [node.input[0], f"{output}/rows"], [f"{output}/read"], f"{node.name}/read")
        maps = helper.make_node("Reshape", [f"{output}/normalized", f"{output}/maps"], [output], f"{node.name}/maps")
        node.input[0], node.output[0] = rows.output[0], maps.input[0]
        for attribute in node.attribute:
            if attribute.name == "axis":
                attribute.i = -1
        nodes += [rows, node, maps]
    graph.replace_nodes(nodes)


def _axis(norm: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in norm.attribute if attribute.name == "axis"), -1)


def merge_reshapes(model: onnx.ModelProto) -> None:
    """Let a Reshape read what the Reshape before it reads."""
    graph = OnnxGraph(model)
    for node in graph.nodes:
        before = graph.made.get(node.input[0]) if node.op_type == "Reshape" else None
        if before is not None and before.op_type == "Reshape" and _is_absolute(node, graph):
            node.input[0] = before.input[0]
    read = {name for node in graph.nodes for name in node.input} | graph.outputs
    graph.replace_nodes([node for node in graph.nodes if node.op_type != "Reshape" or node.output[0] in read])


def _is_absolute(reshape: onnx.NodeProto, graph: OnnxGraph) -> bool:
    """Whether no size of a Reshape's shape is 0, which says "as it was" of what the Reshape reads."""
    shape = graph.made.get(reshape.input[1])
    sizes = [reshape.input[1]] if shape is None or shape.op_type != "Concat" else shape.input
    stored = [numpy_helper.to_array(graph.constants[name]) for name in sizes if name in graph.constants]
    return all(values.all() for values in stored)


def move_below(model: onnx.ModelProto, names: set[str], kinds: tuple[str, ...]) -> None:
    """Move nodes that move values below the nodes of these kinds that alone read them, as far as it goes.

    Args:
        names: output tensors of the nodes to move.
        kinds: operations that compute value by value, if their other inputs are single numbers.
    """
    graph = OnnxGraph(model)
    numbers = _numbers(graph)
    moved = []
    for node in [n for n in graph.nodes if set(n.output) & names]:
        chain = []
        tensor = node.output[0]
        while (reader := graph.only_reader(tensor)) is not None:
            if reader.op_type not in kinds or not all(name in numbers for name in reader.input[1:] if name):
                break
            chain.append(reader)
            tensor = reader.output[0]
        if chain:
            moved.append((node, chain))
    nodes, stale = list(graph.nodes), set()
    for node, chain in moved:
        stale |= {node.output[0], *(reader.output[0] for reader in chain[:-1])}
        end = chain[-1].output[0]
        chain[0].input[0] = node.input[0]
        node.input[0] = chain[-1].output[0] = f"{end}/unmoved"
        node.output[0] = end
        nodes.remove(node)
        nodes.insert(nodes.index(chain[-1]) + 1, node)
    graph.replace_nodes(nodes, forget=stale)


def _reshapes_behind_layers(model: onnx.ModelProto) -> set[str]:
    """Linear layers are exported with two dimensions; the activation that follows belongs to their kernel."""
    graph = OnnxGraph(model)
    return {
        node.output[0]
        for node in graph.nodes
        if node.op_type == "Reshape" and node.input[0] in graph.made and graph.made[node.input[0]].op_type == "Gemm"
    }


def _transposes_behind_layers(model: onnx.ModelProto) -> set[str]:
    """What takes the outputs of linear layers apart into heads."""
    reshaped = _reshapes_behind_layers(model)
    return {node.output[0] for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in reshaped}


def _transposes_of_last_axis(model: onnx.ModelProto) -> set[str]:
    """Matrix products take a transposed operand as it is, if nothing lies between."""
    found = set()
    for node in model.graph.node:
        if node.op_type == "Transpose":
            [order] = [attribute.ints for attribute in node.attribute if attribute.name == "perm"]
            if order[-1] != len(order) - 1:
                found.add(node.output[0])
    return found


def quantize_before_pooling(model: onnx.ModelProto) -> None:
    """Quantize what a MaxPool reads too, where quantizers of one scale and nothing else read its output.

    The largest value's code is the largest code, so the quantizers behind it find everything on their grid; the pooling
    and the layer in front then work on codes.
    """
    graph = OnnxGraph(model)
    nodes = []
    for node in graph.nodes:
        quantizers = [graph.quantizer_from(reader) for reader in graph.readers[node.output[0]]]
        if node.op_type == "MaxPool" and node.output[0] not in graph.outputs and quantizers and all(quantizers):
            grids = {_grid(quantizer, graph) for quantizer in quantizers}
            behind = graph.made.get(node.input[0])
            is_done = behind is not None and behind.output[0].startswith(POOLED)
            if len(grids) == 1 and not is_done:
                before = _copies(quantizers[0], node.input[0], f"{POOLED}{node.output[0]}")
                node.input[0] = before[-1].output[0]
                nodes += before
        nodes.append(node)
    graph.replace_nodes(nodes)


def fuse_additions(model: onnx.ModelProto, clipped: Collection[str]) -> None:
    """Make of each of these quantizers either the Clip of its values alone, or all but that.

    In front of an addition, OpenVINO (2026.4) leaves out the rounding of a convolution's quantizer where one quantizer
    reads the sum, and computes all in the convolution's kernel. Elsewhere it would round.

    Args:
        clipped: names of quantizers that do not round; their scales and ends are stored under these names.
    """
    graph = OnnxGraph(model)
    gone: set[int] = set()
    source: dict[str, str] = {}
    for name in clipped:
        clips = graph.readers[f"{name}.low"]
        quantizers = [node for node in graph.readers[f"{name}.scale"] if node.op_type == "QuantizeLinear"]
        for quantize in quantizers:
            dequantize = graph.quantizer_from(quantize)[-1]
            fuses = _is_rounded_once(dequantize.output[0], graph)
            if fuses:
                source |= {clip.output[0]: clip.input[0] for clip in clips}
                gone |= set(map(id, clips))
            else:
                source[dequantize.output[0]] = quantize.input[0]
                gone |= set(map(id, graph.quantizer_from(quantize)))
    for node in graph.nodes:
        node.input[:] = [source.get(tensor, tensor) for tensor in node.input]
    graph.replace_nodes([node for node in graph.nodes if id(node) not in gone])


def share_quantizers(model: onnx.ModelProto) -> None:
    """Let one of several equal quantizers of a tensor do the work of all, in place.

    Engines take a layer and the one quantizer behind it for an integer kernel, and leave it in float where there are more.
    The file tells which quantizers are not in it (:func:`qwt2.onnx.file.shared_quantizers`).
    """
    graph = OnnxGraph(model)
    first: dict[tuple, list[onnx.NodeProto]] = {}
    shared, source, gone = shared_quantizers(model), {}, set()
    for node in graph.nodes:
        quantizer = graph.quantizer_from(node)
        if not quantizer or quantizer[-1].output[0] in graph.outputs:
            continue
        kept = first.setdefault((node.input[0], _grid(quantizer, graph)), quantizer)
        if kept is not quantizer:
            name, other = (nodes[-1].input[1].removesuffix(".scale") for nodes in (quantizer, kept))
            shared[name] = other
            source[quantizer[-1].output[0]] = kept[-1].output[0]
            gone |= set(map(id, quantizer))
    for node in graph.nodes:
        node.input[:] = [source.get(tensor, tensor) for tensor in node.input]
    graph.replace_nodes([node for node in graph.nodes if id(node) not in gone])
    set_shared_quantizers(model, shared)


def clip_values(model: onnx.ModelProto) -> None:
    """Clip what is quantized in place of its codes, in place, for engines that let nothing lie between the two nodes of a pair.

    Codes around the middle of their range become signed ones with a zero point of 0, where both nodes of their pair have
    one zero point.
    """
    graph = OnnxGraph(model)
    stored = {name: numpy_helper.to_array(tensor) for name, tensor in graph.constants.items()}
    nodes, retyped = [], set()
    for node in graph.nodes:
        quantize = graph.made.get(node.input[0]) if node.op_type == "Clip" else None
        if quantize is None or quantize.op_type != "QuantizeLinear":
            nodes.append(node)
            continue
        scale, zero_point, lowest, highest = (stored[name] for name in (*quantize.input[1:], *node.input[1:]))
        zero = int(zero_point)
        for position, (end, code) in enumerate((("low", lowest), ("high", highest)), 1):
            name = f"{quantize.input[1].removesuffix('scale')}{end}"
            if name not in stored:
                stored[name] = np.float32((int(code) - zero) * scale)
                model.graph.initializer.append(numpy_helper.from_array(stored[name], name))
            node.input[position] = name
        is_shared = any(reader.op_type == "DequantizeLinear" for reader in graph.readers[quantize.input[2]])
        if is_shared and 2 * zero == int(lowest) + int(highest) + 1:
            graph.constants[quantize.input[2]].CopyFrom(numpy_helper.from_array(np.int8(0), quantize.input[2]))
        codes = node.output[0]
        node.input[0], node.output[0] = quantize.input[0], f"{codes}/values"
        quantize.input[0], quantize.output[0] = node.output[0], codes
        nodes.insert(nodes.index(quantize), node)
        retyped |= {codes, quantize.input[2]}
    graph.replace_nodes(nodes, forget=retyped)


def _is_rounded_once(operand: str, graph: OnnxGraph) -> bool:
    """Whether all that reads the sum of which a tensor is an operand, activated or not, is one and the same quantizer."""
    addition = graph.only_reader(operand)
    if addition is None or addition.op_type != "Add":
        return False
    tensor = addition.output[0]
    while (reader := graph.only_reader(tensor)) is not None and reader.op_type in _FUSED:
        tensor = reader.output[0]
    quantizers = [graph.quantizer_from(reader) for reader in graph.readers[tensor]]
    grids = {_grid(quantizer, graph) for quantizer in quantizers}
    return all(quantizers) and len(grids) == 1 and tensor not in graph.outputs


def _copies(nodes: list[onnx.NodeProto], tensor: str, name: str) -> list[onnx.NodeProto]:
    """Copies of a chain of nodes that start at ``tensor``."""
    copies = []
    for number, node in enumerate(nodes):
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{name}/{number}"
        copy.input[0], copy.output[0] = tensor, f"{name}/{number}"
        tensor = copy.output[0]
        copies.append(copy)
    return copies


def _grid(quantizer: list[onnx.NodeProto], graph: OnnxGraph) -> tuple[tuple[bytes, ...], ...]:
    """The values that a quantizer's nodes compute with."""
    return tuple(
        tuple(numpy_helper.to_array(graph.constants[name]).tobytes() for name in node.input[1:] if name) for node in quantizer
    )


def _numbers(graph: OnnxGraph) -> set[str]:
    """Names of constants that hold one number."""
    names = {name for name, tensor in graph.constants.items() if all(size == 1 for size in tensor.dims)}
    for node in graph.nodes:
        if node.op_type == "Constant" and isinstance(helper.get_attribute_value(node.attribute[0]), (int, float)):
            names.add(node.output[0])
    return names
