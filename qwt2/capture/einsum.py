"""Rewrite an einsum of two operands as a matrix product between permutations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qwt2.capture.graph import insert, replace

aten = torch.ops.aten


@dataclass
class _Operand:
    """A tensor, its labels, and the size of each label (``None`` if it depends on the batch)."""

    node: fx.Node
    labels: str
    sizes: dict[str, int | None]


def as_product(node: fx.Node) -> None:
    """Replace an einsum of two operands that contracts at least one label; leave any other as it is."""
    equation, operands = node.args[:2]
    left_side, _, out = equation.replace(" ", "").partition("->")
    labels = left_side.split(",")
    if len(operands) != 2 or not out or "." in equation or any(len(set(term)) < len(term) for term in (*labels, out)):
        return
    sizes = {label: size for term, x in zip(labels, operands) for label, size in zip(term, x.meta["shape"])}
    a, b = (_Operand(x, term, sizes) for x, term in zip(operands, labels))
    if a.node.op == "get_attr":
        a, b = b, a
    batch = "".join(label for label in a.labels if label in b.labels and label in out)
    shared = "".join(label for label in a.labels if label in b.labels and label not in out)
    rows = "".join(label for label in a.labels if label not in b.labels)
    columns = "".join(label for label in b.labels if label not in a.labels)
    if not shared or not set(rows + columns) <= set(out):
        return
    # A constant matrix takes any number of leading axes, as a Linear does.
    lead = rows if b.node.op == "get_attr" and not batch else ""
    x = _arranged(node, a, batch + lead, ("" if lead else rows, shared) if not lead else (shared,))
    y = _arranged(node, b, batch, (shared, columns))
    groups = [*batch, *lead, *([] if lead else [rows]), columns]
    shape = tuple(_size(group, sizes) for group in groups)
    product = insert(node.graph, node, aten.matmul.default, (x, y), node, shape)
    product, found = _spread(node, product, groups, sizes)
    replace(node, _permuted(node, product, found, out, sizes))


def _arranged(node: fx.Node, operand: _Operand, batch: str, groups: tuple[str, ...]) -> fx.Node:
    """Arrange the operand with the axes of ``batch`` first, followed by one axis per group of labels."""
    x = _permuted(node, operand.node, operand.labels, batch + "".join(groups), operand.sizes)
    for number, group in enumerate(groups):
        axis = len(batch) + number
        shape = [*batch, *groups[: number + 1], *"".join(groups[number + 1 :])]
        size = tuple(_size(labels, operand.sizes) for labels in shape)
        if not group:
            x = insert(node.graph, node, aten.unsqueeze.default, (x, axis), operand.node, size)
        elif len(group) > 1:
            x = insert(node.graph, node, aten.flatten.using_ints, (x, axis, axis + len(group) - 1), operand.node, size)
    return x


def _spread(node: fx.Node, x: fx.Node, groups: list[str], sizes: dict[str, int | None]) -> tuple[fx.Node, str]:
    """Split grouped axes so that every label has its own axis again; return the node and its labels."""
    for axis in reversed(range(len(groups))):
        group = groups[axis]
        shape = tuple(_size(labels, sizes) for labels in (*groups[:axis], *"".join(groups[axis:])))
        if not group:
            x = insert(node.graph, node, aten.squeeze.dim, (x, axis), node, shape)
        elif len(group) > 1:
            split = [-1 if sizes[label] is None else sizes[label] for label in group]
            x = insert(node.graph, node, aten.unflatten.int, (x, axis, split), node, shape)
    return x, "".join(groups)


def _permuted(node: fx.Node, x: fx.Node, labels: str, wanted: str, sizes: dict[str, int | None]) -> fx.Node:
    if labels == wanted:
        return x
    order = [labels.index(label) for label in wanted]
    return insert(node.graph, node, aten.permute.default, (x, order), x, tuple(sizes[label] for label in wanted))


def _size(labels: str, sizes: dict[str, int | None]) -> int | None:
    total = 1
    for label in labels:
        size = sizes[label]
        if size is None:
            return None
        total *= size
    return total
