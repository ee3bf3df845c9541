"""Counts of the operations that an engine computes in integers and in float, taken from the graph that it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# Operations that move or convert values; they have no arithmetic that could run in integers.
_MOVES = {
    "Input", "Output", "Const", "Constant", "Reshape", "Transpose", "Concat", "Concatenation", "Split", "Squeeze",
    "Unsqueeze", "Gather", "GatherND", "Slice", "StridedSlice", "Expand", "Pad", "Shape", "Cast", "Convert", "Identity",
    "Reorder", "ReorderInput", "ReorderOutput", "QuantizeLinear", "DequantizeLinear", "FakeQuantize", "ShapeOf",
    "Broadcast", "Tile", "Roll",
    # Inductor's and TVM's names
    "cat", "clone", "constant_pad_nd", "dequantize_per_tensor", "expand", "getitem", "index",
    "inductor_force_stride_order", "permute",
    "quantize_per_tensor", "reshape", "slice", "squeeze", "take", "transpose", "unsqueeze", "view",
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One node of an engine's optimized graph.

    Attributes:
        kind: the engine's name for the operation ("QLinearConv", "FullyConnected").
        integer: whether the operation takes codes of at most 8 bits.
    """

    kind: str
    integer: bool


def count_operations(operations: Iterable[Operation]) -> dict[str, dict[str, int]]:
    """Count the nodes of each kind that compute in integers and in float; nodes that only move values do not count.

    Returns:
        ``{"integer": {kind: count}, "float": {kind: count}}``, with kinds in alphabetical order.
    """
    counted = Counter(operation for operation in operations if operation.kind not in _MOVES)
    return {
        name: {o.kind: n for o, n in sorted(counted.items(), key=lambda item: item[0].kind) if o.integer == integer}
        for name, integer in (("integer", True), ("float", False))
    }
