"""Quantized modules: a float layer together with its fake-quantizers and its compensation."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwt2.quantizers import Quantizer


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

    y = alpha * op(Q(x), Q(weight)) + beta, with alpha = 1 and beta = 0 until :func:`qwt2.compensate`
    sets them (QwT-v2, arXiv 2505.20932: channel-wise affine compensation after the module).

    Args:
        layer: the float layer; its parameters are taken over, not copied.
        input_quantizer, weight_quantizer: fake-quantizers.
        output_quantizer: for engines whose integer kernel also needs a quantized output.

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
    ):
        super().__init__()
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)  # registered also where it is None
        self.input_quantizer = input_quantizer
        self.weight_quantizer = weight_quantizer
        self.output_quantizer = output_quantizer
        self.register_buffer("alpha", None)
        self.register_buffer("beta", None)

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's linear operation, bias included."""
        raise NotImplementedError

    def per_channel(self, values: Tensor, output: Tensor) -> Tensor:
        """Shape ``values`` (C_out,) to broadcast against an output of this layer."""
        shape = [1] * output.dim()
        shape[self.channel_axis] = -1
        return values.reshape(shape)

    def uncompensated(self, x: Tensor) -> Tensor:
        """op(Q(x), Q(weight)): what a compensation is fitted on."""
        return self.op(self.input_quantizer(x), self.weight_quantizer(self.weight))

    def compensated(self, y: Tensor) -> Tensor:
        if self.alpha is None:
            return y
        return y * self.per_channel(self.alpha, y) + self.per_channel(self.beta, y)

    def set_compensation(self, alpha: Tensor | None, beta: Tensor | None) -> None:
        """Set alpha and beta, float32 (C_out,); ``None`` removes them."""
        self.alpha = None if alpha is None else alpha.to(self.weight)
        self.beta = None if beta is None else beta.to(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantized:
            return self.op(x, self.weight)
        y = self.compensated(self.uncompensated(x))
        return y if self.output_quantizer is None else self.output_quantizer(y)


class QuantizedLinear(QuantizedLayer):
    """Quantized ``nn.Linear``; input (..., C_in), output (..., C_out)."""

    channel_axis = -1

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class QuantizedConv2d(QuantizedLayer):
    """Quantized ``nn.Conv2d``; input (N, C_in, H, W), output (N, C_out, H', W')."""

    channel_axis = 1

    def __init__(self, layer: nn.Conv2d, *args, **kwargs):
        super().__init__(layer, *args, **kwargs)
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class QuantizedMatmul(QuantizedModule):
    """a @ b with both operands fake-quantized: the products inside attention."""

    def __init__(self, a_quantizer: Quantizer, b_quantizer: Quantizer):
        super().__init__()
        self.a_quantizer, self.b_quantizer = a_quantizer, b_quantizer

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.quantized:
            return a @ b
        return self.a_quantizer(a) @ self.b_quantizer(b)


class CompensatedBlock(QuantizedModule):
    """A block with QwT's linear compensation beside it: y = block(x) + W x + b (arXiv 2411.13918).

    Args:
        block: the quantized block.
        weight: (C_out, C_in) for token inputs (last axis is channels) or
            (C_out, C_in / groups, k, k) for images.
        bias: (C_out,).
        stride, groups: of the convolution.
        dtype: torch.float16 stores and multiplies in half precision as the paper does (half result
            widened, float32 bias added); torch.float32 computes throughout in float32.
    """

    def __init__(self, block: nn.Module, weight: Tensor, bias: Tensor, stride=1, groups: int = 1,
                 dtype: torch.dtype = torch.float16):  # fmt: skip
        super().__init__()
        self.block = block
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("bias", bias.float())
        self.stride, self.groups = stride, groups

    def compensation(self, x: Tensor) -> Tensor:
        """The added term, (..., C_out) or (N, C_out, H', W')."""
        x = x.to(self.weight.dtype)
        if self.weight.dim() == 2:
            return F.linear(x, self.weight).float() + self.bias
        padding = self.weight.shape[-1] // 2
        y = F.conv2d(x, self.weight, None, self.stride, padding, 1, self.groups)
        return y.float() + self.bias.reshape(1, -1, 1, 1)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = self.block(x, *args, **kwargs)
        if not self.quantized:
            return y
        return y + self.compensation(x)


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
