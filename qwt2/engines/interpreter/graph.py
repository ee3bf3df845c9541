"""Execution of an exported ONNX file in PyTorch: quantized products in integers, everything else in float32.

QuantizeLinear makes codes, and DequantizeLinear keeps them as codes with their scale until an operation needs the
values. A product of two tensors of codes is accumulated exactly, gets the bias in integers, and is scaled once at the
end: y = s_a s_w (sum_k (a_k - z_a) w_k + b). Nothing is fused or approximated, so an int8 x int8 -> int32 kernel must
have the same accumulators. Float operations that this module does not implement run in ONNX's reference implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from qwt2.errors import Qwt2Error

OPS: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Codes:
    """A quantized tensor: values = (codes - zero_point) * scale.

    Attributes:
        codes: uint8, int8 or int32, of any shape.
        scale, zero_point: of shape (), or with one entry per index of ``axis``.
        axis: the axis of per-channel parameters; ``None`` for per-tensor parameters.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None

    def dequantize(self) -> Tensor:
        """Return the values as float32."""
        shape = [1] * self.codes.dim()
        if self.axis is not None:
            shape[self.axis] = -1
        zero = self.zero_point.to(torch.int32).reshape(shape)
        return (self.codes.to(torch.int32) - zero).float() * self.scale.reshape(shape)


class TorchGraph:
    """An exported model that runs node by node.

    Args:
        model: an ONNX model of this library.
        device: the device of the tensors; shapes and indices stay on the CPU.

    Raises:
        Qwt2Error: neither this module nor ONNX's reference implementation has one of the operations.
    """

    def __init__(self, model: onnx.ModelProto, device: str = "cpu"):
        self.device = torch.device(device)
        self.nodes = list(model.graph.node)
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.outputs = [value.name for value in model.graph.output]
        self.constants = {t.name: self._tensor(numpy_helper.to_array(t)) for t in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = self._tensor(_constant(node))
        self.nodes = [node for node in self.nodes if node.op_type != "Constant"]
        self.attributes = [{a.name: helper.get_attribute_value(a) for a in node.attribute} for node in self.nodes]
        self.functions = [self._function(node, opsets) for node in self.nodes]
        last_use = {name: index for index, node in enumerate(self.nodes) for name in node.input}
        kept = {*self.constants, *self.outputs}  # a node may read an output too, which must not release it
        self.released = [
            [n for n in node.input if last_use[n] == i and n not in kept] for i, node in enumerate(self.nodes)
        ]

    @torch.no_grad()
    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph on arrays by name, and return its outputs by name."""
        results = self.run({name: self._tensor(array) for name, array in feeds.items()})
        return {name: value.cpu().numpy() for name, value in results.items()}

    def run(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on tensors by name, and return its outputs by name."""
        values: dict[str, Any] = self.constants | feeds
        steps = zip(self.nodes, self.functions, self.attributes, self.released)
        for node, function, attributes, released in steps:
            inputs = [values[name] if name else None for name in node.input]
            results = function(attributes, *inputs)
            for name, result in zip(node.output, results if isinstance(results, tuple) else (results,)):
                values[name] = result
            for name in released:
                values.pop(name, None)
        return {name: _value(values[name]) for name in self.outputs}

    def _function(self, node: onnx.NodeProto, opsets: dict[str, int]) -> Callable[..., Any]:
        """Return the function of a node; it takes attributes and inputs and returns one output or a tuple of them."""
        return OPS.get(node.op_type) or _reference(node, opsets)

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.array(array))
        return tensor if tensor.dtype == torch.int64 else tensor.to(self.device)


def _reference(node: onnx.NodeProto, opsets: dict[str, int]) -> Callable[..., Any]:
    """Return a function that runs a node on float values in ONNX's reference implementation (NumPy on the CPU)."""
    try:
        evaluator = ReferenceEvaluator(node, opsets=opsets)
    except NotImplementedError as error:
        raise Qwt2Error(f"torch_int8 has no {node.op_type}; run this file on another engine") from error

    def run(attributes, *inputs):
        feeds = {name: _to_numpy(_value(value)) for name, value in zip(node.input, inputs) if name}
        device = next(
            (x.device for x in inputs if isinstance(x, Tensor) and x.is_floating_point()), torch.device("cpu")
        )
        return tuple(_from_numpy(result, device) for result in evaluator.run(None, feeds))

    return run


def _to_numpy(value: Any) -> Any:
    return [_to_numpy(item) for item in value] if isinstance(value, list) else value.cpu().numpy()


def _from_numpy(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):  # a sequence
        return [_from_numpy(item, device) for item in value]
    tensor = torch.from_numpy(np.array(value))
    return tensor if tensor.dtype == torch.int64 else tensor.to(device)


def integer_matmul(a: Tensor, zero_point: Tensor, b: Tensor) -> Tensor:
    """Compute (a - zero_point) @ b exactly in integers.

    Args:
        a: codes (M, K), uint8 or int8.
        zero_point: zero point of ``a``, ().
        b: codes (K, N), int8 with zero point 0.

    Returns:
        Accumulators (M, N), int32.
    """
    zero = int(zero_point)
    if a.dtype == torch.uint8:  # the kernel takes int8: shift by 128, and undo the shift through the column sums
        a, zero = (a.to(torch.int16) - 128).to(torch.int8), zero - 128
    columns = b.to(torch.int32).sum(0, dtype=torch.int32)
    rows, inner, width = a.shape[0], a.shape[1], b.shape[1]
    # CUDA's kernel needs more than 16 rows, and multiples of 8 for K and N. Padding with zeros does not change sums.
    a = F.pad(a, (0, -inner % 8, 0, max(0, 17 - rows)))
    b = F.pad(b, (0, -width % 8, 0, -inner % 8))
    return torch._int_mm(a.contiguous(), b.contiguous())[:rows, :width] - zero * columns


def integer_conv2d(
    x: Tensor, zero_point: Tensor, weight: Tensor, stride: list[int], pads: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Compute a convolution exactly in integers. The padding is the zero point, the code of 0.

    Args:
        x: codes (N, C_in, H, W), uint8 or int8.
        zero_point: zero point of ``x``, ().
        weight: codes (C_out, C_in / groups, kH, kW), int8 with zero point 0.
        stride: vertical and horizontal stride.
        pads: padding at the top, left, bottom and right.
        dilation: vertical and horizontal dilation.
        groups: number of groups.

    Returns:
        Accumulators (N, C_out, H', W'), int32.
    """
    top, left, bottom, right = pads
    padded = F.pad(x.float(), (left, right, top, bottom), value=float(zero_point))
    size = [(padded.shape[2 + d] - dilation[d] * (weight.shape[2 + d] - 1) - 1) // stride[d] + 1 for d in (0, 1)]
    patches = F.unfold(padded, weight.shape[2:], dilation=tuple(dilation), stride=tuple(stride))
    n, out = x.shape[0], weight.shape[0]
    if groups == 1:
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1]).to(x.dtype)
        acc = integer_matmul(rows, zero_point, weight.flatten(1).t())
        return acc.reshape(n, -1, out).transpose(1, 2).reshape(n, out, *size)
    # There is no integer kernel for small groups, and integers of this size are exact in float64.
    patches = patches.double().reshape(n, groups, -1, patches.shape[-1]) - float(zero_point)
    acc = weight.double().reshape(groups, out // groups, -1) @ patches
    return acc.reshape(n, out, *size).to(torch.int32)


def _constant(node: onnx.NodeProto) -> np.ndarray:
    [attribute] = node.attribute
    value = helper.get_attribute_value(attribute)
    return numpy_helper.to_array(value) if attribute.name == "value" else np.asarray(value)


def _value(x: Any) -> Any:
    return x.dequantize() if isinstance(x, Codes) else x


def _op(name: str, keeps_codes: bool = False):
    def register(function):
        if keeps_codes:
            OPS[name] = function
        else:
            OPS[name] = lambda attributes, *inputs: function(attributes, *map(_value, inputs))
        return function

    return register


@_op("QuantizeLinear")
def _quantize(attributes, x, scale, zero_point):
    limits = torch.iinfo(zero_point.dtype)
    return torch.clamp(torch.round(x / scale) + zero_point, limits.min, limits.max).to(zero_point.dtype)


@_op("DequantizeLinear", keeps_codes=True)
def _dequantize(attributes, codes, scale, zero_point):
    return Codes(codes, scale, zero_point, attributes.get("axis", 1) if scale.dim() else None)


def _moving(name: str):
    """Register an operation that moves values and computes nothing; per-tensor codes stay codes."""

    def register(function):
        def moved(attributes, x, *rest):
            if isinstance(x, Codes) and x.axis is None:
                return Codes(function(attributes, x.codes, *rest), x.scale, x.zero_point, None)
            return function(attributes, _value(x), *rest)

        OPS[name] = moved
        return function

    return register


@_moving("Identity")
def _identity(attributes, x):
    return x


@_moving("Reshape")
def _reshape(attributes, x, shape):
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape.tolist())])


@_moving("Transpose")
def _transpose(attributes, x):
    return x.permute(attributes.get("perm", list(range(x.dim()))[::-1]))


@_moving("Unsqueeze")
def _unsqueeze(attributes, x, axes):
    for axis in sorted(axes.tolist()):
        x = x.unsqueeze(axis)
    return x


@_moving("Squeeze")
def _squeeze(attributes, x, axes=None):
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


@_moving("Slice")
def _slice(attributes, x, starts, ends, axes=None, steps=None):
    axes = range(len(starts)) if axes is None else axes.tolist()
    steps = [1] * len(starts) if steps is None else steps.tolist()
    index = [slice(None)] * x.dim()
    for axis, start, end, step in zip(axes, starts.tolist(), ends.tolist(), steps):
        if step < 1:
            x = x.index_select(axis, torch.tensor(range(x.shape[axis])[start:end:step], device=x.device))
            continue
        size = x.shape[axis]
        first, last = (max(-size, min(bound, size)) for bound in (start, end))
        index[axis] = slice(first, last, step)
    return x[tuple(index)]


@_moving("Expand")
def _expand(attributes, x, shape):
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))


@_op("Gemm", keeps_codes=True)
def _gemm(attributes, a, b, c=None):
    if not (isinstance(a, Codes) and isinstance(b, Codes)):
        a, b = _value(a), _value(b)
        y = (a.T if attributes.get("transA") else a) @ (b.T if attributes.get("transB") else b)
        return y if c is None else y + _value(c)
    weight = b.codes.T if attributes.get("transB") else b.codes
    acc = integer_matmul(a.codes, a.zero_point, weight)
    return _epilogue(acc, a.scale * b.scale, c, 1)


def _epilogue(acc: Tensor, scale: Tensor, bias: Codes | Tensor | None, axis: int) -> Tensor:
    """Add an integer bias, multiply by the scale per channel, and add a float bias."""
    shape = [1] * acc.dim()
    shape[axis] = -1
    if isinstance(bias, Codes):
        acc = acc + bias.codes.reshape(shape)
    y = acc.float() * (scale.reshape(shape) if scale.dim() else scale)
    return y + bias.reshape(shape) if isinstance(bias, Tensor) else y


@_op("MatMul", keeps_codes=True)
def _matmul(attributes, a, b):
    if not (isinstance(a, Codes) and isinstance(b, Codes)):
        return _value(a) @ _value(b)
    if b.codes.dim() == 2 and b.codes.dtype == torch.int8 and not b.zero_point.any():
        acc = integer_matmul(a.codes.reshape(-1, a.codes.shape[-1]), a.zero_point, b.codes)
        return _epilogue(acc.reshape(*a.codes.shape[:-1], -1), a.scale * b.scale, None, -1)
    # Batches of small products run in float64, which is exact for these integers.
    left, right = (x.codes.double() - x.zero_point.double() for x in (a, b))
    return (left @ right).to(torch.int32).float() * (a.scale * b.scale)


@_op("Conv", keeps_codes=True)
def _conv(attributes, x, weight, bias=None):
    axes = len(attributes["kernel_shape"])
    stride, dilation = (attributes.get(name, [1] * axes) for name in ("strides", "dilations"))
    pads, groups = attributes.get("pads", [0] * (2 * axes)), attributes.get("group", 1)
    if isinstance(x, Codes) and isinstance(weight, Codes):
        acc = integer_conv2d(x.codes, x.zero_point, weight.codes, stride, pads, dilation, groups)
        return _epilogue(acc, x.scale * weight.scale, bias, 1)
    sides = [pads[axis + end] for axis in reversed(range(axes)) for end in (0, axes)]  # torch counts from the last axis
    padded, still = F.pad(_value(x), sides), [0] * axes
    return torch.convolution(padded, _value(weight), _value(bias), stride, still, dilation, False, still, groups)


@_op("LayerNormalization")
def _layer_norm(attributes, x, weight, bias=None):
    shape = x.shape[attributes.get("axis", -1) :]
    return F.layer_norm(x, shape, weight.expand(shape), bias, attributes.get("epsilon", 1e-5))


@_op("Gelu")
def _gelu(attributes, x):
    return F.gelu(x, approximate=attributes.get("approximate", b"none").decode())


@_op("Softmax")
def _softmax(attributes, x):
    return x.softmax(attributes.get("axis", -1))


@_op("Clip")
def _clip(attributes, x, low=None, high=None):
    return x.clamp(low, high)


@_op("Cast")
def _cast(attributes, x):
    return x.to(torch.from_numpy(np.empty(0, helper.tensor_dtype_to_np_dtype(attributes["to"]))).dtype)


@_op("CastLike")
def _cast_like(attributes, x, like):
    return x.to(like.dtype)


@_op("Shape")
def _shape(attributes, x):
    return torch.tensor(x.shape[attributes.get("start", 0) : attributes.get("end", x.dim())], dtype=torch.int64)


@_op("Concat")
def _concat(attributes, *parts):
    return torch.cat(parts, attributes["axis"])


@_op("Split")
def _split(attributes, x, sizes=None):
    axis = attributes.get("axis", 0)
    return tuple(x.tensor_split(attributes["num_outputs"], axis) if sizes is None else x.split(sizes.tolist(), axis))


@_op("Pad")
def _pad(attributes, x, pads, value=None, axes=None):
    pads, axes = pads.tolist(), list(range(x.dim())) if axes is None else axes.tolist()
    mode = attributes.get("mode", b"constant").decode()
    if mode != "constant":
        widths = [(0, 0)] * x.dim()
        for i, axis in enumerate(axes):
            widths[axis] = pads[i], pads[i + len(axes)]
        return torch.from_numpy(np.pad(x.cpu().numpy(), widths, mode)).to(x.device)
    sides = [0] * (2 * x.dim())
    for i, axis in enumerate(axes):  # torch counts from the last axis
        position = 2 * (x.dim() - 1 - axis % x.dim())
        sides[position : position + 2] = pads[i], pads[i + len(axes)]
    return F.pad(x, sides, value=0.0 if value is None else float(value))


@_op("Gather")
def _gather(attributes, x, indices):
    axis = attributes.get("axis", 0)
    picked = x.index_select(axis, indices.reshape(-1).to(x.device) % x.shape[axis])
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@_op("GatherND")
def _gather_nd(attributes, x, indices):
    if attributes.get("batch_dims", 0):
        raise Qwt2Error("torch_int8 has no GatherND with batch_dims; run this file on another engine")
    return x[tuple(indices.to(x.device).unbind(-1))]


@_op("ReduceMean")
def _reduce_mean(attributes, x, axes=None):
    keep = bool(attributes.get("keepdims", 1))
    return x.mean(dim=None if axes is None else axes.tolist(), keepdim=keep)


@_op("MaxPool")
def _max_pool(attributes, x):
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    padded = F.pad(x, (left, right, top, bottom), value=float("-inf"))
    stride, dilation = (attributes.get(name, [1, 1]) for name in ("strides", "dilations"))
    return F.max_pool2d(padded, attributes["kernel_shape"], stride, 0, dilation, bool(attributes.get("ceil_mode", 0)))


@_op("GlobalAveragePool")
def _global_average_pool(attributes, x):
    return x.mean((2, 3), keepdim=True)


@_op("Flatten")
def _flatten(attributes, x):
    axis = attributes.get("axis", 1)
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


def _elementwise(name: str, function: Callable[..., Tensor]) -> None:
    OPS[name] = lambda attributes, *inputs: function(*map(_value, inputs))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def _all(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: functools.reduce(function, inputs)


_ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "Max": _all(torch.maximum), "Min": _all(torch.minimum),
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": _divide, "Pow": torch.pow,
    "Mod": torch.remainder, "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh,
    "Erf": torch.erf, "Sqrt": torch.sqrt, "HardSwish": F.hardswish, "HardSigmoid": F.hardsigmoid,
    "Not": torch.logical_not, "Where": torch.where, "Equal": torch.eq, "Less": torch.lt,
}  # fmt: skip
for _name, _function in _ELEMENTWISE.items():
    _elementwise(_name, _function)
