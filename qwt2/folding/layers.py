"""Integer modules, which :func:`qwt2.fold` creates and engines run.

Weights are int8 codes, and biases are int32 codes of scale s_x * s_w. Activations pass through quantize-dequantize
pairs. In PyTorch, the modules compute the same as an integer engine up to rounding in float32. On export,
:func:`onnx_operators` turns the two custom operators into ONNX's QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwt2.compensation.blocks import LinearCompensation
from qwt2.quantization.layers import (
    QuantizedAdd,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedMatmul,
    QuantizedPooling,
)
from qwt2.quantization.quantizers import Quantizer, UniformQuantizer


@torch.library.custom_op("qwt2::quantize_dequantize", mutates_args=())
def quantize_dequantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    lowest: Tensor | None,
    highest: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
) -> Tensor:
    """Round ``x`` to 8-bit codes and back.

    Args:
        x: float32, any shape.
        scale: float32, ().
        zero_point: uint8 or int8, (); codes have the same type.
        lowest, highest: lowest and highest code, same type and shape as ``zero_point``. Codes of fewer than 8 bits are
            8-bit codes that are clipped to these. ``None`` if all 256 codes are used; saturation then clips them.
        low, high: float32, (). If given, ``x`` is only clipped to them, as in an engine that skips the rounding of this
            pair. :func:`qwt2.onnx.passes.quantizers.fuse_additions` decides how the file represents such a pair.

    Returns:
        float32, same shape as ``x``.
    """
    if low is not None:
        return torch.clamp(x, low, high)
    info = torch.iinfo(zero_point.dtype)
    zero = zero_point.to(x.dtype)
    ends = (info.min, info.max) if lowest is None or highest is None else (lowest.to(x.dtype), highest.to(x.dtype))
    codes = torch.clamp(torch.round(x / scale) + zero, *ends)
    return (codes - zero) * scale


@quantize_dequantize.register_fake
def _(x, scale, zero_point, lowest, highest, low, high):
    return torch.empty_like(x)


@torch.library.custom_op("qwt2::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Return (codes - zero_point) * scale in float32, with one scale and zero point per entry of ``axis``.

    ONNX Runtime only selects its integer kernels if the zero point is given explicitly, even if it is zero.
    """
    shape = [1] * codes.dim()
    shape[axis] = -1
    return (codes - zero_point.reshape(shape)).to(scale.dtype) * scale.reshape(shape)


@dequantize.register_fake
def _(codes, scale, zero_point, axis):
    return torch.empty_like(codes, dtype=scale.dtype)


def onnx_operators() -> dict[Callable, Callable]:
    """Map the two operators to their ONNX form, as ``custom_translation_table`` of ``torch.onnx.export`` takes it."""
    from onnxscript import opset20 as op

    def quantize_dequantize_onnx(x, scale, zero_point, lowest, highest, low, high):
        values = x if low is None else op.Clip(x, low, high)
        codes = op.QuantizeLinear(values, scale, zero_point)
        if lowest is not None:
            codes = op.Clip(codes, lowest, highest)
        return op.DequantizeLinear(codes, scale, zero_point)

    def dequantize_onnx(codes, scale, zero_point, axis: int):
        return op.DequantizeLinear(codes, scale, zero_point, axis=axis)

    return {
        torch.ops.qwt2.quantize_dequantize.default: quantize_dequantize_onnx,
        torch.ops.qwt2.dequantize.default: dequantize_onnx,
    }


class QuantizeDequantize(nn.Module):
    """An activation quantizer with one scale, on 8-bit codes."""

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        assert isinstance(quantizer, UniformQuantizer)  # fold() refuses all others
        grid, self.rounds = quantizer.grid, quantizer.rounds
        scale, zero_point = quantizer.scale.clone(), quantizer.zero_point
        self.register_buffer("scale", scale)
        if grid.bits == 8 and (grid.symmetric or (grid.centred and int(zero_point) == grid.middle)):
            # Signed codes represent the same values, and integer kernels need not correct for a zero point.
            self.register_buffer("zero_point", torch.zeros_like(zero_point, dtype=torch.int8))
        else:
            # ONNX Runtime only runs a layer in integers if its input and output codes have the same type. It converts
            # the type of pairs without a Clip by itself, but not that of other pairs, so all of these use uint8.
            self.register_buffer("zero_point", (zero_point - grid.qmin).round().to(torch.uint8))
        ends = (0, grid.qmax - grid.qmin) if grid.bits < 8 else (None, None)
        for name, code in zip(("lowest", "highest"), ends):
            self.register_buffer(name, None if code is None else torch.full_like(self.zero_point, code))
        for name, code in (("low", grid.qmin), ("high", grid.qmax)):
            self.register_buffer(name, None if self.rounds else (code - zero_point) * scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to the grid, or only clipped to its range."""
        return quantize_dequantize(x, self.scale, self.zero_point, self.lowest, self.highest, self.low, self.high)


class IntegerLayer(nn.Module):
    """Base of the integer Linear and Conv2d, with alpha and beta folded into the stored scales and biases in float64.

    Args:
        layer: the quantized layer.
    """

    def __init__(self, layer: QuantizedLayer):
        super().__init__()
        bias = torch.zeros(layer.out_channels, dtype=torch.float64, device=layer.weight.device)
        if layer.bias is not None:
            bias = layer.bias.double()
        if layer.alpha is not None and layer.beta is not None:
            bias = layer.alpha.double() * bias + layer.beta.double()
        scales = layer.integer_scales(layer.alpha, bias)
        self.input = QuantizeDequantize(layer.input_quantizer)
        self.register_buffer("weight", self.stored(scales.codes(layer.weight_codes)))
        self.register_buffer("weight_scale", scales.scale)
        self.register_buffer("weight_zero_point", torch.zeros_like(scales.scale, dtype=torch.int8))
        self.register_buffer("bias", scales.bias_codes(bias))
        self.register_buffer("bias_scale", self.input.scale * scales.scale)
        self.register_buffer("bias_zero_point", torch.zeros_like(self.bias))
        output = layer.output_quantizer
        self.output = nn.Identity() if output is None else QuantizeDequantize(output)

    def stored(self, codes: Tensor) -> Tensor:
        """Return weight codes (C_out, ...) in the layout that :meth:`forward` uses."""
        return codes


class IntegerLinear(IntegerLayer):
    """An integer Linear; its weight is stored as (C_in, C_out) for a plain matrix product."""

    def stored(self, codes: Tensor) -> Tensor:
        """See :meth:`IntegerLayer.stored`."""
        return codes.t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output (..., C_out) for a float input (..., C_in)."""
        weight = dequantize(self.weight, self.weight_scale, self.weight_zero_point, 1)
        bias = dequantize(self.bias, self.bias_scale, self.bias_zero_point, 0)
        # Engines only fuse the integer bias into a two-dimensional product.
        y = torch.addmm(bias, self.input(x).reshape(-1, self.weight.shape[0]), weight)
        return self.output(y.reshape(*x.shape[:-1], self.weight.shape[1]))


class IntegerConv2d(IntegerLayer):
    """An integer Conv2d."""

    def __init__(self, layer: QuantizedConv2d):
        super().__init__(layer)
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output (N, C_out, H', W') for a float input (N, C_in, H, W)."""
        weight = dequantize(self.weight, self.weight_scale, self.weight_zero_point, 0)
        bias = dequantize(self.bias, self.bias_scale, self.bias_zero_point, 0)
        y = F.conv2d(self.input(x), weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return self.output(y)


class IntegerMatmul(nn.Module):
    """The product of two quantized activations."""

    def __init__(self, matmul: QuantizedMatmul):
        super().__init__()
        self.a, self.b = QuantizeDequantize(matmul.a_quantizer), QuantizeDequantize(matmul.b_quantizer)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product of the operands, each rounded to its grid."""
        return self.a(a) @ self.b(b)


class IntegerAdd(nn.Module):
    """The sum of two quantized activations."""

    def __init__(self, addition: QuantizedAdd):
        super().__init__()
        operands = (addition.a_quantizer, addition.b_quantizer)
        self.a, self.b = (
            nn.Identity() if quantizer is None else QuantizeDequantize(quantizer) for quantizer in operands
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the sum of the operands, each rounded to its grid if it has a quantizer."""
        return self.a(a) + self.b(b)


class IntegerPooling(nn.Module):
    """A pooling of quantized activations."""

    def __init__(self, pooling: QuantizedPooling):
        super().__init__()
        self.input, self.pooling = QuantizeDequantize(pooling.input_quantizer), pooling.pooling

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled values of the input rounded to its grid."""
        return self.pooling(self.input(x))


class WidenedCompensation(nn.Module):
    """QwT's layer behind a block, computed in float32 from weights in their stored precision.

    CPU engines do not have half-precision kernels; in the file, the weights still take two bytes each.
    """

    def __init__(self, compensation: LinearCompensation):
        super().__init__()
        self.stride, self.groups = compensation.stride, compensation.groups
        self.register_buffer("weight", compensation.weight)
        self.register_buffer("bias", compensation.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the block's output ``y`` plus a linear function of its input ``x``."""
        weight = self.weight.to(x.dtype)
        if weight.dim() == 2:
            return y + F.linear(x, weight, self.bias)
        return y + F.conv2d(x, weight, self.bias, self.stride, weight.shape[-1] // 2, 1, self.groups)
