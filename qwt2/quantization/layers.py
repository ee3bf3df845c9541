"""Quantized modules: a float layer together with its fake-quantizers and its compensation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwt2.quantization.integer_rule import ChannelScales, channel_scales
from qwt2.quantization.quantizers import Quantizer


class QuantizedModule(nn.Module):
    """Base of all modules that :func:`qwt2.quantize` puts in place of float operations.

    Attributes:
        quantized: False makes the module compute in full precision, without compensation.
    """

    def __init__(self):
        super().__init__()
        self.quantized = True

    def full_precision(self, *args: Tensor) -> Tensor:
        """Return the output of the float operation."""
        raise NotImplementedError

    def calibrate(self, *runs: Sequence[Tensor]) -> None:
        """Choose the ranges of activations from the values of several runs.

        Args:
            runs: one sequence of tensors per argument, followed by the sequence of outputs.
        """
        raise NotImplementedError

    def calibrate_on(self, *args: Tensor) -> Tensor:
        """Choose the ranges from one run, and return the output of the quantized module."""
        self.calibrate(*([x] for x in args), [])
        return self(*args)

    def calibrate_inputs(self, *runs: Sequence[Tensor]) -> None:
        """Choose only the ranges of the arguments, from one sequence of tensors per argument."""
        self.calibrate(*runs, [])

    def activation_quantizers(self) -> list[Quantizer]:
        """Return all quantizers but that of a weight."""
        return [quantizer for name, quantizer in self.quantizers().items() if name != "weight_quantizer"]

    def quantizers(self) -> dict[str, Quantizer]:
        """Return the quantizers by attribute name."""
        return {name: child for name, child in self.named_children() if isinstance(child, Quantizer)}


class QuantizedLayer(QuantizedModule):
    """A Linear or Conv2d whose input and weight are fake-quantized.

    y = alpha * (op(Q(x), Q(weight)) + bias) + beta, with alpha = 1 and beta = 0 until :func:`qwt2.compensate` sets them
    (QwT-v2, arXiv 2505.20932: channel-wise affine compensation after the module).

    Args:
        layer: the float layer; its parameters are used directly, not copied.
        input_quantizer, weight_quantizer: fake-quantizers.
        output_quantizer: for engines whose integer kernel also needs a quantized output.
        integer_bias: round alpha * bias + beta to the grid on which integer engines add it
            (:mod:`qwt2.quantization.integer_rule`), so that the simulation matches the engines.

    Attributes:
        alpha, beta: compensation, float32 (C_out,), or ``None``.
        codes: weight codes, int8 (C_out, ...) (uint8 on affine grids), from a method that does not round the weight to
            the nearest codes; ``None`` rounds it.
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
        self.register_parameter("bias", layer.bias)  # registered even if it is None
        self.input_quantizer = input_quantizer
        self.weight_quantizer = weight_quantizer
        self.output_quantizer = output_quantizer
        self.integer_bias = integer_bias
        self.register_buffer("alpha", None)
        self.register_buffer("beta", None)
        self.register_buffer("codes", None)

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
        return self.weight.shape[0]

    @property
    def weight_codes(self) -> Tensor:
        """The codes of the weight, int32 (C_out, ...)."""
        return self.weight_quantizer.codes(self.weight) if self.codes is None else self.codes.to(torch.int32)

    @property
    def quantized_weight(self) -> Tensor:
        """The weight that the codes stand for, float32 (C_out, ...)."""
        return self.weight_quantizer(self.weight) if self.codes is None else self.weight_quantizer.values(self.codes)

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer's linear operation."""
        raise NotImplementedError

    def full_precision(self, x: Tensor) -> Tensor:
        """Return the float layer's output."""
        return self.op(x, self.weight, self.bias)

    def products(self, x: Tensor) -> Tensor:
        """Return op(Q(x), Q(weight)), which does not depend on alpha and beta."""
        return self.op(self.input_quantizer(x), self.quantized_weight, None)

    def finished(self, products: Tensor) -> Tensor:
        """Return the layer's output from its :meth:`products`, which are overwritten."""
        y = self.with_bias(products, self.alpha, self.beta)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def with_bias(self, y: Tensor, alpha: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
        """Return alpha * (y + bias) + beta, computed in place on the products ``y``."""
        bias = self.bias
        if alpha is not None:
            y = y.mul_(per_channel(alpha, y, self.channel_axis))
            bias = beta if bias is None else alpha * bias + beta
        if bias is None:
            return y
        # During RepQ-ViT's calibration, inputs have one scale per channel, so there is no integer grid yet.
        if self.integer_bias and self.input_quantizer.channel_axis is None:
            bias = self.integer_scales(alpha, bias).rounded(bias)
        return y.add_(per_channel(bias, y, self.channel_axis))

    def without_bias(self, y: Tensor) -> Tensor:
        """Return an output of the float layer without its bias."""
        return y if self.bias is None else y - per_channel(self.bias, y, self.channel_axis)

    def set_codes(self, codes: Tensor | None) -> None:
        """Set the weight's codes, (C_out, ...); ``None`` rounds the weight to the nearest codes again."""
        kind = torch.int8 if self.weight_quantizer.grid.symmetric else torch.uint8
        self.codes = None if codes is None else codes.to(kind).contiguous()

    def calibrate(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Choose all ranges; without ``outputs``, the output's range comes from the quantized layer itself."""
        self.input_quantizer.calibrate(_together(inputs, self.channel_axis))
        self.weight_quantizer.calibrate(self.weight)
        if self.output_quantizer is not None:
            outputs = outputs or [self.with_bias(self.products(x)) for x in inputs]
            self.output_quantizer.calibrate(_together(outputs, self.channel_axis))

    def calibrate_inputs(self, *runs: Sequence[Tensor]) -> None:
        """See :meth:`QuantizedModule.calibrate_inputs`."""
        self.input_quantizer.calibrate(_together(runs[0], self.channel_axis))

    def calibrate_output(self, products: Sequence[Tensor]) -> None:
        """Choose the range of the output, compensated as it is now, from :meth:`products`, which are overwritten."""
        outputs = [self.with_bias(y, self.alpha, self.beta) for y in products]
        assert self.output_quantizer is not None  # only layers that have one are asked
        self.output_quantizer.calibrate(_together(outputs, self.channel_axis))

    def integer_scales(self, alpha: Tensor | None, bias: Tensor) -> ChannelScales:
        """Return the layer's integer form for compensation ``alpha`` and a ``bias`` that already includes beta."""
        weight = self.weight_quantizer
        scale = weight.scale.double().expand(self.out_channels)
        return channel_scales(scale, self.input_quantizer.scale, weight.grid.bits, alpha, bias)

    def set_compensation(self, alpha: Tensor | None, beta: Tensor | None) -> None:
        """Set alpha and beta, float32 (C_out,); ``None`` removes them."""
        self.alpha = None if alpha is None else alpha.to(self.weight)
        self.beta = None if beta is None else beta.to(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, quantized and compensated unless ``quantized`` is False."""
        if not self.quantized:
            return self.full_precision(x)
        return self.finished(self.products(x))


class QuantizedLinear(QuantizedLayer):
    """A quantized ``nn.Linear``; input (..., C_in), output (..., C_out)."""

    channel_axis = -1

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See :meth:`QuantizedLayer.op`."""
        return F.linear(x, weight, bias)


class QuantizedConv2d(QuantizedLayer):
    """A quantized ``nn.Conv2d``; input (N, C_in, H, W), output (N, C_out, H', W')."""

    channel_axis = 1

    def __init__(self, layer: nn.Conv2d, *args, **kwargs):
        super().__init__(layer, *args, **kwargs)
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See :meth:`QuantizedLayer.op`."""
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class QuantizedMatmul(QuantizedModule):
    """The product a @ b with both operands fake-quantized, as inside attention."""

    def __init__(self, a_quantizer: Quantizer, b_quantizer: Quantizer):
        super().__init__()
        self.a_quantizer, self.b_quantizer = a_quantizer, b_quantizer

    def calibrate(self, a: Sequence[Tensor], b: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """See :meth:`QuantizedModule.calibrate`."""
        self.a_quantizer.calibrate(_together(a, -1))
        self.b_quantizer.calibrate(_together(b, -1))

    def full_precision(self, a: Tensor, b: Tensor) -> Tensor:
        """See :meth:`QuantizedModule.full_precision`."""
        return a @ b

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product of the operands, quantized unless ``quantized`` is False."""
        if not self.quantized:
            return self.full_precision(a, b)
        return self.a_quantizer(a) @ self.b_quantizer(b)


class QuantizedAdd(QuantizedModule):
    """The sum a + b with fake-quantized operands: a residual addition as engines with integer additions compute it.

    An operand without a quantizer is the output of a layer that has an output quantizer. An operand whose quantizer
    only clips is the output of the layer whose kernel computes the sum.
    """

    def __init__(self, a_quantizer: Quantizer | None, b_quantizer: Quantizer | None):
        super().__init__()
        self.a_quantizer, self.b_quantizer = a_quantizer, b_quantizer

    def calibrate(self, a: Sequence[Tensor], b: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """See :meth:`QuantizedModule.calibrate`."""
        for name, runs in (("a_quantizer", a), ("b_quantizer", b)):
            if name in self.quantizers():
                self.quantizers()[name].calibrate(_together(runs, 1))

    def full_precision(self, a: Tensor, b: Tensor) -> Tensor:
        """See :meth:`QuantizedModule.full_precision`."""
        return a + b

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the sum of the operands, quantized unless ``quantized`` is False."""
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
        """See :meth:`QuantizedModule.calibrate`."""
        self.input_quantizer.calibrate(_together(inputs, 1))

    def full_precision(self, x: Tensor) -> Tensor:
        """See :meth:`QuantizedModule.full_precision`."""
        return self.pooling(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled values; the input is quantized first unless ``quantized`` is False."""
        return self.pooling(self.input_quantizer(x) if self.quantized else x)


def per_channel(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Reshape ``values`` (C,) to broadcast along ``axis`` of a tensor."""
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _together(runs: Sequence[Tensor], axis: int) -> Tensor:
    """Concatenate several runs as (values, channels) if their channel counts agree, else as one row."""
    widths = {x.shape[axis] for x in runs}
    return torch.cat([x.movedim(axis, -1).reshape(-1, *([x.shape[axis]] if len(widths) == 1 else [])) for x in runs])


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
