"""Attention in windows (Swin): exported graphs that engines take as they take attention without windows.

Shifted windows add a mask for each window, for which networks view the images' axis and the windows' as two; and they roll
and cut images into windows, in float32, before anything quantizes them. Here the mask is repeated for every image, and
codes are rolled and cut, of a quarter of the bytes. Every value stays what it was, bit for bit; only what a mask of -100
hides gets a probability of exp(-60) by :func:`limit_masks`, whose code of 8 bits is 0 too unless the products of the
attention differ by 53 and more.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qwt2.onnx.graph import OnnxGraph

_MOVES = ("Concat", "Reshape", "Slice", "Transpose")
_LOWEST = -60.0  # of a mask
_LONG_RUN = 64  # values; as codes, a line of the cache


def repeat_masks(model: onnx.ModelProto) -> None:
    """Add masks of windows without a reshape in front and behind, in place.

    (B W, h, N, N) -> (B, W, h, N, N) + (1, W, 1, N, N) -> (B W, h, N, N) becomes (B W, h, N, N) + (B W, 1, N, N), which OpenVINO
    computes in one kernel with the products of the attention.
    """
    graph = OnnxGraph(model)
    nodes, gone = [], set()
    for node in graph.nodes:
        around = _reshapes_around_mask(node, graph)
        if around is not None:
            apart, together = around
            repeated = _repeated(node.name, apart.input[0], node.input[1], graph.shapes[node.input[1]])
            nodes += repeated
            node.input[:] = [apart.input[0], repeated[-1].output[0]]
            node.output[0] = together.output[0]
            gone |= {id(apart), id(together)}
        nodes.append(node)
    graph.replace_nodes([node for node in nodes if id(node) not in gone])


def limit_masks(model: onnx.ModelProto) -> None:
    """Hide from a softmax what masks of windows hide with -60 at most, in place; for masks :func:`repeat_masks` is yet to see.

    exp(-60) is nothing beside 1, but a normal number; below -87 ONNX Runtime's softmax computes denormal ones, ten times as
    slowly, whether the mask is -100 or minus infinity.
    """
    graph = OnnxGraph(model)
    nodes = []
    for node in graph.nodes:
        around = _reshapes_around_mask(node, graph)
        reader = graph.only_reader(around[1].output[0]) if around is not None else None
        if reader is not None and reader.op_type == "Softmax":
            mask, limited = node.input[1], f"{node.input[1]}/limited"
            lowest = _constant(f"{node.name}/lowest", np.float32(_LOWEST))
            nodes += [lowest, _node("Max", [mask, lowest.output[0]], limited)]
            node.input[1] = limited
            _describe(model, limited, graph.shapes[mask])
        nodes.append(node)
    graph.replace_nodes(nodes)


def _describe(model: onnx.ModelProto, name: str, shape: list[int]) -> None:
    """Tell the passes to come which shape a new float tensor has."""
    model.graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))


def _reshapes_around_mask(add: onnx.NodeProto, graph: OnnxGraph) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """The reshapes in front of an addition and behind it, if it adds a mask to each window."""
    if add.op_type != "Add":
        return None
    apart, together = graph.made.get(add.input[0]), graph.only_reader(add.output[0])
    if not all(node is not None and node.op_type == "Reshape" for node in (apart, together)):
        return None
    names = (apart.input[0], *add.input, together.output[0])
    scores, split, mask, joined = (graph.shapes.get(name, []) for name in names)
    if [len(shape) for shape in (scores, split, mask, joined)] != [4, 5, 5, 4] or 0 in [*scores[1:], split[1]]:
        return None
    same = scores[1:] == split[2:] == joined[1:] and mask == [1, split[1], 1, *scores[2:]]
    return (apart, together) if same and graph.only_reader(apart.output[0]) is not None else None


def _repeated(name: str, scores: str, mask: str, shape: list[int]) -> list[onnx.NodeProto]:
    """What makes (B W, 1, N, N), for scores (B W, h, N, N), of a mask (1, W, 1, N, N)."""
    windows, once = _constant(f"{name}/windows", np.array(shape[1:2])), _constant(f"{name}/once", np.ones(4, np.int64))
    joined = _constant(f"{name}/shape", np.array([-1, *shape[2:]]))
    count = _node("Shape", [scores], f"{name}/count", start=0, end=1)
    images = _node("Div", [count.output[0], windows.output[0]], f"{name}/images")
    repeats = _node("Concat", [images.output[0], once.output[0]], f"{name}/repeats", axis=0)
    expanded = _node("Expand", [mask, repeats.output[0]], f"{name}/expanded")
    repeated = _node("Reshape", [expanded.output[0], joined.output[0]], f"{name}/repeated")
    return [windows, once, joined, count, images, repeats, expanded, repeated]


def _node(kind: str, inputs: list[str], name: str, **attributes) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [name], name, **attributes)


def _constant(name: str, value: np.ndarray) -> onnx.NodeProto:
    return _node("Constant", [], name, value=numpy_helper.from_array(np.asarray(value)))


def move_codes(model: onnx.ModelProto) -> None:
    """Quantize what is rolled, or cut into windows, before that, in place; dequantizers stay where they are.

    What is cut into short runs stays as it is: engines are slower in moving 32 codes than 32 floats at a time.
    """
    graph = OnnxGraph(model)
    before, gone, moved = {}, set(), set()
    for dequantize in [node for node in graph.nodes if node.op_type == "DequantizeLinear"]:
        chain = graph.quantizer_before(dequantize)
        moves, root = _moves(chain[0].input[0], graph) if chain else ([], "")
        if not any(_moves_far(node, graph) for node in moves):
            continue
        codes = f"{chain[-1].output[0]}/unmoved"
        for node in moves:
            node.input[:] = [codes if name == root else name for name in node.input]
        chain[-1].output[0], dequantize.input[0], chain[0].input[0] = codes, chain[0].input[0], root
        before[id(moves[0])] = chain
        gone |= set(map(id, chain))
        moved |= {node.output[0] for node in (*moves, *chain)}
    nodes = []
    for node in graph.nodes:
        nodes += before.get(id(node), [])
        if id(node) not in gone:
            nodes.append(node)
    graph.replace_nodes(nodes, forget=moved)


def _moves_far(node: onnx.NodeProto, graph: OnnxGraph) -> bool:
    """Whether a node joins what was taken apart, or is a Transpose that keeps long runs of values together."""
    if node.op_type != "Transpose":
        return node.op_type == "Concat"
    [order] = [attribute.ints for attribute in node.attribute if attribute.name == "perm"]
    shape, run = graph.shapes.get(node.input[0], []), 1
    for axis in reversed(range(len(shape))):
        if order[axis] != axis:
            break
        run *= shape[axis]
    return run >= _LONG_RUN


def _moves(tensor: str, graph: OnnxGraph) -> tuple[list[onnx.NodeProto], str]:
    """The nodes, in order, that make a tensor of one other by moving its values, and that other; none if they are read elsewhere."""
    found: dict[str, onnx.NodeProto] = {}
    roots, names = set(), [tensor]
    while names:
        name = names.pop()
        node = graph.made.get(name)
        if node is None or node.op_type not in _MOVES:
            roots.add(name)
        elif name not in found:
            found[name] = node
            names += node.input if node.op_type == "Concat" else node.input[:1]
    moves = [node for node in graph.nodes if node.output[0] in found]
    inside = set(map(id, moves))
    readers = [reader for name in found for reader in graph.readers[name] if reader.op_type != "Shape"]
    outside = [reader for reader in readers if id(reader) not in inside]
    if len(roots) > 1 or len(outside) > 1 or graph.outputs & found.keys():
        return [], tensor
    return moves, roots.pop()
