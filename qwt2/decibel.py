"""Ratios of powers on a logarithmic scale."""

import math


def decibel(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise) for two powers; infinity without noise."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
