"""Bit widths of a quantized model."""

from __future__ import annotations

from dataclasses import dataclass

from qwt2.errors import Qwt2Error

WEIGHT_BITS = range(2, 9)
ACTIVATION_BITS = range(3, 9)


@dataclass(frozen=True)
class Precision:
    """Bit widths of weights and activations.

    Args:
        weight_bits: bits of every weight, 2 to 8.
        activation_bits: bits of every activation, 3 to 8.
        first_last_bits: bits of weight and input of the first and last layers (the published settings keep them at
            8); ``None`` gives them the same bits as all other layers.
        softmax_bits: bits of the attention probabilities if they are quantized uniformly. They lie in [0, 1], and
            keeping them in 8 bits is cheap on every integer engine.

    Raises:
        Qwt2Error: if a bit width is outside its range.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    first_last_bits: int | None = 8
    softmax_bits: int = 8

    def __post_init__(self):
        _check("weight_bits", self.weight_bits, WEIGHT_BITS)
        _check("activation_bits", self.activation_bits, ACTIVATION_BITS)
        _check("softmax_bits", self.softmax_bits, ACTIVATION_BITS)
        if self.first_last_bits is not None:
            _check("first_last_bits", self.first_last_bits, ACTIVATION_BITS)


def _check(name: str, value: int, allowed: range) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        raise Qwt2Error(f"precision: {name} is {value!r}; use a whole number from {allowed[0]} to {allowed[-1]}")
