"""Quantized modules: a float layer together with its fake-quantizers and its compensation."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwt2.quantization.quantizers import Quantizer


class QuantizedModule(nn.Module):
    """Base of everything that :func:`qwt2.quantize` puts in place of a float operation.

    Attributes:
        quantized: False makes the module compute in full precision, uncompensated.
    """

    def __init__(self):
        super().__init__()
        self.quantized = True

    def quantizers(self) -> dict[str, Quantizer]:
        """Quantizers by their role."""
        return {name: child for name, child in self.named_children() if isinstance(child, Quantizer)}


class QuantizedLayer(QuantizedModule):
    """A Linear or Conv2d whose input and weight are fake-quantized.

    y = alpha * (op(Q(x), Q(weight)) + bias) + beta, with alpha = 1 and beta = 0 until
    :func:`qwt2.compensate` sets them (QwT-v2, arXiv 2505.20932: channel-wise affine compensation
    after the module).

    Args:
        layer: the float layer; its parameters are taken over, not copied.
        input_quantizer, weight_quantizer: fake-quantizers.
        output_quantizer: for engines whose integer kernel also needs a quantized output.
        integer_bias: round alpha * bias + beta to the grid on which integer engines add it
            (:func:`bias_grid`), so that the simulation sees what they see.

    Attributes:
        alpha, beta: float32, shape (C_out,), or ``None``.
    """

    channel_axis: int

    def __init__(
        self,
        layer: nn.Module,
        input_quantizer: Quantizer,
        weight_quantizer: Quantizer,
        output_quantizer: Quantizer | None = None,
        integer_bias: bool = False,
    ):
        super().__init__()
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)  # registered also where it is None
        self.input_quantizer = input_quantizer
        self.weight_quantizer = weight_quantizer
        self.output_quantizer = output_quantizer
        self.integer_bias = integer_bias
        self.register_buffer("alpha", None)
        self.register_buffer("beta", None)

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's linear operation."""
        raise NotImplementedError

    def full_precision(self, x: Tensor) -> Tensor:
        """The float layer's output."""
        return self.op(x, self.weight, self.bias)

    def uncompensated(self, x: Tensor) -> Tensor:
        """The quantized layer's output before compensation: what a compensation is fitted on."""
        return self.with_bias(self.products(x))

    def products(self, x: Tensor) -> Tensor:
        """op(Q(x), Q(weight)), which no compensation changes."""
        return self.op(self.input_quantizer(x), self.weight_quantizer(self.weight), None)

    def finished(self, products: Tensor) -> Tensor:
        """The layer's output from its :meth:`products`, which are overwritten."""
        y = self.with_bias(products, self.alpha, self.beta)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def with_bias(self, y: Tensor, alpha: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
        """alpha * (products + bias) + beta, in place of the products ``y``."""
        bias = self.bias
        if alpha is not None:
            y = y.mul_(self._per_channel(alpha, y))
            bias = beta if bias is None else alpha * bias + beta
        if bias is None:
            return y
        # While RepQ-ViT calibrates, inputs have a scale a channel and no integer grid exists yet.
        if self.integer_bias and self.input_quantizer.channel_axis is None:
            grid = bias_grid(self, alpha, bias).to(y)
            bias = torch.round(bias / grid) * grid
        return y.add_(self._per_channel(bias, y))

    def calibrate(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Calibrate the activation quantizers on the inputs and outputs of several runs, instead of on the first."""
        self.input_quantizer.calibrate(_together(inputs, self.channel_axis))
        if self.output_quantizer is not None:
            self.output_quantizer.calibrate(_together(outputs, self.channel_axis))

    def _per_channel(self, values: Tensor, output: Tensor) -> Tensor:
        """Shape ``values`` (C_out,) to broadcast against an output of this layer."""
        shape = [1] * output.dim()
        shape[self.channel_axis] = -1
        return values.reshape(shape)

    def set_compensation(self, alpha: Tensor | None, beta: Tensor | None) -> None:
        """Set alpha and beta, float32 (C_out,); ``None`` removes them."""
        self.alpha = None if alpha is None else alpha.to(self.weight)
        self.beta = None if beta is None else beta.to(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantized:
            return self.full_precision(x)
        return self.finished(self.products(x))


class QuantizedLinear(QuantizedLayer):
    """Quantized ``nn.Linear``; input (..., C_in), output (..., C_out)."""

    channel_axis = -1

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class QuantizedConv2d(QuantizedLayer):
    """Quantized ``nn.Conv2d``; input (N, C_in, H, W), output (N, C_out, H', W')."""

    channel_axis = 1

    def __init__(self, layer: nn.Conv2d, *args, **kwargs):
        super().__init__(layer, *args, **kwargs)
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class QuantizedMatmul(QuantizedModule):
    """a @ b with both operands fake-quantized: the products inside attention."""

    def __init__(self, a_quantizer: Quantizer, b_quantizer: Quantizer):
        super().__init__()
        self.a_quantizer, self.b_quantizer = a_quantizer, b_quantizer

    def calibrate(self, a: Sequence[Tensor], b: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Calibrate the operands' quantizers on several runs, instead of on the first."""
        self.a_quantizer.calibrate(_together(a, -1))
        self.b_quantizer.calibrate(_together(b, -1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.quantized:
            return a @ b
        return self.a_quantizer(a) @ self.b_quantizer(b)


class QuantizedAdd(QuantizedModule):
    """a + b with operands fake-quantized: a residual addition as engines with integer additions compute it.

    An operand without quantizer is the output of a layer that has an output quantizer; one whose quantizer only clips is
    the output of a layer in whose kernel the sum is computed.
    """

    def __init__(self, a_quantizer: Quantizer | None, b_quantizer: Quantizer | None):
        super().__init__()
        self.a_quantizer, self.b_quantizer = a_quantizer, b_quantizer

    def calibrate(self, a: Sequence[Tensor], b: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Calibrate the operands' quantizers on several runs, instead of on the first."""
        for name, runs in (("a_quantizer", a), ("b_quantizer", b)):
            if name in self.quantizers():
                self.quantizers()[name].calibrate(_together(runs, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.quantized:
            a = a if self.a_quantizer is None else self.a_quantizer(a)
            b = b if self.b_quantizer is None else self.b_quantizer(b)
        return a + b


class QuantizedPooling(QuantizedModule):
    """A pooling of fake-quantized values."""

    def __init__(self, pooling: nn.Module, input_quantizer: Quantizer):
        super().__init__()
        self.pooling, self.input_quantizer = pooling, input_quantizer

    def calibrate(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Calibrate the input's quantizer on several runs, instead of on the first."""
        self.input_quantizer.calibrate(_together(inputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.pooling(self.input_quantizer(x) if self.quantized else x)


def _together(runs: Sequence[Tensor], axis: int) -> Tensor:
    """The values of several runs as (values, channels) where their channels agree, else in one row."""
    widths = {x.shape[axis] for x in runs}
    return torch.cat([x.movedim(axis, -1).reshape(-1, *([x.shape[axis]] if len(widths) == 1 else [])) for x in runs])


class CompensatedBlock(QuantizedModule):
    """A block with QwT's linear compensation beside it: y = block(x) + W x + b (arXiv 2411.13918).

    Args:
        block: the quantized block.
        weight: (C_out, C_in) for token inputs (last axis is channels) or
            (C_out, C_in / groups, k, k) for images.
        bias: (C_out,).
        stride, groups: of the convolution.
        dtype: torch.float16 or torch.float32, of the stored weight.
        arithmetic: what it multiplies in. torch.float16 does as the paper's code (half result
            widened, float32 bias added); CPU engines have no such kernels and need torch.float32.
    """

    def __init__(self, block: nn.Module, weight: Tensor, bias: Tensor, stride=1, groups: int = 1,
                 dtype: torch.dtype = torch.float16, arithmetic: torch.dtype = torch.float32):  # fmt: skip
        super().__init__()
        self.block, self.arithmetic = block, arithmetic
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("bias", bias.float())
        self.stride, self.groups = stride, groups

    def compensation(self, x: Tensor) -> Tensor:
        """The added term, (..., C_out) or (N, C_out, H', W')."""
        x, weight = x.to(self.arithmetic), self.weight.to(self.arithmetic)
        if weight.dim() == 2:
            return F.linear(x, weight).float() + self.bias
        padding = weight.shape[-1] // 2
        y = F.conv2d(x, weight, None, self.stride, padding, 1, self.groups)
        return y.float() + self.bias.reshape(1, -1, 1, 1)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if not self.quantized:
            return self.block(x, *args, **kwargs)
        added = self.compensation(x)  # before the block, which may overwrite its input
        return self.block(x, *args, **kwargs) + added


class AffineBlock(QuantizedModule):
    """A block with an affine map per channel of its output: y = alpha * block(x) + beta.

    Args:
        block: the quantized block.
        alpha, beta: (C,).
        channel_axis: the output's channel axis.
    """

    def __init__(self, block: nn.Module, alpha: Tensor, beta: Tensor, channel_axis: int):
        super().__init__()
        self.block, self.channel_axis = block, channel_axis
        self.register_buffer("alpha", alpha)
        self.register_buffer("beta", beta)

    def forward(self, *args, **kwargs) -> Tensor:
        y = self.block(*args, **kwargs)
        if not self.quantized:
            return y
        shape = [1] * y.dim()
        shape[self.channel_axis] = -1
        return y * self.alpha.reshape(shape) + self.beta.reshape(shape)


# An int32 accumulator holds the bias and the products; half of its range for either is far more
# than a layer with 60,000 inputs needs.
BIAS_LIMIT = 2**30


def free_bits(bits: int) -> int:
    """How far weight codes of ``bits`` bits may be shifted left inside int8, one bit kept for a sign flip.

    The products stay exactly what they were if the scale is divided by the same power of two, but
    the bias, which engines add on the grid s_x * s_w, gets a grid as fine as at 8 bits.
    """
    return max(0, 7 - bits)


def bias_grid(layer: QuantizedLayer, alpha: Tensor | None, bias: Tensor) -> Tensor:
    """The grid on which an integer engine adds the bias: s_x * |alpha| * s_w, float64 (C_out,).

    Coarser where ``bias`` would leave int32 (tiny alpha, huge beta).
    """
    weight_scale = layer.weight_quantizer.scale.double() / 2 ** free_bits(layer.weight_quantizer.grid.bits)
    grid = layer.input_quantizer.scale.double() * weight_scale.expand(layer.out_channels)
    if alpha is not None:
        grid = grid * alpha.double().abs()
    smallest = torch.finfo(torch.float32).tiny
    return torch.maximum(grid, bias.double().abs() / BIAS_LIMIT).clamp(min=smallest)


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Make ``model`` compute without quantization and compensation inside the ``with`` block."""
    modules = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    states = [m.quantized for m in modules]
    for module in modules:
        module.quantized = False
    try:
        yield
    finally:
        for module, state in zip(modules, states):
            module.quantized = state
