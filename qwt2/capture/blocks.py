"""Blocks: parts of a network with one input and one output activation, which are compensated as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import fx

from qwt2.capture.graph import GraphModel
from qwt2.capture.wiring import layers
from qwt2.errors import Qwt2Error

_NUMBERED = re.compile(r"(^|_)\d+$")


def find_blocks(model: GraphModel) -> list[str]:
    """Return the names of the model's blocks, in execution order.

    A block is a numbered child of a list or sequence (``blocks.3``, ``layer2.0``, ``layers.1.blocks.0``,
    ``encoder_layer_5``) that holds at least two layers, but no smaller block. In a model without numbered children, a
    block is a module with at least two layers such that exactly one value is alive before it and after it; again, it
    holds no smaller block.
    """
    names = layers(model)
    numbered = _smallest(names, lambda parts: bool(_NUMBERED.search(parts[-1])))
    found = [block for block in numbered if ends(model, block) is not None]
    if not found:
        lonely = _lonely(model)
        found = _smallest(names, lambda parts: (e := ends(model, ".".join(parts))) is not None and e[1] in lonely)
    return found


def _smallest(names: list[str], is_candidate) -> list[str]:
    candidates: list[str] = []
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            prefix = ".".join(parts[:depth])
            if (
                prefix not in candidates
                and sum(is_inside(n, prefix) for n in names) >= 2
                and is_candidate(parts[:depth])
            ):
                candidates.append(prefix)
    return [c for c in candidates if not any(other != c and is_inside(other, c) for other in candidates)]


def check_blocks(model: GraphModel, blocks: Iterable[str]) -> list[str]:
    """Check the blocks that a user names, and return them in execution order.

    Raises:
        Qwt2Error: if a block holds no layer, holds another block, or does not have exactly one input and one output.
    """
    blocks, names = list(blocks), layers(model)
    for block in blocks:
        if not any(is_inside(layer, block) for layer in names):
            raise Qwt2Error(f"block {block!r} holds no quantized layer; name modules that do, or leave blocks out")
        if any(is_inside(other, block) for other in blocks if other != block):
            raise Qwt2Error(f"block {block!r} holds another block; name blocks that do not overlap")
        if ends(model, block) is None:
            raise Qwt2Error(f"block {block!r} does not read one activation and give one; name blocks that do")
    first = {block: next(i for i, name in enumerate(names) if is_inside(name, block)) for block in blocks}
    return sorted(blocks, key=first.__getitem__)


def ends(model: GraphModel, block: str) -> tuple[fx.Node, fx.Node] | None:
    """Return a block's input node and output node; ``None`` if it does not have exactly one of each.

    A block may read further values (a mask, positions) if their shape differs from that of its output.
    """
    inside = {node for node in model.graph.nodes if belongs(node, block)}
    entering = {s: None for node in inside for s in node.all_input_nodes if s not in inside and _is_activation(s)}
    leaving = [node for node in inside if _is_activation(node) and any(user not in inside for user in node.users)]
    if len(entering) > 1 and len(leaving) == 1:
        entering = {node: None for node in entering if node.meta["shape"] == leaving[0].meta["shape"]}
    calls = {call for node in inside for call in node.meta["call"].split("/") if call.partition("@")[0] == block}
    return (next(iter(entering)), leaving[0]) if len(entering) == len(leaving) == len(calls) == 1 else None


def belongs(node: fx.Node, block: str) -> bool:
    """Return whether a node is computed while a module runs; a call of a shared module belongs to its caller."""
    return node.op != "get_attr" and any(
        call.partition("@")[0] == block for call in node.meta.get("call", "").split("/")
    )


def is_inside(name: str, prefix: str) -> bool:
    """Return whether a module is ``prefix`` or lies inside it."""
    return name == prefix or name.startswith(prefix + ".")


def _is_activation(node: fx.Node) -> bool:
    return node.op != "get_attr" and node.meta.get("shape") is not None


def _lonely(model: GraphModel) -> set[fx.Node]:
    """Return the nodes after which no other value than their own is alive."""
    order = list(model.graph.nodes)
    last = {source: number for number, node in enumerate(order) for source in node.all_input_nodes}
    found = set()
    alive: set[fx.Node] = set()
    for number, node in enumerate(order):
        if _is_activation(node) and node.op != "placeholder":
            alive.add(node)
        alive = {other for other in alive if last.get(other, -1) > number}
        if alive == {node}:
            found.add(node)
    return found
