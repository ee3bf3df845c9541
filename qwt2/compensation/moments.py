"""Streaming joint moments of a quantized and a full-precision output, per channel in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwt2.decibel import decibel

# A variance below this share of a channel's mean square is rounding, not signal.
CONSTANT_CHANNEL = 1e-10

# Number of values that are converted to float64 at a time on the CPU, so that they fit into a cache.
_PART = 2**17


@dataclass(frozen=True)
class Moments:
    """First and second joint moments; ``+`` merges the moments of two sets.

    Attributes:
        count: number of (sample, position) pairs.
        mean_q, mean_f: means of the quantized and the full-precision output, float64 (C,).
        var_q, var_f, cov: their population variances and covariance, float64 (C,).
    """

    count: int
    mean_q: Tensor
    mean_f: Tensor
    var_q: Tensor
    var_f: Tensor
    cov: Tensor

    @classmethod
    def of(cls, y_q: Tensor, y_f: Tensor, channel_axis: int) -> Moments:
        """Compute the moments of two outputs of equal shape, over every axis except ``channel_axis``."""
        q, f = (y.movedim(channel_axis, -1).reshape(-1, y.shape[channel_axis]) for y in (y_q, y_f))
        # Sums about any value near the mean lose no accuracy; the float32 mean needs no pass in float64.
        near_q, near_f = q.mean(0).double(), f.mean(0).double()
        sums = torch.zeros(5, q.shape[1], dtype=torch.float64, device=q.device)
        rows = max(1, _PART // q.shape[1]) if q.device.type == "cpu" else len(q)
        for part_q, part_f in zip(q.split(rows), f.split(rows)):
            part_q, part_f = part_q - near_q, part_f - near_f
            sums[0] += part_q.sum(0)
            sums[1] += part_f.sum(0)
            sums[2] += (part_q * part_f).sum(0)
            sums[3] += part_q.square_().sum(0)
            sums[4] += part_f.square_().sum(0)
        gap_q, gap_f, product, square_q, square_f = sums / len(q)
        return cls(
            len(q), near_q + gap_q, near_f + gap_f, (square_q - gap_q.square()).clamp(min=0),
            (square_f - gap_f.square()).clamp(min=0), product - gap_q * gap_f,
        )  # fmt: skip

    def __add__(self, other: Moments) -> Moments:
        """Merge by Chan's update, which avoids cancellation for large means."""
        total = self.count + other.count
        share = other.count / total
        gap_q, gap_f, between = other.mean_q - self.mean_q, other.mean_f - self.mean_f, share * (1 - share)

        def mixed(mine: Tensor, theirs: Tensor, gap: Tensor) -> Tensor:
            return (1 - share) * mine + share * theirs + between * gap

        return Moments(
            total, self.mean_q + share * gap_q, self.mean_f + share * gap_f,
            mixed(self.var_q, other.var_q, gap_q * gap_q), mixed(self.var_f, other.var_f, gap_f * gap_f),
            mixed(self.cov, other.cov, gap_q * gap_f),
        )  # fmt: skip

    @property
    def is_finite(self) -> bool:
        """Whether all values were finite."""
        return bool(torch.isfinite(self.var_q).all() and torch.isfinite(self.var_f).all())

    @property
    def varies(self) -> Tensor:
        """Mask of the channels of the quantized output that are not constant, bool (C,)."""
        return self.var_q > CONSTANT_CHANNEL * (self.mean_q.square() + self.var_q)

    def squared_error(self, alpha: Tensor | float = 1.0, beta: Tensor | float = 0.0) -> Tensor:
        """Return the mean of (alpha q + beta - f)^2 per channel, (C,)."""
        offset = alpha * self.mean_q + beta - self.mean_f
        spread = alpha**2 * self.var_q - 2 * alpha * self.cov + self.var_f
        return spread.clamp(min=0) + offset.square()

    def sqnr_db(self, alpha: Tensor | float = 1.0, beta: Tensor | float = 0.0) -> float:
        """Return the SQNR of alpha q + beta against f over all channels, dB."""
        signal = (self.var_f + self.mean_f.square()).sum()
        return decibel(float(signal), float(self.squared_error(alpha, beta).sum()))
