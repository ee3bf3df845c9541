"""Passes that rewrite exported graphs into equivalent ones that engines fuse better, and their order.

A pass is a function that changes a graph in place. Values do not change, bit for bit. Sums of integers are accumulated
in another order, which does not change them either. The only exception is
:func:`~qwt2.onnx.passes.windowed_attention.limit_masks`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir

from qwt2.onnx.passes.detours import part_reductions, widen_rotary_tables
from qwt2.onnx.passes.few_rows import reshape_before_scaling
from qwt2.onnx.passes.layout import (
    activate_before_reshapes,
    drop_identities,
    merge_reshapes,
    normalize_rows,
    quantize_before_transposes,
    scale_before_heads,
    store_clip_bounds,
)
from qwt2.onnx.passes.names import drop_unread, separate_names, strip_notes, use_first_names
from qwt2.onnx.passes.padding import fold_pads
from qwt2.onnx.passes.projections import split_projections
from qwt2.onnx.passes.quantizers import (
    drop_later_attributes,
    fuse_additions,
    quantize_before_pooling,
    share_quantizers,
)
from qwt2.onnx.passes.tensorrt import clip_values, make_biases_float
from qwt2.onnx.passes.windowed_attention import limit_masks, move_codes, repeat_masks
from qwt2.onnx.passes.zero_points import fold_zero_points, unfold_zero_points
from qwt2.quantization.targets import TARGETS

Pass = Callable[[ir.Graph], None]

_ALL = tuple(TARGETS)
_FLOAT_BIASES = tuple(name for name, target in TARGETS.items() if target.float_biases)
_INTEGER_BIASES = tuple(name for name in TARGETS if name not in _FLOAT_BIASES)
# The passes in order, each with the targets whose files it rewrites. TensorRT accepts nothing between a quantizer and
# its dequantizer, and requires one zero point for both.
PASSES: list[tuple[Pass, Collection[str]]] = [
    (strip_notes, _ALL),
    (drop_later_attributes, _ALL),
    (use_first_names, _ALL),
    (separate_names, _ALL),
    (drop_identities, _ALL),
    (fold_pads, _ALL),
    (store_clip_bounds, _ALL),
    (split_projections, _ALL),
    (quantize_before_transposes, _ALL),
    (scale_before_heads, _ALL),
    (activate_before_reshapes, _ALL),
    (limit_masks, _ALL),
    (repeat_masks, _ALL),
    (normalize_rows, _ALL),
    (merge_reshapes, _ALL),
    (move_codes, _INTEGER_BIASES),
    (quantize_before_pooling, _ALL),
    (fuse_additions, _ALL),
    (share_quantizers, _ALL),
    (reshape_before_scaling, _INTEGER_BIASES),
    (part_reductions, _INTEGER_BIASES),
    (widen_rotary_tables, _INTEGER_BIASES),
    (fold_zero_points, _INTEGER_BIASES),
    (clip_values, _FLOAT_BIASES),
    (make_biases_float, _FLOAT_BIASES),
    (drop_unread, _ALL),
]
# Passes that depend on stored numbers. They run again when a rewritten graph gets new numbers.
NUMBER_PASSES: list[Pass] = [unfold_zero_points, quantize_before_pooling, fold_zero_points]


def rewrite(graph: ir.Graph, target: str) -> None:
    """Apply every pass for a target to an exported graph.

    Args:
        graph: the exported graph, with :data:`qwt2.onnx.passes.names.FIRST_NAMES` in its ``meta``.
        target: as in :func:`qwt2.quantize`.
    """
    for rewrite_graph, targets in PASSES:
        if target in targets:
            rewrite_graph(graph)


def rewrite_numbers(graph: ir.Graph) -> None:
    """Apply the passes that depend on stored numbers to a rewritten graph that got new numbers."""
    for rewrite_graph in NUMBER_PASSES:
        rewrite_graph(graph)
