"""Observers choose a quantizer's scale and zero point from calibration values.

Every observer has the signature ``observer(x, grid) -> (scale, zero_point)``. ``x`` has shape (channels, values); a
per-tensor quantizer passes one row. Scale and zero point have shape (channels,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwt2.errors import Qwt2Error

PERCENTILES = (0.999, 0.9999, 0.99999)
MSE_SHRINKS = tuple(1 - 0.01 * step for step in range(0, 80, 2))
# Errors of candidate ranges are measured on at most this many values per row; more hardly change the choice.
ERROR_LIMIT = 2**17
_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 fill the interval evenly
# torch.quantile refuses more values than this. The reference implementations then use a coarser estimate.
QUANTILE_LIMIT = 2**24


@dataclass(frozen=True)
class Grid:
    """The integer grid of a uniform quantizer.

    Args:
        bits: bit width.
        symmetric: use signed codes with zero point 0, else unsigned codes 0 .. 2^bits - 1.
        zero_in_range: widen the range so that it contains 0. Integer engines need this, because their zero point is
            one of the codes; the reference implementations do not do it.
        narrow: leave out the lowest signed code. 8-bit weights need this so that a channel's sign can be flipped
            exactly, and TensorRT supports nothing else.
        centred: for values of both signs, make the middle code the zero point, so that codes can be stored as signed
            ones with zero point 0. Ranges of one sign are not changed.
    """

    bits: int
    symmetric: bool = False
    zero_in_range: bool = True
    narrow: bool = False
    centred: bool = False

    @property
    def middle(self) -> int:
        """The code of zero in a grid with as many codes below it as above it, up to one."""
        return 0 if self.symmetric else 2 ** (self.bits - 1)

    @property
    def qmin(self) -> int:
        """The lowest code."""
        return -(2 ** (self.bits - 1)) + self.narrow if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """The highest code."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def parameters(self, low: Tensor, high: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return candidates for scale and zero point, each (channels,), that represent a range.

        Args:
            low: lower end of the range, shape (channels,).
            high: upper end of the range, shape (channels,).
        """
        if self.symmetric:
            bound = torch.maximum(low.abs(), high.abs())
            # With few codes it matters whether the range ends on the last code, or half a step or a step beyond it,
            # so all three are candidates. At 8 bits they differ by at most 0.4 %.
            steps = (0.0, 0.5, 1.0) if self.bits < 8 else (0.0,)
            return [(bound / (self.qmax + s), torch.zeros_like(bound)) for s in steps]
        if self.zero_in_range:
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / self.qmax
        zero_point = torch.round(-low / scale)
        if self.centred:
            both = (low < 0) & (high > 0)
            bound = torch.maximum(low.abs(), high.abs())
            scale = torch.where(both, bound / (self.qmax - self.middle), scale)
            zero_point = torch.where(both, torch.full_like(zero_point, self.middle), zero_point)
        return [(scale, zero_point)]

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Round ``x`` to the grid and back; the three shapes broadcast."""
        # In place after the first operation: for large activations, allocating memory costs more than arithmetic.
        codes = (x / scale).round_()
        if bool((zero_point == zero_point.round()).all()):  # adding and then subtracting it has no effect
            return codes.clamp_(*self._around(zero_point)).mul_(scale)
        return codes.add_(zero_point).clamp_(self.qmin, self.qmax).sub_(zero_point).mul_(scale)

    def _around(self, zero_point: Tensor) -> tuple[Any, Any]:
        """Return the ends of the grid minus the zero point, as numbers if possible: torch clamps faster to numbers."""
        lowest, highest = (float(end) for end in zero_point.aminmax())
        shared = lowest if lowest == highest else zero_point
        return self.qmin - shared, self.qmax - shared


Observer = Callable[[Tensor, Grid], tuple[Tensor, Tensor]]


def minmax(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Choose the range from the smallest to the largest value."""
    low, high = x.amin(1), x.amax(1)
    return _best(x, grid, grid.parameters(low, high))


def percentile(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Choose the percentile range, of three, with the least mean squared error (RepQ-ViT, arXiv 2212.08254).

    Quantiles are float32 with linear interpolation, as in the public reference implementation.
    """
    if x.shape[1] > QUANTILE_LIMIT:
        x = x[:, :: -(-x.shape[1] // QUANTILE_LIMIT)]
    ends = quantiles(x, [1 - p for p in PERCENTILES] + list(PERCENTILES))
    count = len(PERCENTILES)
    candidates = []
    for low, high in zip(ends[:count], ends[count:]):
        candidates += grid.parameters(low, high)
    return _best(x, grid, candidates)


def quantiles(x: Tensor, points: Sequence[float]) -> Tensor:
    """Return quantiles of each row, (points, rows), equal to those of ``torch.quantile``.

    torch sorts all values. On the CPU, partitioning around the few ranks that are needed is six times faster.
    """
    q = torch.tensor(points, dtype=x.dtype, device=x.device)
    if x.device.type != "cpu":
        return torch.quantile(x, q, dim=1)
    ranks = q * (x.shape[1] - 1)
    below, above = ranks.long(), ranks.ceil().long()
    selected = torch.from_numpy(np.partition(x.numpy(), torch.cat([below, above]).unique().numpy(), axis=1))
    return torch.lerp(selected[:, below], selected[:, above], (ranks - below).expand(len(x), -1)).T


def mse(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Choose the shrunken min-max range with the least mean squared error."""
    low, high = x.amin(1), x.amax(1)
    candidates = []
    for shrink in MSE_SHRINKS:
        candidates += grid.parameters(low * shrink, high * shrink)
    return _best(sample(x), grid, candidates)


def sample(x: Tensor) -> Tensor:
    """Return at most :data:`ERROR_LIMIT` values of each row, spread over it without a period.

    Rows hold channels in turn, and a step that has a factor in common with their number would see some channels only.
    """
    count = x.shape[1]
    if count <= ERROR_LIMIT:
        return x
    places = torch.arange(ERROR_LIMIT, dtype=torch.float64, device=x.device).mul_(_GOLDEN).frac_().mul_(count)
    return x[:, places.long()]


OBSERVERS: dict[str, Observer] = {"minmax": minmax, "percentile": percentile, "mse": mse}


def _best(x: Tensor, grid: Grid, candidates: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return, per row, the first candidate with the least mean squared error; degenerate ones never win."""
    best_error = x.new_full((x.shape[0],), float("inf"))
    best_scale, best_zero = _constant_parameters(x, grid)
    for scale, zero_point in candidates:
        valid = (scale > 0) & torch.isfinite(scale) & torch.isfinite(zero_point)
        safe = torch.where(valid, scale, torch.ones_like(scale))
        zero = torch.where(valid, zero_point, torch.zeros_like(zero_point))
        error = grid.fake_quantize(x, safe[:, None], zero[:, None]).sub_(x).square_().mean(1)
        better = valid & (error < best_error)
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero_point, best_zero)
    return best_scale, best_zero


def _constant_parameters(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return parameters that represent a constant row exactly, because its range has no width.

    The reference implementations crash on such a row. A constant c > 0 becomes code 1 at scale c; c < 0 becomes code 0
    with zero point 1, or code -1 on a symmetric grid; an all-zero row gets scale 1.
    """
    middle = x[:, x.shape[1] // 2] if x.shape[1] else x.new_zeros(x.shape[0])
    scale = torch.where(middle == 0, torch.ones_like(middle), middle.abs())
    zero_point = torch.zeros_like(middle)
    if not grid.symmetric:
        zero_point = torch.where(middle < 0, torch.ones_like(middle), zero_point)
    return scale, zero_point


def observe(name: str, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Run the observer called ``name``.

    Raises:
        Qwt2Error: if the observer is unknown, or there are no values, or some are not finite.
    """
    if name not in OBSERVERS:
        raise Qwt2Error(f"unknown observer {name!r}; use one of: {', '.join(OBSERVERS)}")
    if x.numel() == 0:
        raise Qwt2Error("saw an empty tensor in calibration; give it batches with at least one image")
    # A sum is many times faster, and finite only if all values are.
    if not torch.isfinite(x.sum()) and not torch.isfinite(x).all():
        raise Qwt2Error("saw NaN or infinity in calibration; check the model's weights and the images")
    return OBSERVERS[name](x.float(), grid)
