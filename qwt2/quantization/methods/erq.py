"""ERQ (arXiv 2407.06794): the error of activations regressed away, then that of weights, half of them at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.observers import Grid
from qwt2.quantization.recipe import LayerwiseMethod, Recipe
from qwt2.quantization.rows import by_row, rows, weight_rows
from qwt2.quantization.walk import Visit

RIDGE = 2000.0  # lambda of both regressions, on sums over all rows, as in the authors' code
FLIPS = 100  # steps of the rounding refinement for one half, as in the authors' code


@PTQ_METHODS.register("erq")
class ERQ(LayerwiseMethod):
    """ERQ's two steps per layer, on the full-precision network's input and output.

    Aqer (section 3.2) solves a ridge regression that makes up for the rounding of the input. Wqer (section 3.3) then
    rounds half of the remaining weights of every output, refines their rounding, and makes up for their error by a
    regression on the other half, until all are rounded. The bias takes part as the weight of a constant input. The
    authors round convolutions to the nearest codes; here they are treated as all layers.
    """

    recipe = Recipe(observer="percentile")

    def fit_layer(self, visit: Visit) -> None:
        """See :meth:`LayerwiseMethod.fit_layer`."""
        layer, quantizer = visit.module, visit.module.weight_quantizer
        own = weight_rows(layer, layer.weight).double()
        bias = torch.zeros_like(own[:, :, :1]) if layer.bias is None else by_row(layer, layer.bias)
        sums = _sums(visit)
        weights = [reduce_activation_error(*part) for part in zip(torch.cat([own, bias], 2), sums.gram, sums.cross)]
        quantizer.calibrate(torch.stack(weights)[:, :, :-1].reshape(layer.weight.shape).float())
        grids = zip(by_row(layer, quantizer.scale), by_row(layer, quantizer.zero_point))
        rounded = [
            reduce_weight_error(weight, gram, sums.count, *grid, quantizer.grid)
            for weight, gram, grid in zip(weights, sums.gram, grids)
        ]
        layer.set_codes(torch.stack([codes for codes, _ in rounded]).reshape(layer.weight.shape))
        # As beta, so that the float layer, the target of compensations, keeps its bias.
        change = torch.cat([fitted for _, fitted in rounded]) - bias.flatten()
        layer.set_compensation(torch.ones_like(change), change)


@dataclass
class _Sums:
    """Sums over the rows of A = [Q(X), 1] and Y, X and Y being a layer's input and output in the float network.

    Attributes:
        count: number of rows.
        gram: A'A, float64 (groups, d + 1, d + 1).
        cross: A'Y, float64 (groups, d + 1, outputs).
    """

    count: int
    gram: Tensor
    cross: Tensor


def _sums(visit: Visit) -> _Sums:
    layer, found = visit.module, _Sums(0, torch.zeros(()), torch.zeros(()))
    for _, _, x in visit.layer_inputs("input"):
        for inputs, outputs in rows(layer, layer.input_quantizer(x), layer.full_precision(x)):
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :, :1])], 2).double().transpose(1, 2)
            found.count += inputs.shape[2]
            found.gram = found.gram + inputs @ inputs.transpose(1, 2)
            found.cross = found.cross + inputs @ outputs.double()
    count, gram, cross = visit.walk.processes.added([found.count, found.gram, found.cross])
    return _Sums(int(count), gram, cross)


def reduce_activation_error(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return the weight plus the ridge regression of what it lacks (Aqer, equation 7).

    Args:
        weight: weight and bias, float64 (outputs, d + 1).
        gram, cross: A'A, (d + 1, d + 1), and A'Y, (d + 1, outputs).
        ridge: lambda.
    """
    return weight + _solved(gram, cross - gram @ weight.T, ridge).T


def reduce_weight_error(
    weight: Tensor, gram: Tensor, count: int, scale: Tensor, zero_point: Tensor, grid: Grid, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """Return integer codes (outputs, d) and bias (outputs,) of a weight with bias, float64 (Wqer, algorithm 1).

    Args:
        weight: weight and bias, float64 (outputs, d + 1).
        gram: A'A, (d + 1, d + 1).
        count: number of rows of A.
        scale, zero_point: the weight's grid, (outputs, 1).
        grid: its codes.
        ridge: lambda.
    """
    weight, size = weight.clone(), weight.shape[1]
    codes = torch.empty_like(weight[:, :-1])
    start = 0
    while size - start > 1:
        half = slice(start, start + (size - start) // 2)
        rest = slice(half.stop, size)

        def error(code: Tensor, half: slice = half) -> Tensor:
            return ((code + zero_point).clamp(grid.qmin, grid.qmax) - zero_point) * scale - weight[:, half]

        exact = weight[:, half] / scale
        errors = refined(error(exact.round()), error(exact.floor()), error(exact.ceil()), gram[half, half] / count)
        weight[:, half] += errors
        codes[:, half] = (weight[:, half] / scale + zero_point).round()
        weight[:, rest] -= _solved(gram[rest, rest], gram[rest, half] @ errors.T, ridge).T
        start = half.stop
    return codes, weight[:, -1]


def refined(errors: Tensor, low: Tensor, high: Tensor, moments: Tensor) -> Tensor:
    """Round single weights the other way while that lowers e' M e per output (rounding refinement, section 3.3.1).

    In each step, every output's weight with the steepest slope that has its error's sign moves against the slope.

    Args:
        errors: rounding errors e, (outputs, k).
        low, high: errors of rounding down and up.
        moments: M, second moments of the inputs, (k, k).
    """
    errors, outputs = errors.clone(), torch.arange(len(errors), device=errors.device)
    slope = errors @ moments  # half the gradient
    for _ in range(FLIPS):
        steepest, column = torch.where(errors * slope > 0, slope.abs(), torch.zeros_like(slope)).max(1)
        at = (outputs, column)
        wanted = errors[at] - 2 * slope[at]
        other = torch.where((wanted - high[at]).abs() <= (wanted - low[at]).abs(), high[at], low[at])
        change = other - errors[at]
        gain = 2 * change * slope[at] + change.square() * moments[column, column]
        change = torch.where((gain <= 0) & (steepest > 0), change, torch.zeros_like(change))
        if not change.any():
            break
        errors[at] += change
        slope += change[:, None] * moments[column]
    return errors


def _solved(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram + ridge * eye))
