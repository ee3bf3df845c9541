"""The rule by which a layer becomes integers; the simulation and folding both use it.

y = alpha * (s_x s_w (codes * weight codes) + bias) + beta is, per output channel, a product of integers with scale
s_x * s plus an int32 bias on the same scale. Here s = |alpha| s_w 2^-shift, and the weight codes become
sign(alpha) * weight codes * 2^shift (QwT-v2, arXiv 2505.20932).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# An int32 accumulator holds the sum of bias and products. Each may use half of its range, which is far more than the
# products of a layer with 60,000 inputs need.
BIAS_LIMIT = 2**30


@dataclass(frozen=True)
class ChannelScales:
    """The integer form of a layer's output channels.

    Attributes:
        scale: scale of the weight codes, float32 (C_out,), as engines store it.
        sign: factor of the codes, -1, 0 or 1, (C_out,); 0 for a channel that alpha switches off.
        shift: number of bits by which the codes are shifted left.
        coarser: factor by which the scale had to grow for the bias to fit into int32, float64 (C_out,), at least 1.
        input_scale: scale of the input codes, float32, ().
    """

    scale: Tensor
    sign: Tensor
    shift: int
    coarser: Tensor
    input_scale: Tensor

    @property
    def bias_scale(self) -> Tensor:
        """Scale of the bias codes, float32 (C_out,)."""
        return self.input_scale * self.scale

    def codes(self, codes: Tensor) -> Tensor:
        """Return the int8 weight codes that engines use, from the codes on the weight's own grid, (C_out, ...)."""

        def rows(values: Tensor) -> Tensor:
            return values.reshape(-1, *[1] * (codes.dim() - 1))

        shifted = codes * rows(self.sign).to(codes.dtype) * 2**self.shift
        if bool((self.coarser > 1).any()):  # this loses at most 2^-31 of the bias per product
            shifted = torch.round(shifted / rows(self.coarser))
        return shifted.to(torch.int8)

    def bias_codes(self, bias: Tensor) -> Tensor:
        """Return the int32 codes of a bias, (C_out,)."""
        codes = torch.round(bias.double() / self.bias_scale.double())
        return codes.clamp(-BIAS_LIMIT, BIAS_LIMIT).to(torch.int32)

    def rounded(self, bias: Tensor) -> Tensor:
        """Return a bias rounded to the codes that engines add, in its own type, (C_out,)."""
        return (self.bias_codes(bias).double() * self.bias_scale.double()).to(bias.dtype)


def channel_scales(
    weight_scale: Tensor, input_scale: Tensor, bits: int, alpha: Tensor | None, bias: Tensor
) -> ChannelScales:
    """Return the integer form of a layer's output channels.

    Args:
        weight_scale: scale of the weight's grid, float64 (C_out,).
        input_scale: scale of the input's grid, float32, ().
        bits: bit width of the weight.
        alpha: CWAC's factor, (C_out,); ``None`` for 1.
        bias: alpha * bias + beta, (C_out,).
    """
    smallest = torch.finfo(torch.float32).tiny * 2**24
    alpha = torch.ones_like(weight_scale) if alpha is None else alpha.double()
    shift = free_bits(bits)
    # A channel whose scale would underflow float32 gets zero codes and a tiny scale, which keeps its bias accurate.
    off = alpha.abs() * weight_scale < smallest
    scale = torch.where(off, (weight_scale / BIAS_LIMIT).clamp(min=smallest), weight_scale * alpha.abs()) / 2**shift
    sign = torch.where(off, torch.zeros_like(alpha), torch.sign(alpha))
    needed = bias.double().abs() / (input_scale.double() * BIAS_LIMIT)
    coarse = torch.maximum(scale, needed)
    return ChannelScales(coarse.float(), sign, shift, coarse / scale, input_scale)


def free_bits(bits: int) -> int:
    """Return by how many bits ``bits``-bit weight codes can be shifted left inside int8, with room for a sign flip.

    The products stay exactly the same if the scale is divided by the same power of two. The bias, which engines add on
    the grid s_x * s_w, gets a grid as fine as at 8 bits.
    """
    return max(0, 7 - bits)
