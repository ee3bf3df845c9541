"""Queries on a captured graph's edges: which node reads which. No query depends on the name of a class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from qwt2.capture.batch import Inputs
from qwt2.capture.graph import GraphModel, Pooling, Product, Sum

aten = torch.ops.aten

LAYER_TYPES = (nn.Linear, nn.Conv2d)

# Operations that move values without changing them; ``_keeps_last_axis`` tells which leave the last axis in place.
_MOVES = {
    aten.reshape.default, aten.permute.default, aten.transpose.int, aten.roll.default, aten.clone.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default,
    aten.flatten.using_ints, aten.unflatten.int,
}  # fmt: skip
# Operations that integer engines compute on a convolution's quantized output, or fuse into its kernel.
_MERGES = {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.max_pool2d.default}
_PADS = {aten.constant_pad_nd.default, aten.pad.default}
_SOFTMAX = {aten.softmax.int, aten._softmax.default}
# Operations that leave probabilities unchanged.
_CASTS = {aten._to_copy.default, aten.reshape.default, aten.clone.default, aten.expand.default, aten.type_as.default}


def layers(model: GraphModel) -> list[str]:
    """Return the names of the Linear and Conv2d modules, in the order of their first call."""
    return list(model.calls(LAYER_TYPES))


def norm_consumers(model: GraphModel) -> dict[str, list[str]]:
    """Map LayerNorms to the Linears that read their output.

    A LayerNorm is only included if all its readers are Linears, the last axis stays intact on the way to them, and
    these Linears read nothing else.
    """
    order, found, linears = layers(model), {}, model.calls(nn.Linear)
    for norm, calls in model.calls(nn.LayerNorm).items():
        readers = [reader for call in calls for reader in _readers(call, _keeps_last_axis)]
        names = {reader.target for reader in readers if reader.op == "call_module"}
        only_linears = all(r.op == "call_module" for r in readers) and names <= linears.keys()
        if readers and only_linears and {call for name in names for call in linears[name]} == set(readers):
            found[norm] = sorted(names, key=order.index)
    return found


def escaping(model: GraphModel) -> set[str]:
    """Return the convolutions whose output, activated or not, is read by something other than a layer."""
    readers = {name: _conv_readers(model, calls) for name, calls in model.calls(nn.Conv2d).items()}
    return {n for n, found in readers.items() if not all(isinstance(model.module_of(r), LAYER_TYPES) for r in found)}


def layer_readers(model: GraphModel) -> dict[str, list[str]]:
    """Map the convolutions that are not :func:`escaping` to the layers that read their output."""
    outside = escaping(model)
    calls = model.calls(nn.Conv2d)
    return {name: [r.target for r in _conv_readers(model, calls[name])] for name in calls if name not in outside}


def output_layers(model: GraphModel) -> set[str]:
    """Return the layers whose output, activated or not, is an output of the network."""
    sources = [_source(node, lambda n: _is_merge(n) or _is_move(n)) for node in model.output.all_input_nodes]
    return {source.target for source in sources if isinstance(model.module_of(source), LAYER_TYPES)}


def residual_sums(model: GraphModel) -> dict[str, tuple[str | None, str | None]]:
    """Map sums to the convolutions that compute their two operands, activated or not.

    ``None`` stands for an operand that no convolution computes. Sums without any such convolution are left out.
    """
    found = {}
    for name, calls in model.calls(Sum).items():
        makers = {(_maker(model, call.args[0]), _maker(model, call.args[1])) for call in calls}
        if len(makers) == 1 and any(found_makers := makers.pop()):
            found[name] = found_makers
    return found


def kernel_poolings(model: GraphModel) -> list[str]:
    """Return the poolings that are the only reader of a convolution's output or a residual sum, activated or not."""
    residual = residual_sums(model)
    found = []
    for name, calls in model.calls(Pooling).items():
        sources = [_source(call.args[0], _is_merge) for call in calls]
        if all(
            (isinstance(model.module_of(s), nn.Conv2d) or s.target in residual)
            and len(list(_readers(s, _is_merge))) == 1
            for s in sources
        ):
            found.append(name)
    return found


def softmax_products(model: GraphModel) -> set[str]:
    """Return the products whose first operand is the output of a softmax."""
    return {
        name for name, calls in model.calls(Product).items()
        if all(_source(call.args[0], _keeps_probabilities).target in _SOFTMAX for call in calls)
    }  # fmt: skip


def _keeps_probabilities(node: fx.Node) -> bool:
    return node.target in _CASTS or (node.target is aten.masked_fill.Scalar and node.args[2] == 0)


def _readers(node: fx.Node, passes: Any) -> Iterator[fx.Node]:
    for user in node.users:
        if user.args and user.args[0] is node and passes(user):
            yield from _readers(user, passes)
        else:
            yield user


def _conv_readers(model: GraphModel, calls: list[fx.Node]) -> list[fx.Node]:
    def passes(node: fx.Node) -> bool:
        return _is_merge(node) or _pads_convolutions(model, node)

    return [reader for call in calls for reader in _readers(call, passes)]


def _pads_convolutions(model: GraphModel, node: fx.Node) -> bool:
    """Return whether a node pads images with zeros and only convolutions read it: their kernels can pad themselves."""
    if node.op != "call_function" or node.target not in _PADS or node.kwargs:
        return False
    widths, *rest = node.args[1:]
    numbers = len(widths) <= 4 and all(isinstance(width, int) and width >= 0 for width in widths)
    zeros = all(argument in (0, None, "constant") for argument in rest)
    return numbers and zeros and all(isinstance(model.module_of(reader), nn.Conv2d) for reader in node.users)


def _source(node: fx.Node, passes: Any) -> fx.Node:
    while passes(node):
        node = node.args[0]
    return node


def _maker(model: GraphModel, node: fx.Node) -> str | None:
    source = _source(node, _is_merge)
    return source.target if isinstance(model.module_of(source), nn.Conv2d) else None


def _is_merge(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _MERGES


def _is_move(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _MOVES


def is_bijection(node: fx.Node) -> bool:
    """Return whether a node only reorders values, so that every value stays exactly once."""
    return _is_move(node) and node.target is not aten.expand.default


def _keeps_last_axis(node: fx.Node) -> bool:
    """Return whether a node only moves values, and moves each row of the last axis as a whole."""
    if not _is_move(node):
        return False
    before, after = node.args[0].meta["shape"], node.meta["shape"]
    if not before or not after or before[-1] != after[-1] or before[-1] is None:
        return False
    last = len(before) - 1
    touched = {
        aten.permute.default: lambda: node.args[1][-1] % len(before) != last,
        aten.transpose.int: lambda: last in (node.args[1] % len(before), node.args[2] % len(before)),
        aten.roll.default: lambda: len(node.args) < 3 or last in [axis % len(before) for axis in node.args[2]],
    }
    return not touched.get(node.target, lambda: False)()


def moved_axis(model: GraphModel, node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Return where a node leaves one axis of a value that it reads; ``None`` if it does more to it than move it.

    Sums, means over other axes and joining along other axes count as moves: a rotation of the axis passes them.
    """
    before, after = source.meta["shape"], node.meta.get("shape")
    if before is None or after is None:
        return None
    if isinstance(model.module_of(node), Sum) or node.target in (aten.clone.default, aten.roll.default):
        return axis if node.target is not aten.roll.default or axis not in _axes(node, 2, len(before)) else None
    if node.target in (aten.add.Tensor, aten.expand.default) and not node.kwargs:
        moved = axis - len(before) + len(after)
        return moved if after[moved] == before[axis] else None
    if node.target is aten.permute.default:
        return _axes(node, 1, len(before)).index(axis)
    if node.target is aten.transpose.int:
        first, second = (node.args[k] % len(before) for k in (1, 2))
        return {first: second, second: first}.get(axis, axis)
    if node.target in (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int):
        is_last = axis == len(before) - 1 and after[-1] == before[-1]
        is_second = axis == 1 and after[:2] == before[:2]
        return len(after) - 1 if is_last else 1 if is_second else None
    if node.target in (aten.slice.Tensor, aten.cat.default):
        return axis if axis not in _axes(node, 1, len(before), 0) else None
    if node.target is aten.unsqueeze.default:
        return axis + (_axes(node, 1, len(after))[0] <= axis)
    if node.target in (aten.select.int, aten.squeeze.dim, aten.squeeze.dims, aten.mean.dim):
        gone = _axes(node, 1, len(before))
        keeps = node.target is aten.mean.dim and bool((*node.args, False)[2])
        return None if axis in gone or not gone else axis - (not keeps) * sum(k < axis for k in gone)
    return None


def _axes(node: fx.Node, position: int, count: int, default: int | None = None) -> list[int]:
    """Return an argument that names axes, as numbers from 0."""
    given = node.args[position] if len(node.args) > position else default
    axes = [] if given is None else given if isinstance(given, (list, tuple)) else [given]
    return [k % count for k in axes]


def float_operations(model: GraphModel) -> dict[str, str]:
    """Map modules to the reason why products or convolutions in them are not layers and stay in float."""
    found: dict[str, list[str]] = {}
    for node in model.graph.nodes:
        if node.op == "call_function" and (reason := _reason(node)):
            reasons = found.setdefault(node.meta["module"], [])
            reasons += [reason] if reason not in reasons else []
    return {name: ", ".join(reasons) + " stays in float" for name, reasons in found.items()}


_ARITHMETIC = (
    "linear", "matmul", "einsum", "bilinear", "conv", "deform_conv", "lstm", "gru", "rnn", "addmv", "mv", "dot",
    "baddbmm", "addbmm", "addmm", "bmm", "mm", "tensordot", "inner", "chain_matmul",
)  # fmt: skip


def _reason(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", "").partition(".")[0]
    if not name.startswith(_ARITHMETIC):
        return ""
    constant = [argument for argument in node.all_input_nodes if argument.op == "get_attr"]
    if name == "matmul" and constant:
        return "matmul with a constant that is no matrix behind it"
    if name.startswith("conv_transpose"):
        return f"{name} with dilation or of images of free size"
    return name


def multiply_accumulates(model: GraphModel, example: Inputs) -> dict[fx.Node, int]:
    """Return the multiply-accumulates per node for one batch, without nodes that have none."""
    found: dict[fx.Node, int] = {}
    counter = FlopCounterMode(display=False)

    def count(node: fx.Node, values: dict) -> Any:
        before = counter.get_total_flops()
        value = model.evaluate(node, values)
        if work := counter.get_total_flops() - before:
            found[node] = work // 2
        return value

    with torch.no_grad(), counter:
        model.walk(example, count)
    return found
