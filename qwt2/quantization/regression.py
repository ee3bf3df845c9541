"""Streaming least squares of targets on inputs, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST = 1e-200  # stands for the mean diagonal of inputs that are always zero


@dataclass(frozen=True)
class Regression:
    """Centred sums of independent regressions, one per channel group; ``+`` merges the sums of two sets.

    Attributes:
        count: number of rows n.
        mean_x: mean of the inputs, (groups, d).
        mean_t: mean of the targets, (groups, o).
        gram: sum of centred x x', (groups, d, d).
        cross: sum of centred x t', (groups, d, o).
        power: sum of centred t^2, (groups, o).
    """

    count: int
    mean_x: Tensor
    mean_t: Tensor
    gram: Tensor
    cross: Tensor
    power: Tensor

    @classmethod
    def of(cls, x: Tensor, target: Tensor, products: torch.dtype = torch.float64) -> Regression:
        """Compute the sums of rows ``x`` (groups, n, d) and ``target`` (groups, n, o).

        Args:
            x, target: the rows.
            products: type of the products of centred rows; the sums are float64 in any case.
        """
        x, target = x.to(products), target.to(products)
        mean_x, mean_t = x.mean(1), target.mean(1)
        x, target = x - mean_x[:, None], target - mean_t[:, None]
        gram, cross, power = x.transpose(1, 2) @ x, x.transpose(1, 2) @ target, target.square().sum(1)
        return cls(x.shape[1], *(sums.double() for sums in (mean_x, mean_t, gram, cross, power)))

    def __add__(self, other: Regression) -> Regression:
        total = self.count + other.count
        weight, share = self.count * other.count / total, other.count / total
        gap_x, gap_t = other.mean_x - self.mean_x, other.mean_t - self.mean_t
        return Regression(
            total,
            self.mean_x + gap_x * share,
            self.mean_t + gap_t * share,
            self.gram + other.gram + weight * gap_x[:, :, None] * gap_x[:, None, :],
            self.cross + other.cross + weight * gap_x[:, :, None] * gap_t[:, None, :],
            self.power + other.power + weight * gap_t.square(),
        )

    def solve(self, damping: float) -> tuple[Tensor, Tensor]:
        """Return coefficients (groups, d, o) and intercepts (groups, o).

        ``damping`` times the mean of the Gram matrix's diagonal is added to the diagonal before the Cholesky
        factorisation. Without it, inputs with constant or collinear channels have no unique solution (the first block
        of a Swin stage reads the output of a LayerNorm).
        """
        weight = torch.cholesky_solve(self.cross, cholesky(self.gram, damping))
        return weight, self.mean_t - (self.mean_x[:, None] @ weight)[:, 0]

    def residual(self, weight: Tensor) -> float:
        """Return the sum of squared residuals of the centred data for coefficients (groups, d, o)."""
        explained = 2 * (weight * self.cross).sum() - (weight * (self.gram @ weight)).sum()
        return float((self.power.sum() - explained).clamp(min=0))

    def r2(self, weight: Tensor) -> float:
        """Return 1 - SS_res / SS_tot about each output channel's mean; -inf for a constant target."""
        total = float(self.power.sum())
        return 1 - self.residual(weight) / total if total > 0 else float("-inf")


def cholesky(gram: Tensor, damping: float) -> Tensor:
    """Return the lower Cholesky factor of Gram matrices with a share of their mean diagonal added to the diagonal.

    More is added if that does not make them positive definite.

    Args:
        gram: float64 (groups, d, d).
        damping: the share.
    """
    mean = gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=_LEAST).expand(gram.shape[:2])
    assert torch.isfinite(gram).all()  # else nothing would make it positive definite
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(damping * mean))
        if not failed.any():
            return factor
        damping = max(damping * 10, 1e-14)
