"""Weight codes of at most 4 bits stored as ONNX INT4: half the bytes in the file, the very same int8 model when loaded.

Folding shifts low-bit codes left inside int8 and divides the scale by the same power of two, and a negative alpha
flips the codes of its channel, whose -8 then is a +8. Both are undone in the file, exactly: its scales bear the
power of two and the sign, so that the file as it is means the same to anybody who knows ONNX's opset 21. But
ONNX Runtime 1.32 and OpenVINO 2026.4 multiply INT4 weights in float (and the former's optimizations break some graphs
of opset 21, whatever their weights): :func:`qwt2.load_engine` restores the int8 model first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from qwt2.errors import Qwt2Error

INT4_KEY = "qwt2_int4"
OPSET = 21  # the first whose DequantizeLinear takes INT4
LOW, HIGH = -8, 7


def pack_int4(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose weights of at most 4 bits are INT4; the others stay as they are.

    Raises:
        Qwt2Error: no weight has so few bits.
    """
    packed = onnx.ModelProto()
    packed.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in packed.graph.initializer}
    shifts = {}
    for codes_name, scale_name, zero_name, axis in _weights(packed, TensorProto.INT8):
        codes, scale = (numpy_helper.to_array(tensors[name]) for name in (codes_name, scale_name))
        shift = _shift(codes)
        sign = _signs(codes >> shift, axis)
        small = (codes >> shift) * _along(sign, axis, codes.ndim)
        if small.min() < LOW or small.max() > HIGH:
            continue
        shifts[codes_name] = shift
        _put(tensors[codes_name], small.astype(ml_dtypes.int4))
        _put(tensors[scale_name], scale * sign.astype(np.float32) * np.float32(2**shift))
        _put(tensors[zero_name], np.zeros(scale.shape, ml_dtypes.int4))
    if not shifts:
        raise Qwt2Error("weight_storage='int4': no weight has codes of at most 4 bits; quantize with weight_bits=4 or fewer")
    _declare(packed, shifts, TensorProto.INT4)
    opset = next(entry for entry in packed.opset_import if not entry.domain)
    packed.metadata_props.add(key=INT4_KEY, value=json.dumps({"opset": opset.version, "shifts": shifts}))
    opset.version = OPSET
    return packed


def widen_int4(model: onnx.ModelProto) -> onnx.ModelProto:
    """The int8 model that :func:`pack_int4` was given, bit for bit; a model without INT4 storage as it is."""
    entry = next((entry for entry in model.metadata_props if entry.key == INT4_KEY), None)
    if entry is None:
        return model
    stored = json.loads(entry.value)
    model.metadata_props.remove(entry)
    next(entry for entry in model.opset_import if not entry.domain).version = stored["opset"]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for codes_name, scale_name, zero_name, axis in _weights(model, TensorProto.INT4):
        scale = numpy_helper.to_array(tensors[scale_name])
        small = numpy_helper.to_array(tensors[codes_name]).astype(np.int8)
        power = 2 ** stored["shifts"][codes_name]
        sign = np.sign(scale).astype(np.int8)
        _put(tensors[codes_name], (small * _along(sign, axis, small.ndim) * np.int8(power)).astype(np.int8))
        _put(tensors[scale_name], np.abs(scale) / np.float32(power))
        _put(tensors[zero_name], np.zeros(scale.shape, np.int8))
    _declare(model, stored["shifts"], TensorProto.INT8)
    return model


def _weights(model: onnx.ModelProto, kind: int) -> list[tuple[str, str, str, int]]:
    """Names of codes, scales and zero points, and the channel axis, of weights of one type."""
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    found = {  # once each, however often a layer runs
        node.input[0]: (*node.input, next(a.i for a in node.attribute if a.name == "axis"))
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and kinds.get(node.input[0]) == kind
    }
    return list(found.values())


def _declare(model: onnx.ModelProto, codes: Iterable[str], kind: int) -> None:
    """Set the type that the graph notes beside these weights and their zero points."""
    names = {name for node in model.graph.node if node.input and node.input[0] in codes for name in (node.input[0], node.input[2])}
    for value in model.graph.value_info:
        if value.name in names:
            value.type.tensor_type.elem_type = kind


def _shift(codes: np.ndarray) -> int:
    """How many low bits are zero in every code."""
    used = int(np.bitwise_or.reduce(codes.view(np.uint8), axis=None))
    return (used & -used).bit_length() - 1 if used else 0


def _signs(codes: np.ndarray, axis: int) -> np.ndarray:
    """-1 for channels that hold a +8, which INT4 has not, but no -8; int8 (channels,)."""
    others = tuple(a for a in range(codes.ndim) if a != axis)
    return np.where(codes.max(others) == HIGH + 1, -1, 1).astype(np.int8)


def _along(values: np.ndarray, axis: int, dimensions: int) -> np.ndarray:
    return values.reshape([-1 if a == axis else 1 for a in range(dimensions)])


def _put(tensor: onnx.TensorProto, array: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
