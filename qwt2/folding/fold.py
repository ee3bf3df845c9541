"""Fold compensation into the integer layers' own scales and biases."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

from torch import nn

from qwt2.capture.graph import GraphModel
from qwt2.compensation.blocks import AffineCompensation, LinearCompensation
from qwt2.errors import Qwt2Error
from qwt2.folding.check import differing_steps
from qwt2.folding.layers import (
    IntegerAdd,
    IntegerConv2d,
    IntegerLinear,
    IntegerMatmul,
    IntegerPooling,
    WidenedCompensation,
)
from qwt2.quantization.info import quantization_info
from qwt2.quantization.layers import (
    QuantizedAdd,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedMatmul,
    QuantizedModule,
    QuantizedPooling,
)
from qwt2.quantization.quantizers import Quantizer, UniformQuantizer


def fold(qmodel: GraphModel) -> GraphModel:
    """Return the integer model that engines run, with every CWAC compensation folded into its layers.

    Per output channel, s_w <- |alpha| s_w, codes <- sign(alpha) codes and bias <- alpha bias + beta (QwT-v2, arXiv
    2505.20932). The result has no more operations or bytes than plain PTQ. QwT's added layers cannot be folded; they
    stay behind their blocks in float.

    Every integer module is compared with the simulation, without images. One that differs by more than an output step
    is left in float, with a warning, and listed in the result's ``quantization.float_modules``.

    Args:
        qmodel: a quantized model, compensated or not; it is not changed.

    Raises:
        Qwt2Error: if the model is not quantized, or has a quantizer or a compensation that integer engines cannot run.
    """
    quantization_info(qmodel)
    _refuse_simulation_only(qmodel)
    folded = copy.deepcopy(qmodel)
    kinds: dict[type, Callable[..., nn.Module]] = {
        QuantizedLinear: IntegerLinear, QuantizedConv2d: IntegerConv2d, QuantizedMatmul: IntegerMatmul,
        QuantizedAdd: IntegerAdd, QuantizedPooling: IntegerPooling, LinearCompensation: WidenedCompensation,
    }  # fmt: skip
    for kind, integer in kinds.items():
        for name in folded.calls(kind):
            folded.set_module(name, integer(folded.get_submodule(name)).train(qmodel.training))
    for name, steps in differing_steps(qmodel, folded).items():
        folded.set_module(name, _in_float(qmodel.get_submodule(name)))
        reason = f"its folded form differs by {steps:.1f} output steps from the simulation"
        folded.quantization.float_modules[name] = reason
        warnings.warn(f"{name} stays in float: {reason}, a defect of this library", stacklevel=2)
    return folded


def _in_float(module: QuantizedModule) -> QuantizedModule:
    """Return a copy without quantizers and compensation."""
    plain = copy.deepcopy(module)
    plain.quantized = False
    for name in plain.quantizers():
        setattr(plain, name, None)
    if isinstance(plain, QuantizedLayer):
        plain.set_compensation(None, None)
    return plain


def _refuse_simulation_only(qmodel: nn.Module) -> None:
    for name, module in qmodel.named_modules():
        if isinstance(module, AffineCompensation):
            raise Qwt2Error(f"{name}: CWAC on a whole block cannot be folded; compensate with granularity='module'")
        if isinstance(module, Quantizer) and (reason := _not_integer(module, name)):
            raise Qwt2Error(f"{name}: {reason}; integer engines cannot run it, quantize with another method")


def _not_integer(quantizer: Quantizer, name: str) -> str:
    if not isinstance(quantizer, UniformQuantizer):
        return "the log-sqrt2 grid is simulation only"
    if not bool((quantizer.zero_point == quantizer.zero_point.round()).all()):
        return "its zero point is fractional"
    if not bool(((quantizer.zero_point >= quantizer.grid.qmin) & (quantizer.zero_point <= quantizer.grid.qmax)).all()):
        return "its zero point lies outside its codes"
    if name.endswith("weight_quantizer"):
        return "" if quantizer.grid.symmetric else "weight codes with a zero point"
    return "" if quantizer.channel_axis is None else "it has one scale per channel"
