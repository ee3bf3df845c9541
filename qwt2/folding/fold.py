"""Folding: compensation disappears into the integer layers' own scales and biases."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from qwt2.errors import Qwt2Error
from qwt2.folding.layers import (
    IntegerAdd,
    IntegerConv2d,
    IntegerLayer,
    IntegerLinear,
    IntegerMatmul,
    IntegerPooling,
    WidenedCompensation,
)
from qwt2.quantization.layers import (
    BIAS_LIMIT,
    AffineBlock,
    CompensatedBlock,
    QuantizedConv2d,
    QuantizedLayer,
    free_bits,
)
from qwt2.quantization.quantize import quantization_info
from qwt2.quantization.quantizers import Quantizer, UniformQuantizer
from qwt2.capture.rewrite import replace_module


def fold(qmodel: nn.Module) -> nn.Module:
    """The integer model that engines run, with every CWAC folded away.

    Per output channel, s_w <- |alpha| s_w, codes <- sign(alpha) codes and bias <- alpha bias + beta
    (QwT-v2, arXiv 2505.20932): no operation and no byte more than plain PTQ. QwT's added layers
    cannot be folded and stay beside their blocks in float.

    Args:
        qmodel: a quantized model, compensated or not; it is left as it is.

    Raises:
        Qwt2Error: a model that is not quantized, or a quantizer that integer engines do not have
            (the module is named).
    """
    info = quantization_info(qmodel)
    _refuse_simulation_only(qmodel)
    folded = copy.deepcopy(qmodel)
    kinds = (
        (info.layers, fold_layer), (info.matmuls, IntegerMatmul), (info.additions, IntegerAdd), (info.poolings, IntegerPooling)
    )  # fmt: skip
    for names, integer in kinds:
        for name in names:
            replace_module(folded, name, integer(folded.get_submodule(name)))
    for name, module in list(folded.named_modules()):
        if isinstance(module, CompensatedBlock):
            layer = WidenedCompensation(module.block, module.weight, module.bias, module.stride, module.groups)
            replace_module(folded, name, layer)
    return folded


def fold_layer(layer: QuantizedLayer) -> IntegerLayer:
    """The integer form of one layer, its alpha and beta folded in float64."""
    scale, codes = _channel_scale(layer), layer.weight_quantizer.codes(layer.weight)
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.double()
    if layer.alpha is not None:
        alpha, beta = layer.alpha.double(), layer.beta.double()
        bias = alpha * bias + beta
        codes, scale = _scale_channels(codes, scale, alpha)
    shift = 2 ** free_bits(layer.weight_quantizer.grid.bits)
    codes, scale = codes * shift, scale / shift
    input_scale = layer.input_quantizer.scale.double()
    codes, scale = _make_room_for_bias(codes, scale, bias, input_scale)
    # The scales are stored in float32, so the bias is rounded to the grid that those make.
    stored = scale.float()
    bias_scale = (layer.input_quantizer.scale * stored).double()
    bias_codes = torch.round(bias / bias_scale).clamp(-BIAS_LIMIT, BIAS_LIMIT).to(torch.int32)
    kind = IntegerConv2d if isinstance(layer, QuantizedConv2d) else IntegerLinear
    return kind(layer, codes.to(torch.int8), stored, bias_codes)


def _channel_scale(layer: QuantizedLayer) -> Tensor:
    """The weight's scale as float64 (C_out,), also where the quantizer has one scale in all."""
    return layer.weight_quantizer.scale.double().expand(layer.out_channels).clone()


def _scale_channels(codes: Tensor, scale: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply channels by alpha: scales stay positive, so a negative alpha flips the codes.

    A channel that alpha switches off (so small that the scale would leave float32) gets zero codes
    and a tiny scale, on whose grid the bias, all that is left of the channel, is as good as exact.
    """
    smallest = torch.finfo(torch.float32).tiny * 2**24
    off = alpha.abs() * scale < smallest
    scale = torch.where(off, (scale / BIAS_LIMIT).clamp(min=smallest), scale * alpha.abs())
    sign = torch.where(off, torch.zeros_like(alpha), torch.sign(alpha))
    return codes * _rows(sign, codes).to(codes.dtype), scale


def _make_room_for_bias(codes: Tensor, scale: Tensor, bias: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Coarsen the scale of channels whose bias does not fit into int32 at s_x * s_w.

    That happens where alpha is tiny or beta huge. The codes are rounded to the coarser scale; what
    is lost is at most 2^-31 of the bias a product.
    """
    needed = bias.abs() / (input_scale * BIAS_LIMIT)
    coarse = torch.maximum(scale, needed)
    if bool((coarse > scale).any()):
        codes = torch.round(codes * _rows(scale / coarse, codes)).to(codes.dtype)
    return codes, coarse


def _rows(values: Tensor, codes: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (codes.dim() - 1))


def _refuse_simulation_only(qmodel: nn.Module) -> None:
    for name, module in qmodel.named_modules():
        if isinstance(module, AffineBlock):
            raise Qwt2Error(f"{name}: CWAC on a whole block cannot be folded; compensate with granularity='module'")
        if isinstance(module, Quantizer) and (reason := _not_integer(module, name)):
            raise Qwt2Error(f"{name}: {reason}; integer engines cannot run it, quantize with variant='default'")


def _not_integer(quantizer: Quantizer, name: str) -> str:
    if not isinstance(quantizer, UniformQuantizer):
        return "the log-sqrt2 grid is simulation only"
    if not bool((quantizer.zero_point == quantizer.zero_point.round()).all()):
        return "its zero point is fractional"
    if not bool(((quantizer.zero_point >= quantizer.grid.qmin) & (quantizer.zero_point <= quantizer.grid.qmax)).all()):
        return "its zero point lies outside its codes"
    if name.endswith("weight_quantizer"):
        return "" if quantizer.grid.symmetric else "weight codes with a zero point"
    return "" if quantizer.channel_axis is None else "it has one scale a channel"
