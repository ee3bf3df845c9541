"""Passes for TensorRT's rules (:mod:`qwt2.onnx.tensorrt_rules`): unbroken quantizer pairs and float biases."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwt2.onnx.graph import add_initializer, forget, maker, readers, store, stored, take_over


def clip_values(graph: ir.Graph) -> None:
    """Clip values before they are quantized in place of their codes.

    Some engines allow nothing between a QuantizeLinear and its DequantizeLinear. Unsigned codes that are centred on
    their zero point become signed codes with a zero point of 0, if both nodes read that zero point. The quantized
    values do not change.
    """
    for clip in list(graph):
        quantize = maker(clip.inputs[0], "QuantizeLinear") if clip.op_type == "Clip" else None
        if quantize is not None:
            lowest, highest = (int(stored(value)) for value in clip.inputs[1:])
            _set_end(clip, 1, quantize, "low", lowest)
            _set_end(clip, 2, quantize, "high", highest)
            _sign_codes(quantize.inputs[2], lowest, highest)
            _clip_before(quantize, clip)


def _set_end(clip: ir.Node, position: int, quantize: ir.Node, end: str, code: int) -> None:
    """Set one bound of a Clip to the value of a code.

    The bound is stored as ``<quantizer>.low`` or ``<quantizer>.high`` and shared by all runs of the quantizer.
    """
    scale, zero_point = quantize.inputs[1:]
    name, graph = f"{scale.name.removesuffix('scale')}{end}", clip.graph
    if name not in graph.initializers:
        add_initializer(graph, name, np.float32((code - int(stored(zero_point))) * stored(scale)))
    clip.replace_input_with(position, graph.initializers[name])


def _sign_codes(zero_point: ir.Value, lowest: int, highest: int) -> None:
    is_shared = any(reader.op_type == "DequantizeLinear" for reader in readers(zero_point))
    if is_shared and 2 * int(stored(zero_point)) == lowest + highest + 1:
        store(zero_point, np.array(0, np.int8))


def _clip_before(quantize: ir.Node, clip: ir.Node) -> None:
    """Move a Clip from behind a QuantizeLinear to its front."""
    codes, values = quantize.outputs[0], clip.outputs[0]
    take_over(codes, values)
    clip.replace_input_with(0, quantize.inputs[0])
    quantize.replace_input_with(0, values)
    values.name = f"{codes.name}/values"
    forget(codes, values)
    clip.graph.remove(clip)
    quantize.prepend(clip)


def make_biases_float(graph: ir.Graph) -> None:
    """Store int32 biases as float values under the same names, because TensorRT dequantizes only int8."""
    for value in [value for value in graph.initializers.values() if value.dtype == ir.DataType.INT32]:
        dequantizers = [node for node in readers(value) if node.op_type == "DequantizeLinear"]
        if not dequantizers or dequantizers[0].inputs[0] is not value:  # a zero point
            continue
        store(value, stored(value).astype(np.float32) * stored(dequantizers[0].inputs[1]))
        for node in dequantizers:  # a layer may run several times
            node.outputs[0].replace_all_uses_with(value)
        graph.remove(dequantizers, safe=True)
