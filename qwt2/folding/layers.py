"""Integer modules: what :func:`qwt2.fold` makes and engines run.

Weights are int8 codes and biases int32 codes of scale s_x * s_w; activations pass through
quantize-dequantize pairs. In PyTorch the modules compute what an integer engine computes, up to
the rounding of float32; exported, the two custom operators below become ONNX's QuantizeLinear and
DequantizeLinear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwt2.compensation.blocks import LinearCompensation
from qwt2.quantization.layers import (
    QuantizedAdd,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
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
        zero_point: uint8 or int8, (); its type is the type of the codes.
        lowest, highest: as the zero point; codes of fewer bits are 8-bit codes that are clipped to these. ``None``: all
            256 codes are in use, and the saturation of their type is the clipping.
        low, high: float32, (). With these, it gives what an engine gives that leaves out the rounding of this pair:
            ``x``, clipped. :func:`qwt2.onnx.passes.quantizers.fuse_additions` decides what the exported file has in its
            place.
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
    """(codes - zero_point) * scale, both with one value per entry of ``axis``; float32.

    ONNX Runtime's integer kernels are only chosen where the zero point, though zero, is spelled out.
    """
    shape = [1] * codes.dim()
    shape[axis] = -1
    return (codes - zero_point.reshape(shape)).to(scale.dtype) * scale.reshape(shape)


@dequantize.register_fake
def _(codes, scale, zero_point, axis):
    return torch.empty_like(codes, dtype=scale.dtype)


class QuantizeDequantize(nn.Module):
    """An activation quantizer with one scale, on 8-bit codes."""

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        assert isinstance(quantizer, UniformQuantizer)  # folding refuses others
        grid, self.rounds = quantizer.grid, quantizer.rounds
        scale, zero_point = quantizer.scale.clone(), quantizer.zero_point
        self.register_buffer("scale", scale)
        if grid.bits == 8 and (grid.symmetric or (grid.centred and int(zero_point) == grid.middle)):
            # The same values as with unsigned codes and a zero point, which integer kernels would have to correct for.
            self.register_buffer("zero_point", torch.zeros_like(zero_point, dtype=torch.int8))
        else:
            # ONNX Runtime runs a layer in integers whose output has codes of the type of its input's. Of pairs that
            # clip nothing it changes the type itself, of others not, so all of these have one.
            self.register_buffer("zero_point", (zero_point - grid.qmin).round().to(torch.uint8))
        ends = (0, grid.qmax - grid.qmin) if grid.bits < 8 else (None, None)
        for name, code in zip(("lowest", "highest"), ends):
            self.register_buffer(name, None if code is None else torch.full_like(self.zero_point, code))
        for name, code in (("low", grid.qmin), ("high", grid.qmax)):
            self.register_buffer(name, None if self.rounds else (code - zero_point) * scale)

    def forward(self, x: Tensor) -> Tensor:
        """The values, rounded to the grid or only clipped to its range."""
        return quantize_dequantize(x, self.scale, self.zero_point, self.lowest, self.highest, self.low, self.high)


class IntegerLayer(nn.Module):
    """Base of the integer Linear and Conv2d.

    Args:
        layer: the quantized layer whose quantizers it takes over.
        codes: int8 weight codes, in the layout that :meth:`forward` multiplies with.
        weight_scale: float32, (C_out,).
        bias_codes: int32, (C_out,), of scale input scale * weight_scale.
    """

    def __init__(self, layer: QuantizedLayer, codes: Tensor, weight_scale: Tensor, bias_codes: Tensor):
        super().__init__()
        self.input = QuantizeDequantize(layer.input_quantizer)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("weight_zero_point", torch.zeros_like(weight_scale, dtype=torch.int8))
        self.register_buffer("bias", bias_codes)
        self.register_buffer("bias_scale", self.input.scale * weight_scale)
        self.register_buffer("bias_zero_point", torch.zeros_like(bias_codes))
        output = layer.output_quantizer
        self.output = nn.Identity() if output is None else QuantizeDequantize(output)


class IntegerLinear(IntegerLayer):
    """Integer Linear; the weight is stored as (C_in, C_out), ready for a plain matrix product."""

    def __init__(self, layer: QuantizedLinear, codes: Tensor, weight_scale: Tensor, bias_codes: Tensor):
        super().__init__(layer, codes.t().contiguous(), weight_scale, bias_codes)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output (..., C_out), from its float input (..., C_in)."""
        weight = dequantize(self.weight, self.weight_scale, self.weight_zero_point, 1)
        bias = dequantize(self.bias, self.bias_scale, self.bias_zero_point, 0)
        # Engines fuse the integer bias into a two-dimensional product only.
        y = torch.addmm(bias, self.input(x).reshape(-1, self.weight.shape[0]), weight)
        return self.output(y.reshape(*x.shape[:-1], self.weight.shape[1]))


class IntegerConv2d(IntegerLayer):
    """Integer Conv2d."""

    def __init__(self, layer: QuantizedConv2d, codes: Tensor, weight_scale: Tensor, bias_codes: Tensor):
        super().__init__(layer, codes, weight_scale, bias_codes)
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output (N, C_out, H', W'), from its float input (N, C_in, H, W)."""
        weight = dequantize(self.weight, self.weight_scale, self.weight_zero_point, 0)
        bias = dequantize(self.bias, self.bias_scale, self.bias_zero_point, 0)
        y = F.conv2d(self.input(x), weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return self.output(y)


class IntegerMatmul(nn.Module):
    """Product of two quantized activations."""

    def __init__(self, matmul: QuantizedMatmul):
        super().__init__()
        self.a, self.b = QuantizeDequantize(matmul.a_quantizer), QuantizeDequantize(matmul.b_quantizer)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of the two operands, each rounded to its grid."""
        return self.a(a) @ self.b(b)


class IntegerAdd(nn.Module):
    """Sum of two quantized activations."""

    def __init__(self, addition: QuantizedAdd):
        super().__init__()
        operands = (addition.a_quantizer, addition.b_quantizer)
        self.a, self.b = (
            nn.Identity() if quantizer is None else QuantizeDequantize(quantizer) for quantizer in operands
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of the two operands, rounded to their grids where they have quantizers."""
        return self.a(a) + self.b(b)


class IntegerPooling(nn.Module):
    """A pooling of quantized activations."""

    def __init__(self, pooling: QuantizedPooling):
        super().__init__()
        self.input, self.pooling = QuantizeDequantize(pooling.input_quantizer), pooling.pooling

    def forward(self, x: Tensor) -> Tensor:
        """The pooled values, of the input rounded to its grid."""
        return self.pooling(self.input(x))


class WidenedCompensation(nn.Module):
    """QwT's layer behind a block, computed in float32 from weights of their stored precision.

    CPU engines have no half-precision kernels; the weights keep their two bytes in the file.
    """

    def __init__(self, compensation: LinearCompensation):
        super().__init__()
        self.stride, self.groups = compensation.stride, compensation.groups
        self.register_buffer("weight", compensation.weight)
        self.register_buffer("bias", compensation.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The block's output ``y``, compensated by a linear function of its input ``x``."""
        weight = self.weight.to(x.dtype)
        if weight.dim() == 2:
            return y + F.linear(x, weight, self.bias)
        return y + F.conv2d(x, weight, self.bias, self.stride, weight.shape[-1] // 2, 1, self.groups)
