"""RepQ-ViT (arXiv 2212.08254): scale re-parameterisation for post-LayerNorm activations.

LayerNorm outputs are calibrated with one scale and zero point per channel, which no integer kernel can run. The
channel-wise part then moves into the LayerNorm's affine parameters and the following Linear's weight and bias
(equations 6-9). This leaves one scale and one zero point per tensor, and does not change the float function.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qwt2.quantization.info import quantization_info
from qwt2.quantization.layers import QuantizedLinear
from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import PAPER, PTQMethod, Recipe
from qwt2.quantization.walk import Walk


@PTQ_METHODS.register("repq")
class RepQ(PTQMethod):
    """RepQ-ViT on grids that integer engines support."""

    recipe = Recipe(observer="percentile")

    def fit(self, walk: Walk, recipe: Recipe) -> None:
        """Choose the ranges, per channel after a LayerNorm, and re-parameterise."""

        def modules(names: list[str]) -> list[QuantizedLinear]:
            return [walk.model.get_submodule(name) for name in names]

        consumers = quantization_info(walk.model).norm_consumers
        quantizers: list[Any] = [linear.input_quantizer for names in consumers.values() for linear in modules(names)]
        for quantizer in quantizers:
            quantizer.channel_axis = -1
        super().fit(walk, recipe)
        for norm, names in consumers.items():
            reparameterize(walk.model.get_submodule(norm), modules(names), recipe)


def reparameterize(norm: nn.LayerNorm, linears: list[QuantizedLinear], recipe: Recipe) -> None:
    """Move the channel-wise scales of a LayerNorm's output into the norm and the Linears, in place.

    With r = scale / mean(scale) and b = min / r - target_min per channel: norm.weight /= r,
    norm.bias = norm.bias / r - b, Linear.weight *= r per column, Linear.bias += weight @ b. The float function is the
    same for any target zero point, so rounding the zero point (which integer engines need) costs nothing.

    Args:
        norm: the LayerNorm, affine or not.
        linears: every Linear that reads its output, calibrated with per-channel input quantizers.
        recipe: the grids; tells whether to round the zero point.
    """
    first: Any = linears[0].input_quantizer
    scale, zero_point = first.scale, first.zero_point
    target_scale, target_zero = scale.mean(), zero_point.mean()
    if recipe.integer_zero_points:
        target_zero = target_zero.round().clamp(first.grid.qmin, first.grid.qmax)
    ratio = scale / target_scale
    shift = -zero_point * scale / ratio + target_zero * target_scale
    with torch.no_grad():
        _scale_norm(norm, ratio, shift)
        for linear in linears:
            _absorb(linear, ratio, shift)
            linear.input_quantizer.set_parameters(target_scale, target_zero)
            linear.weight_quantizer.calibrate(linear.weight)


def _scale_norm(norm: nn.LayerNorm, ratio: Tensor, shift: Tensor) -> None:
    weight = torch.ones_like(ratio) if norm.weight is None else norm.weight
    bias = torch.zeros_like(ratio) if norm.bias is None else norm.bias
    norm.weight = nn.Parameter(weight / ratio, requires_grad=False)
    norm.bias = nn.Parameter(bias / ratio - shift, requires_grad=False)


def _absorb(linear: QuantizedLinear, ratio: Tensor, shift: Tensor) -> None:
    weight = linear.weight * ratio
    bias = weight @ shift
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = nn.Parameter(bias if linear.bias is None else linear.bias + bias, requires_grad=False)


@PTQ_METHODS.register("repq_published")
class PublishedRepQ(RepQ):
    """RepQ-ViT's own grids: asymmetric weights, fractional zero points, a log-sqrt2 softmax; simulation only."""

    recipe = replace(PAPER, integer_zero_points=False, log_softmax=True, log_floor=1e-6)
