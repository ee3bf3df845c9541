"""Passes that let engines fuse windowed attention (Swin) like attention without windows.

Shifted windows add a mask per window, for which networks split the batch axis into images and windows. They also roll
images and cut them into windows in float32, before the values are quantized. These passes repeat the mask for every
image, and roll and cut codes, which have a quarter of the bytes. No value changes, bit for bit, except behind
:func:`limit_masks`. Positions that a mask of -100 hides get a probability of exp(-60) there. Its 8-bit code is 0 too,
unless the products of the attention differ by 53 or more.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwt2.onnx.graph import (
    bypass,
    forget,
    make,
    make_constant,
    maker,
    only_reader,
    quantizer_before,
    readers,
    sizes,
    take_over,
)

_MOVES = ("Concat", "Reshape", "Slice", "Transpose")
_LOWEST = -60.0  # smallest value of a mask
_LONG_RUN = 64  # values; their 8-bit codes fill one cache line


def limit_masks(graph: ir.Graph) -> None:
    """Clamp additive window masks to at least -60. Run before :func:`repeat_masks`.

    exp(-60) is negligible beside 1, but still a normal number. Below -87, ONNX Runtime's softmax computes denormal
    numbers, which takes ten times as long, for masks of -100 and of minus infinity alike.
    """
    for node in list(graph):
        around = _reshapes_around_mask(node)
        reader = only_reader(around[1].outputs[0]) if around is not None else None
        if reader is not None and reader.op_type == "Softmax":
            mask = node.inputs[1]
            lowest = make_constant(f"{node.name}/lowest", np.float32(_LOWEST))
            limited = make("Max", [mask, lowest.outputs[0]], f"{mask.name}/limited")
            limited.outputs[0].type, limited.outputs[0].shape = mask.type, mask.shape
            node.replace_input_with(1, limited.outputs[0])
            node.prepend([lowest, limited])


def repeat_masks(graph: ir.Graph) -> None:
    """Repeat window masks for every image, so that no reshapes around the addition are needed.

    (B W, h, N, N) -> (B, W, h, N, N) + (1, W, 1, N, N) -> (B W, h, N, N) becomes (B W, h, N, N) + (B W, 1, N, N), for
    batch size B, W windows, h heads and N tokens. OpenVINO computes this addition in one kernel with the products of
    the attention.
    """
    for node in list(graph):
        around = _reshapes_around_mask(node)
        if around is None:
            continue
        apart, together = around
        repeated = _repeated(node.name, apart.inputs[0], node.inputs[1])
        node.prepend(repeated)
        node.replace_input_with(1, repeated[-1].outputs[0])
        bypass(apart)
        take_over(node.outputs[0], together.outputs[0])
        graph.remove(together, safe=True)


def _reshapes_around_mask(add: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """Return the reshapes before and behind an addition that adds a mask to each window; ``None`` for any other."""
    if add.op_type != "Add":
        return None
    apart, together = maker(add.inputs[0], "Reshape"), only_reader(add.outputs[0])
    if apart is None or together is None or together.op_type != "Reshape":
        return None
    scores, split, mask, joined = map(sizes, (apart.inputs[0], *add.inputs, together.outputs[0]))
    if [len(shape) for shape in (scores, split, mask, joined)] != [4, 5, 5, 4] or 0 in [*scores[1:], split[1]]:
        return None
    same = scores[1:] == split[2:] == joined[1:] and mask == [1, split[1], 1, *scores[2:]]
    return (apart, together) if same and only_reader(apart.outputs[0]) is not None else None


def _repeated(name: str, scores: ir.Value, mask: ir.Value) -> list[ir.Node]:
    """Return nodes that expand a mask (1, W, 1, N, N) to (B W, 1, N, N) for scores (B W, h, N, N)."""
    _, count, *shape = sizes(mask)
    windows = make_constant(f"{name}/windows", np.array([count]))
    once = make_constant(f"{name}/once", np.ones(4, np.int64))
    joined = make_constant(f"{name}/shape", np.array([-1, *shape]))
    rows = make("Shape", [scores], f"{name}/count", start=0, end=1)
    images = make("Div", [rows.outputs[0], windows.outputs[0]], f"{name}/images")
    repeats = make("Concat", [images.outputs[0], once.outputs[0]], f"{name}/repeats", axis=0)
    expanded = make("Expand", [mask, repeats.outputs[0]], f"{name}/expanded")
    repeated = make("Reshape", [expanded.outputs[0], joined.outputs[0]], f"{name}/repeated")
    return [windows, once, joined, rows, images, repeats, expanded, repeated]


def move_codes(graph: ir.Graph) -> None:
    """Move quantizers in front of rolling and window partitioning, so that engines move codes instead of floats.

    Dequantizers stay where they are. Quantizers also stay where values are moved in short runs, because engines move 32
    codes at a time more slowly than 32 floats.
    """
    for dequantize in list(graph):
        chain = quantizer_before(dequantize) if dequantize.op_type == "DequantizeLinear" else []
        if not chain:
            continue
        moves, root = _moves(graph, chain[0].inputs[0])
        if any(map(_moves_far, moves)):
            _quantize_before(dequantize, chain, moves, root)


def _quantize_before(dequantize: ir.Node, chain: list[ir.Node], moves: list[ir.Node], root: ir.Value) -> None:
    moved, codes = chain[0].inputs[0], chain[-1].outputs[0]
    chain[0].replace_input_with(0, root)
    dequantize.replace_input_with(0, moved)
    for node in moves:
        for index, value in enumerate(node.inputs):
            if value is root:
                node.replace_input_with(index, codes)
    codes.name = f"{codes.name}/unmoved"
    forget(*(node.outputs[0] for node in (*moves, *chain)))
    dequantize.graph.remove(chain)
    moves[0].prepend(chain)


def _moves_far(node: ir.Node) -> bool:
    """Return whether a node is a Concat, or a Transpose that keeps long runs of values together."""
    if node.op_type != "Transpose":
        return node.op_type == "Concat"
    order, shape, run = node.attributes.get_ints("perm"), sizes(node.inputs[0]), 1
    for axis in reversed(range(len(shape))):
        if order[axis] != axis:
            break
        run *= shape[axis]
    return run >= _LONG_RUN


def _moves(graph: ir.Graph, value: ir.Value) -> tuple[list[ir.Node], ir.Value]:
    """Return the nodes, in order, that make a tensor from one other tensor by moving values, and that other tensor.

    There are no nodes if other nodes read their outputs too.
    """
    inside: set[ir.Node] = set()
    roots, values = set(), [value]
    while values:
        node = values[-1].producer()
        if node is None or node.op_type not in _MOVES:
            roots.add(values.pop())
            continue
        values.pop()
        if node not in inside:
            inside.add(node)
            values += node.inputs if node.op_type == "Concat" else node.inputs[:1]
    made = [node.outputs[0] for node in inside]
    outside = [reader for one in made for reader in readers(one) if reader.op_type != "Shape" and reader not in inside]
    if not inside or len(roots) > 1 or len(outside) > 1 or any(one.is_graph_output() for one in made):
        return [], value
    return [node for node in graph if node in inside], roots.pop()
