"""Refit: weight, rounding, scale and offset of each layer in closed form, given the layer's quantized input.

Per layer, in execution order on the already compensated network: ridge regression of the weight towards the target,
rounding with error feedback, then CWAC. Only int8 codes, scales and biases change, so everything folds away.

Related methods: GPTQ (arXiv 2210.17323) rounds with the same feedback towards the layer's own output. GPTAQ (arXiv
2504.02692) and Qronos (arXiv 2505.11695) round towards the full-precision network's output, given the quantized input.
ERQ (arXiv 2407.06794) has a ridge regression against the error of activations, and a rounding of its own. Refit takes
the regression of ERQ, the rounding of GPTQ and the affine map of QwT-v2 (arXiv 2505.20932), and aims at what the
residual stream lacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qwt2.compensation.methods import COMPENSATIONS
from qwt2.compensation.methods.cwac import (
    affine,
    check_calibration,
    estimator_at,
    held_out_batches,
    remove_compensation,
    shrunk,
)
from qwt2.compensation.moments import Moments
from qwt2.compensation.report import ModuleReport
from qwt2.errors import Qwt2Error
from qwt2.quantization.layers import QuantizedLayer
from qwt2.quantization.recipe import Recipe
from qwt2.quantization.regression import Regression, cholesky
from qwt2.quantization.rounding import Feedback
from qwt2.quantization.rows import by_row, rows, weight_rows
from qwt2.quantization.walk import Visit, Walk


@COMPENSATIONS.register("refit")
@dataclass
class Refit:
    """Settings of the refit.

    Args:
        target: "stream", "global" or "local", as in :class:`qwt2.compensation.methods.cwac.CWAC`.
        ridges: strengths of the pull towards the original weight, as shares of the Gram matrix's mean diagonal. The one
            with the least error on held-out images is taken, per layer; two further candidates keep the original weight
            with the rounding by feedback, or with the PTQ method's own codes. These are left only for a gain of more
            than 2 / n of their error on n held-out images, since less may be chance. Scale and offset must lower the
            error on held-out images, too.
        ranges: as in :class:`qwt2.compensation.methods.cwac.CWAC`.
        holdout: share of the calibration batches held out to choose among the candidates, at least one batch.
        rows_per_input: number of rows (images times positions) per input of an output that the regressions take, about.
            More are thinned out evenly: a convolution on large images has far more than determine its weight.

    Raises:
        Qwt2Error: if a setting has an unknown value.
    """

    LABEL: ClassVar[str] = "Refit"
    ORDER: ClassVar[int] = 30
    COLOUR: ClassVar[str] = "#c2410c"

    target: str = "stream"
    ridges: Sequence[float] = (0.05, 0.3, 1.0)
    ranges: str | None = "mse"
    holdout: float = 0.25
    rows_per_input: int = 64

    def __post_init__(self) -> None:
        if self.target not in ("stream", "global", "local"):
            raise Qwt2Error(f"refit: unknown target {self.target!r}; use one of: stream, global, local")
        if not isinstance(self.ridges, (list, tuple)) or not all(
            isinstance(ridge, (int, float)) and 0 < ridge < math.inf for ridge in self.ridges
        ):
            raise Qwt2Error(f"refit: ridges are {self.ridges!r}; use a list of numbers above 0")
        if not isinstance(self.rows_per_input, int) or self.rows_per_input < 1:
            raise Qwt2Error(f"refit: rows_per_input is {self.rows_per_input!r}; use a whole number above 0")
        check_calibration("refit", self.ranges, self.holdout)

    @property
    def exportable(self) -> bool:
        """Whether integer engines can run the result."""
        return True

    def fit(self, walk: Walk, recipe: Recipe) -> list[ModuleReport]:
        """Fit and apply the compensation in place; an earlier one in the layers is removed first.

        Args:
            walk: the calibration set on its way through the quantized model.
            recipe: the PTQ method's grids; not used.

        Returns:
            One report per layer, in execution order.

        Raises:
            Qwt2Error: if there are fewer than two batches, or an output is NaN or infinite (the module is named).
        """
        if len(walk.batches) < 2:
            raise Qwt2Error("refit holds out whole batches; give at least two calibration batches")
        remove_compensation(walk)
        held = held_out_batches(len(walk.batches), self.holdout)
        return [self._fit(visit, held) for visit in walk.layer_visits(self.ranges)]

    def _fit(self, visit: Visit, held: set[int]) -> ModuleReport:
        layer = visit.module
        fitted, held_out = self._sums(visit, held)
        every = fitted + held_out
        before = moments(every, weight_rows(layer, layer.quantized_weight))
        choices = candidates(layer, fitted, self.ridges)
        images = visit.walk.images(), visit.walk.images(held)
        errors = [held_out_error(c.weight, fitted, held_out, images[0] - images[1]) for c in choices]
        plain = float(moments(held_out, choices[0].weight).squared_error().sum())
        best, certain = min(range(len(choices)), key=errors.__getitem__), 1 - 2 / images[1]
        ridge = choices[best].ridge if errors[best] < certain * min(errors[0], plain) else None
        is_affine = ridge is not None or errors[0] < plain
        chosen = choices[0] if ridge is None else _rounded(layer, every, [ridge])[0]
        chosen.apply(layer)
        after = moments(every, chosen.weight)
        parameters = affine(after, estimator_at(visit.is_inside_branch))
        alpha, beta = shrunk(*parameters, after, images[0])
        if not is_affine:
            alpha, beta = torch.ones_like(alpha), torch.zeros_like(beta)
        bias = torch.zeros_like(beta) if layer.bias is None else layer.bias.double()
        layer.set_compensation(alpha.float(), (beta + bias - alpha * bias).float())
        return _report(visit.name, before, after, alpha, beta, ridge)

    def _sums(self, visit: Visit, held_out: set[int]) -> tuple[Regression, Regression]:
        """Return the sums of the layer's inputs and targets without its bias, of fitted and of held-out images."""
        layer = visit.module
        sums: dict[bool, Regression] = {}
        for index, x, y in visit.layer_inputs(self.target):
            for part_x, part_y in rows(layer, x, layer.without_bias(y)):
                count = part_x.shape[1]
                step = count * len(visit.walk.batches) // (self.rows_per_input * part_x.shape[2])
                step = min(max(step, 1), count)
                part = Regression.of(part_x[:, index % step :: step], part_y[:, index % step :: step], torch.float32)
                key = index in held_out
                sums[key] = sums[key] + part if key in sums else part
        sums = visit.walk.processes.merged(sums)
        if not all(torch.isfinite(part.power).all() for part in sums.values()):
            raise Qwt2Error(f"{visit.name} gives NaN or infinity on the calibration images; check its weights")
        return sums[False], sums[True]


@dataclass(frozen=True)
class Candidate:
    """A rounded weight.

    Attributes:
        ridge: strength of the regression; infinite for the original weight, ``None`` for the PTQ method's own codes.
        codes: integer codes, (groups, outputs, d).
        scale, zero_point: the weight's grid, (C_out,) or ().
        weight: the weight that the codes stand for, float64 (groups, outputs, d).
    """

    ridge: float | None
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    weight: Tensor

    def apply(self, layer: QuantizedLayer) -> None:
        """Store the codes in the layer."""
        layer.weight_quantizer.set_parameters(self.scale, self.zero_point, layer.weight_quantizer.channel_axis)
        layer.set_codes(self.codes.reshape(layer.weight.shape))


def candidates(layer: QuantizedLayer, sums: Regression, ridges: Sequence[float]) -> list[Candidate]:
    """Return the PTQ method's own codes, the original weight and those of ridge regressions, rounded by feedback."""
    quantizer = layer.weight_quantizer
    codes = weight_rows(layer, layer.weight_codes)
    values = weight_rows(layer, layer.quantized_weight).double()
    own = Candidate(None, codes, quantizer.scale, quantizer.zero_point, values)
    return [own, *_rounded(layer, sums, [math.inf, *ridges])]


def _rounded(layer: QuantizedLayer, sums: Regression, ridges: Sequence[float]) -> list[Candidate]:
    quantizer, own = layer.weight_quantizer, weight_rows(layer, layer.weight).double()
    weights = [refitted(own, sums, ridge) for ridge in ridges]
    grids = [quantizer.chosen(weight.reshape(layer.weight.shape).float()) for weight in weights]

    scales, zero_points = (torch.cat([by_row(layer, part) for part in parts], 1) for parts in zip(*grids))
    codes = Feedback(sums.gram).rounded(torch.cat(weights, 1), scales, zero_points, quantizer.grid)
    values = (codes - zero_points) * scales
    parts = zip(ridges, codes.chunk(len(ridges), 1), grids, values.chunk(len(ridges), 1))
    return [Candidate(ridge, code, scale, zero, value) for ridge, code, (scale, zero), value in parts]


def refitted(weight: Tensor, sums: Regression, ridge: float) -> Tensor:
    """Return the ridge regression of the target on the input, pulled towards a weight instead of zero.

    W + (C' - W H) (H + ridge * mean(diag H) I)^-1 with H = X'X and C = X'Y of centred X and Y.

    Args:
        weight: the weight W that an infinite ridge keeps, float64 (groups, outputs, d).
        sums: H and C.
        ridge: strength of the pull.
    """
    if ridge == math.inf:
        return weight
    lack = sums.cross - sums.gram @ weight.transpose(1, 2)
    return weight + torch.cholesky_solve(lack, cholesky(sums.gram, ridge)).transpose(1, 2)


def held_out_error(weight: Tensor, fitted: Regression, held_out: Regression, images: int) -> float:
    """Return a weight's mean squared error on held-out images, compensated as other images would have it.

    Args:
        weight: (groups, outputs, d).
        fitted: sums of the other images.
        held_out: sums of the held-out images.
        images: number of the other images.
    """
    others = moments(fitted, weight)
    return float(moments(held_out, weight).squared_error(*shrunk(*affine(others), others, images)).sum())


def moments(sums: Regression, weight: Tensor) -> Moments:
    """Return the joint moments of X W' and the target, for a weight (groups, outputs, d)."""
    weight = weight.double()
    mean = (weight @ sums.mean_x[:, :, None]).flatten()
    var_q = ((weight @ sums.gram) * weight).sum(2).flatten() / sums.count
    cov = (weight.transpose(1, 2) * sums.cross).sum(1).flatten() / sums.count
    return Moments(sums.count, mean, sums.mean_t.flatten(), var_q.clamp(min=0), sums.power.flatten() / sums.count, cov)


def _report(
    name: str, before: Moments, after: Moments, alpha: Tensor, beta: Tensor, ridge: float | None
) -> ModuleReport:
    error, left = float(before.squared_error().sum()), float(after.squared_error(alpha, beta).sum())
    return ModuleReport(
        module=name,
        sqnr_before_db=before.sqnr_db(),
        sqnr_after_db=after.sqnr_db(alpha, beta),
        r2=1 - left / error if error > 0 else 0.0,
        kept=True,
        alpha=alpha,
        beta=beta,
        output_rms=math.sqrt(float((after.var_f + after.mean_f.square()).mean())),
        ridge=ridge,
    )
