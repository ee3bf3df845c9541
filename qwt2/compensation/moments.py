"""Streaming statistics in float64: what closed-form compensation needs, whatever the set's size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Below this fraction of the mean square a channel's variance is rounding, not signal.
CONSTANT_CHANNEL = 1e-10

# Values that are widened to float64 at a time on the CPU: what a cache holds.
PART = 2**17


class ChannelMoments:
    """First and second joint moments, per channel, of a quantized and a full-precision output.

    Batches are merged with Chan's update, so that nothing cancels when means are large.

    Attributes:
        count: number of (sample, position) pairs seen.
        mean_q, mean_f, var_q, var_f, cov: float64 tensors (C,); population moments.
    """

    def __init__(self):
        self.count = 0

    def update(self, y_q: Tensor, y_f: Tensor, channel_axis: int) -> None:
        """Add paired outputs of equal shape; statistics run over every axis but ``channel_axis``."""
        q, f = (y.movedim(channel_axis, -1).reshape(-1, y.shape[channel_axis]) for y in (y_q, y_f))
        # Sums about any value near the mean lose nothing; this one takes no pass in float64.
        near_q, near_f = q.mean(0).double(), f.mean(0).double()
        sums = torch.zeros(5, q.shape[1], dtype=torch.float64, device=q.device)
        rows = max(1, PART // q.shape[1]) if q.device.type == "cpu" else len(q)
        for part_q, part_f in zip(q.split(rows), f.split(rows)):
            part_q, part_f = part_q - near_q, part_f - near_f
            sums[0] += part_q.sum(0)
            sums[1] += part_f.sum(0)
            sums[2] += (part_q * part_f).sum(0)
            sums[3] += part_q.square_().sum(0)
            sums[4] += part_f.square_().sum(0)
        gap_q, gap_f, product, square_q, square_f = sums / len(q)
        batch = ChannelMoments()
        batch.count, batch.mean_q, batch.mean_f = len(q), near_q + gap_q, near_f + gap_f
        batch.cov = product - gap_q * gap_f
        batch.var_q, batch.var_f = (square_q - gap_q.square()).clamp(min=0), (square_f - gap_f.square()).clamp(min=0)
        self.merge(batch)

    def merge(self, other: "ChannelMoments") -> None:
        """Add everything that ``other`` has seen."""
        if not other.count:
            return
        if not self.count:
            self.__dict__.update(other.__dict__)
            return
        total = self.count + other.count
        share = other.count / total
        gap_q, gap_f = other.mean_q - self.mean_q, other.mean_f - self.mean_f
        between = share * (1 - share)
        for name, gap in (("var_q", gap_q * gap_q), ("var_f", gap_f * gap_f), ("cov", gap_q * gap_f)):
            mixed = (1 - share) * getattr(self, name) + share * getattr(other, name) + between * gap
            setattr(self, name, mixed)
        self.mean_q, self.mean_f = self.mean_q + share * gap_q, self.mean_f + share * gap_f
        self.count = total

    @property
    def is_finite(self) -> bool:
        if not self.count:
            return True
        return bool(torch.isfinite(self.var_q).all() and torch.isfinite(self.var_f).all())

    def affine(self, estimator: str) -> tuple[Tensor, Tensor]:
        """alpha and beta (C,) that bring the quantized output to the full-precision one.

        Args:
            estimator: "least_squares", alpha = cov(q, f) / var(q) (QwT-v2, arXiv 2505.20932);
                "moment", alpha = std(f) / std(q); "bias_only", alpha = 1.
        """
        constant = self.var_q <= CONSTANT_CHANNEL * (self.mean_q.square() + self.var_q)
        variance = torch.where(constant, torch.ones_like(self.var_q), self.var_q)
        ratio = {
            "least_squares": self.cov / variance,
            "moment": (self.var_f / variance).sqrt(),
            "bias_only": torch.ones_like(variance),
        }[estimator]
        alpha = torch.where(constant, torch.ones_like(ratio), ratio)
        return alpha, self.mean_f - alpha * self.mean_q

    def squared_error(self, alpha: Tensor | float = 1.0, beta: Tensor | float = 0.0) -> Tensor:
        """Mean of (alpha q + beta - f)^2 per channel, (C,), from the moments alone."""
        offset = alpha * self.mean_q + beta - self.mean_f
        spread = alpha**2 * self.var_q - 2 * alpha * self.cov + self.var_f
        return spread.clamp(min=0) + offset.square()

    def sqnr_db(self, alpha: Tensor | float = 1.0, beta: Tensor | float = 0.0) -> float:
        """10 log10 of signal power over error power, all channels together."""
        signal = (self.var_f + self.mean_f.square()).sum()
        return decibel(float(signal), float(self.squared_error(alpha, beta).sum()))


class GroupedRegression:
    """Least squares of targets on inputs, one regression per channel group.

    Holds the centred Gram matrix and the cross products, (groups, d, d) and (groups, d, o).

    Args:
        groups: number of independent regressions.
    """

    def __init__(self, groups: int = 1):
        self.groups, self.count = groups, 0

    def update(self, x: Tensor, target: Tensor) -> None:
        """Add rows: ``x`` (groups, n, d), ``target`` (groups, n, o)."""
        x, target = x.double(), target.double()
        count, mean_x, mean_t = x.shape[1], x.mean(1), target.mean(1)
        x, target = x - mean_x[:, None], target - mean_t[:, None]
        gram, cross = x.transpose(1, 2) @ x, x.transpose(1, 2) @ target
        power = target.square().sum(1)
        if not self.count:
            self.mean_x, self.mean_t, self.gram, self.cross, self.power = mean_x, mean_t, gram, cross, power
        else:
            total = self.count + count
            weight = self.count * count / total
            gap_x, gap_t = mean_x - self.mean_x, mean_t - self.mean_t
            self.gram += gram + weight * gap_x[:, :, None] * gap_x[:, None, :]
            self.cross += cross + weight * gap_x[:, :, None] * gap_t[:, None, :]
            self.power += power + weight * gap_t.square()
            self.mean_x = self.mean_x + gap_x * (count / total)
            self.mean_t = self.mean_t + gap_t * (count / total)
        self.count += count

    def solve(self, damping: float) -> tuple[Tensor, Tensor]:
        """Coefficients (groups, d, o) and intercepts (groups, o).

        The Gram matrix gets ``damping`` times its mean diagonal added before the Cholesky
        factorisation; inputs with constant or collinear channels (a Swin stage's first block reads
        a LayerNorm's output) have no unique solution without it.
        """
        diagonal = self.gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float64).tiny)
        eye = torch.eye(self.gram.shape[-1], dtype=self.gram.dtype, device=self.gram.device)
        while True:
            factor, failed = torch.linalg.cholesky_ex(self.gram + damping * diagonal[:, None, None] * eye)
            if not failed.any():
                break
            damping = max(damping * 10, 1e-14)
        weight = torch.cholesky_solve(self.cross, factor)
        return weight, self.mean_t - (self.mean_x[:, None] @ weight)[:, 0]

    def residual(self, weight: Tensor) -> float:
        """Sum of squared residuals of the centred data under coefficients (groups, d, o)."""
        explained = 2 * (weight * self.cross).sum() - (weight * (self.gram @ weight)).sum()
        return float((self.power.sum() - explained).clamp(min=0))

    def r2(self, weight: Tensor) -> float:
        """1 - SS_res / SS_tot about each output channel's mean; -inf for a constant target."""
        total = float(self.power.sum())
        return 1 - self.residual(weight) / total if total > 0 else float("-inf")


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite without noise."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
