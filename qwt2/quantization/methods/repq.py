"""RepQ-ViT (arXiv 2212.08254): scale re-parameterisation for post-LayerNorm activations.

LayerNorm outputs are calibrated with one scale and zero point a channel, which no integer kernel
can run. The channel-wise part then moves into the LayerNorm's affine parameters and the following
Linear's weight and bias (equations 6-9), which leaves one scale and one zero point a tensor and
does not change the float function.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwt2.quantization.layers import QuantizedLinear
from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import PTQMethod, Recipe
from qwt2.quantization.quantizers import UniformQuantizer


@dataclass
class RepQ(PTQMethod):
    def input_axis(self, layer: str, norm_consumers: dict[str, list[str]]) -> int | None:
        return -1 if any(layer in consumers for consumers in norm_consumers.values()) else None

    def after_calibration(self, model: nn.Module, norm_consumers: dict[str, list[str]], recipe: Recipe) -> None:
        for norm_name, names in norm_consumers.items():
            linears = [model.get_submodule(name) for name in names]
            linears = [m for m in linears if isinstance(m, QuantizedLinear)]
            # A consumer left in float would see the moved scales too, so it must be moved along.
            if len(linears) == len(names):
                reparameterize(model.get_submodule(norm_name), linears, recipe)


def reparameterize(norm: nn.LayerNorm, linears: list[QuantizedLinear], recipe: Recipe) -> None:
    """Move the channel-wise scales of a LayerNorm's output into the norm and the Linears, in place.

    With r = scale / mean(scale) and b = min / r - target_min per channel: norm.weight /= r,
    norm.bias = norm.bias / r - b, Linear.weight *= r per column, Linear.bias += weight @ b. The
    function is preserved for any target zero point, so rounding it (which integer engines need)
    costs nothing.

    Args:
        norm: the LayerNorm, affine or not.
        linears: every Linear that reads its output, calibrated with per-channel input quantizers.
    """
    first: UniformQuantizer = linears[0].input_quantizer
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


PTQ_METHODS.register("repq")(
    RepQ(
        variants={
            "default": Recipe(observer="percentile"),
            "openvino": Recipe(observer="percentile", output_bits=None, pooling_bits=8, centred=True),
            "tensorrt": Recipe(observer="percentile", symmetric_activations=True),
            "published": Recipe(
                observer="percentile",
                symmetric_weights=False,
                symmetric_matmuls=False,
                zero_in_range=False,
                integer_zero_points=False,
                log_softmax=True,
                log_floor=1e-6,
                output_bits=None,
                addition_bits=None,
            ),
        }
    )
)
