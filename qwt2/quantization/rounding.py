"""Rounding of a weight with error feedback: each input's rounding error is spread over the inputs to come.

GPTQ (arXiv 2210.17323, section 3.3), per convolution group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwt2.quantization.observers import Grid
from qwt2.quantization.regression import cholesky

DAMPING = 0.01  # share of the Gram matrix's mean diagonal that is added to its diagonal, as in GPTQ
_TOGETHER = 128  # inputs whose errors are spread over all later ones in one product


class Feedback:
    """The order of rounding and the factors of the feedback for one layer's inputs.

    With H = X'X + damping * mean(diag(X'X)) I and U'U = H^-1 (U upper triangular), the error e_i = (w_i - q_i) / U_ii
    of input i changes the weights of the inputs j > i by -e_i U_ij. Inputs are rounded in the order of H's diagonal,
    the largest first.

    A difference D of the inputs in the full-precision network from X changes them further, by w_i P_ij with
    P = triu(D'X U', 1) U (GPTAQ, arXiv 2504.02692, with its authors' blocks of 128 inputs: across blocks, q_i takes the
    place of w_i).

    Args:
        gram: X'X of the layer's quantized input, float64 (groups, d, d).
        cross: D'X, in the same shape; ``None`` for GPTQ.
        damping: share of the mean of the Gram matrix's diagonal that is added to the diagonal.
    """

    def __init__(self, gram: Tensor, cross: Tensor | None = None, damping: float = DAMPING):
        self.order = gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        rows, columns = (self.order.unsqueeze(axis).expand(gram.shape) for axis in (2, 1))
        gram = gram.gather(1, rows).gather(2, columns)
        # H = RR' with R upper triangular gives U = R^-1. R is the Cholesky factor of H read from its last entry back.
        lower = cholesky(gram.flip(1, 2), damping).flip(1, 2)
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        self.upper = torch.linalg.solve_triangular(lower, eye, upper=True)
        self.pull = None
        if cross is not None:
            cross = cross.gather(1, rows).gather(2, columns)
            self.pull = (cross @ self.upper.transpose(1, 2)).triu(1) @ self.upper

    def rounded(self, weight: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
        """Return the integer codes of a weight, float64 (groups, outputs, d).

        Args:
            weight: (groups, outputs, d).
            scale, zero_point: the weight's grid, in shapes that broadcast to (groups, outputs, 1).
            grid: its codes.
        """
        index = self.order[:, :, None].expand(-1, -1, weight.shape[1])
        left = weight.double().transpose(1, 2).gather(1, index)  # (groups, d, outputs): rows are contiguous
        scale, zero_point = (part.double().expand(*weight.shape[:2], 1).squeeze(2) for part in (scale, zero_point))
        codes = torch.empty_like(left)
        for start in range(0, left.shape[1], _TOGETHER):
            stop = min(start + _TOGETHER, left.shape[1])
            errors = torch.empty_like(left[:, start:stop])
            for i in range(start, stop):
                codes[:, i] = (left[:, i] / scale).round_().add_(zero_point).clamp_(grid.qmin, grid.qmax)
                error = (left[:, i] - (codes[:, i] - zero_point) * scale) / self.upper[:, i, i, None]
                errors[:, i - start] = error
                left[:, i + 1 : stop].baddbmm_(self.upper[:, i, i + 1 : stop, None], error[:, None], alpha=-1)
                if self.pull is not None:
                    left[:, i + 1 : stop].baddbmm_(self.pull[:, i, i + 1 : stop, None], left[:, i, None])
            left[:, stop:].baddbmm_(self.upper[:, start:stop, stop:].transpose(1, 2), errors, alpha=-1)
            if self.pull is not None:
                values = (codes[:, start:stop] - zero_point[:, None]) * scale[:, None]
                left[:, stop:].baddbmm_(self.pull[:, start:stop, stop:].transpose(1, 2), values)
        return torch.empty_like(codes).scatter_(1, index, codes).transpose(1, 2)
