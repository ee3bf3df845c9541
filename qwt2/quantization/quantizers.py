"""Fake-quantizers: once calibrated, they round tensors to an integer grid and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qwt2.errors import Qwt2Error
from qwt2.quantization.observers import QUANTILE_LIMIT, Grid, observe, quantiles, sample

SQRT2 = math.sqrt(2.0)


class Quantizer(nn.Module):
    """Base of all fake-quantizers.

    A new quantizer is uncalibrated; :meth:`calibrate` chooses its parameters.

    Attributes:
        where: name of the module it belongs to, for error messages.
    """

    def __init__(self):
        super().__init__()
        self.calibrated = False
        self.where = ""

    def calibrate(self, x: Tensor) -> None:
        """Choose the parameters for values like ``x``, and set ``calibrated``.

        Raises:
            Qwt2Error: if ``x`` is empty or not finite; the message names the module.
        """
        try:
            self._choose(x.detach())
        except Qwt2Error as error:
            raise Qwt2Error(f"{self.where or type(self).__name__}: {error}") from None
        self.calibrated = True

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`quantize`."""
        return self.quantize(x)

    def _choose(self, x: Tensor) -> None:
        raise NotImplementedError

    def quantize(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to the grid and back, float32 of the same shape."""
        raise NotImplementedError


class UniformQuantizer(Quantizer):
    """A uniform affine quantizer: y = (clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale.

    Args:
        grid: the integer grid.
        observer: name of the observer that chooses the range.
        channel_axis: axis with one scale per entry; ``None`` for one scale per tensor.
        rounds: False only clips to the grid's range, as OpenVINO computes a quantizer in front of an addition.

    Attributes:
        scale, zero_point: float32; shape () per tensor, (channels,) per channel. The zero point is an integer unless a
            method sets another one (RepQ-ViT as published).
    """

    def __init__(self, grid: Grid, observer: str, channel_axis: int | None = None, rounds: bool = True):
        super().__init__()
        self.grid, self.observer, self.channel_axis, self.rounds = grid, observer, channel_axis, rounds
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))

    def set_parameters(self, scale: Tensor, zero_point: Tensor, channel_axis: int | None = None) -> None:
        """Set scale and zero point directly, and mark the quantizer as calibrated."""
        self.scale, self.zero_point = scale.float(), zero_point.float()
        self.channel_axis, self.calibrated = channel_axis, True

    def _choose(self, x: Tensor) -> None:
        self.scale, self.zero_point = self.chosen(x)

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point that :meth:`calibrate` would set."""
        if self.channel_axis is not None:
            return observe(
                self.observer, x.movedim(self.channel_axis, 0).reshape(x.shape[self.channel_axis], -1), self.grid
            )
        scales, zero_points = observe(self.observer, x.reshape(1, -1), self.grid)
        scale, zero_point = scales[0], zero_points[0]
        return without_ties(x, scale) if self.grid.zero_in_range else scale, zero_point  # for integer engines

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point in shapes that broadcast against ``x``."""
        if self.channel_axis is None:
            return self.scale, self.zero_point
        shape = [1] * x.dim()
        shape[self.channel_axis] = -1
        return self.scale.reshape(shape), self.zero_point.reshape(shape)

    def quantize(self, x: Tensor) -> Tensor:
        """See :meth:`Quantizer.quantize`."""
        scale, zero_point = self.parameters_for(x)
        if not self.rounds:
            return torch.clamp(x, (self.grid.qmin - zero_point) * scale, (self.grid.qmax - zero_point) * scale)
        return self.grid.fake_quantize(x, scale, zero_point)

    def codes(self, x: Tensor) -> Tensor:
        """Return the integer codes of ``x``, int32 of the same shape."""
        scale, zero_point = self.parameters_for(x)
        codes = torch.clamp(torch.round(x / scale) + zero_point, self.grid.qmin, self.grid.qmax)
        return codes.to(torch.int32)

    def values(self, codes: Tensor) -> Tensor:
        """Return the values that integer codes stand for, float32 of the same shape."""
        scale, zero_point = self.parameters_for(codes)
        return (codes - zero_point) * scale

    def extra_repr(self) -> str:
        """Return the settings that ``print`` shows."""
        kind = "symmetric" if self.grid.symmetric else "affine"
        axis = "" if self.channel_axis is None else f", channel_axis={self.channel_axis}"
        rounds = "" if self.rounds else ", clips only"
        return f"bits={self.grid.bits}, {kind}, observer={self.observer}{axis}{rounds}"


class LogSqrt2Quantizer(Quantizer):
    """A logarithmic quantizer with base sqrt(2) for attention probabilities (RepQ-ViT, section 3.3).

    k = round(-2 log2(x / scale)), y = 2^(-k/2) * scale, and y = 0 where k >= 2^bits. The scale is the upper percentile
    with the least squared error. This grid is for simulation only: no integer engine has it.

    Args:
        bits: bit width.
        floor: lower bound of x / scale before the logarithm. QwT's code uses 1e-6. RepQ-ViT's code has none, so that
            exact zeros stay zero.

    Attributes:
        scale: float32, ().
    """

    def __init__(self, bits: int, floor: float = 0.0):
        super().__init__()
        self.bits, self.floor = bits, floor
        self.register_buffer("scale", torch.ones(()))

    def _choose(self, x: Tensor) -> None:
        if x.numel() == 0 or not torch.isfinite(x).all():
            raise Qwt2Error("saw an empty or non-finite tensor in calibration; check weights and images")
        values = x.reshape(-1).float()
        # RepQ-ViT tries the percentiles in this order and keeps the first strict minimum.
        candidates = [_upper_quantile(values, p) for p in (0.999, 0.9999, 0.99999)]
        errors = [(values - self._quantize(values, c)).abs().square().mean() for c in candidates]
        self.scale = candidates[int(torch.stack(errors).argmin())]

    def _quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        ratio = x / scale
        if self.floor:
            ratio = ratio.clamp(min=self.floor)
        k = torch.round(-2 * torch.log2(ratio))
        levels = 2**self.bits
        kept = k < levels
        k = k.clamp(0, levels - 1)
        odd = torch.where(k % 2 == 1, SQRT2, 1.0)
        return torch.where(kept, 2.0 ** -torch.ceil(k / 2) * odd * scale, torch.zeros_like(x))

    def quantize(self, x: Tensor) -> Tensor:
        """See :meth:`Quantizer.quantize`."""
        return self._quantize(x, self.scale)

    def extra_repr(self) -> str:
        """Return the settings that ``print`` shows."""
        return f"bits={self.bits}, floor={self.floor}"


# Distance that counts as a tie, in steps, and the accepted share of ties, five times that of smooth values.
_TIE, _TIES = 2e-5, 2e-4


def without_ties(x: Tensor, scale: Tensor) -> Tensor:
    """Return ``scale``, widened by 0.1 % (up to four times) while many values lie exactly between two codes.

    Values that were quantized before lie on a grid. If a range ends on one of them, many values can lie on exact halves
    of the new step. ONNX rounds x / scale to even; engines that multiply by 1 / scale, or add the zero point before
    they round, round many of these values the other way.
    """
    x = sample(x.reshape(1, -1))
    for _ in range(4):
        remainder = (x / scale).frac_().abs_().sub_(0.5).abs_()
        if (remainder < _TIE).float().mean() <= _TIES:
            break
        scale = scale * 1.001
    return scale


def _upper_quantile(values: Tensor, p: float) -> Tensor:
    return quantiles(values[None, :: -(-values.numel() // QUANTILE_LIMIT)], [p])[0, 0]
