"""Storage of weight codes of at most 4 bits as ONNX INT4, which halves their bytes in the file.

Folding shifts low-bit codes left inside int8 and divides the scale by the same power of two. A negative alpha flips
the codes of its channel, which turns -8 into +8. The file undoes both exactly: its scales carry the power of two and
the sign, so that any reader of ONNX's opset 21 computes the same values from it. However, ONNX Runtime 1.32 and
OpenVINO 2026.4 multiply INT4 weights in float, and ONNX Runtime's optimizations break some graphs of opset 21 whatever
their weights. :func:`qwt2.load_engine` therefore restores the int8 model, bit for bit, before an engine reads it.

Shift and signs are derived from the codes and not taken from the layers, for three reasons. A channel whose scale had
to grow for its bias has codes that no shift restores. The parts of a split layer may differ. And a file can be packed
without its model.
"""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qwt2.errors import Qwt2Error
from qwt2.onnx.graph import store, stored
from qwt2.onnx.metadata import INT4_KEY

OPSET = 21  # the first opset whose DequantizeLinear takes INT4
LOW, HIGH = -8, 7


def pack_int4(model: ir.Model) -> None:
    """Store weights of at most 4 bits as INT4, in place. Other weights stay as they are.

    Raises:
        Qwt2Error: no weight has at most 4 bits.
    """
    shifts = {}
    for dequantize in _weights(model.graph, ir.DataType.INT8):
        codes, scale, zero_point = dequantize.inputs
        values, scales, axis = stored(codes), stored(scale), dequantize.attributes.get_int("axis")
        shift = _shift(values)
        sign = _signs(values >> shift, axis)
        small = (values >> shift) * _along(sign, axis, values.ndim)
        if small.min() < LOW or small.max() > HIGH:
            continue
        shifts[codes.name] = shift
        store(codes, small.astype(ml_dtypes.int4))
        store(scale, scales * sign.astype(np.float32) * np.float32(2**shift))
        store(zero_point, np.zeros(scales.shape, ml_dtypes.int4))
    if not shifts:
        raise Qwt2Error(
            "weight_storage='int4': no weight has codes of at most 4 bits; quantize with weight_bits=4 or fewer"
        )
    model.metadata_props[INT4_KEY] = json.dumps({"opset": model.opset_imports[""], "shifts": shifts})
    model.opset_imports[""] = OPSET


def widen_int4(model: ir.Model) -> None:
    """Undo :func:`pack_int4` in place, bit for bit. A model without INT4 storage stays as it is."""
    packed = json.loads(model.metadata_props.pop(INT4_KEY, "{}"))
    for dequantize in _weights(model.graph, ir.DataType.INT4):
        codes, scale, zero_point = dequantize.inputs
        small, scales = stored(codes).astype(np.int8), stored(scale)
        power = 2 ** packed["shifts"][codes.name]
        sign = _along(np.sign(scales).astype(np.int8), dequantize.attributes.get_int("axis"), small.ndim)
        store(codes, (small * sign * np.int8(power)).astype(np.int8))
        store(scale, np.abs(scales) / np.float32(power))
        store(zero_point, np.zeros(scales.shape, np.int8))
    model.opset_imports[""] = packed.get("opset", model.opset_imports[""])


def _weights(graph: ir.Graph, kind: ir.DataType) -> list[ir.Node]:
    """Return one dequantizer for every stored weight of one type, however often its layer runs."""
    found = {
        node.inputs[0]: node
        for node in graph
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer() and node.inputs[0].dtype == kind
    }
    return list(found.values())


def _shift(codes: np.ndarray) -> int:
    """Return the number of low bits that are zero in every code."""
    used = int(np.bitwise_or.reduce(codes.view(np.uint8), axis=None))
    return (used & -used).bit_length() - 1 if used else 0


def _signs(codes: np.ndarray, axis: int) -> np.ndarray:
    """Return int8 signs (channels,): -1 for channels whose largest code is +8, which INT4 does not have, else 1."""
    others = tuple(a for a in range(codes.ndim) if a != axis)
    return np.where(codes.max(others) == HIGH + 1, -1, 1).astype(np.int8)


def _along(values: np.ndarray, axis: int, dimensions: int) -> np.ndarray:
    return values.reshape([-1 if a == axis else 1 for a in range(dimensions)])
