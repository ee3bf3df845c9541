"""Blocks: the parts of a network that are compensated, and executed, one after the other."""

from __future__ import annotations

import re
from typing import Iterable

from torch import nn

from qwt2.errors import Qwt2Error

_NUMBERED = re.compile(r"(^|_)\d+$")


def find_blocks(model: nn.Module, layers: list[str]) -> list[str]:
    """Names of the model's repeated blocks, in execution order.

    A block is a numbered child of a list or sequence (``blocks.3``, ``layer2.0``,
    ``layers.1.blocks.0``, ``encoder_layer_5``) that holds at least two quantizable layers and no smaller such child.

    Args:
        layers: names of the quantizable layers in execution order.
    """
    candidates: list[str] = []
    for layer in layers:
        for prefix in _numbered_prefixes(layer):
            if prefix not in candidates and sum(is_inside(other, prefix) for other in layers) >= 2:
                candidates.append(prefix)
    return [c for c in candidates if not any(other != c and is_inside(other, c) for other in candidates)]


def execution_units(layers: list[str], blocks: Iterable[str]) -> list[str]:
    """Blocks, and the layers outside them, in execution order.

    Raises:
        Qwt2Error: a block that holds no quantizable layer, or blocks inside each other.
    """
    blocks = list(blocks)
    for block in blocks:
        if not any(is_inside(layer, block) for layer in layers):
            raise Qwt2Error(f"block {block!r} holds no quantized layer; name modules that do, or leave blocks out")
        if any(is_inside(other, block) for other in blocks if other != block):
            raise Qwt2Error(f"block {block!r} holds another block; name blocks that do not overlap")
    units: list[str] = []
    for layer in layers:
        unit = next((block for block in blocks if is_inside(layer, block)), layer)
        if unit not in units:
            units.append(unit)
    return units


def is_inside(name: str, prefix: str) -> bool:
    """Whether a module is ``prefix`` or lies in it."""
    return name == prefix or name.startswith(prefix + ".")


def _numbered_prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts) - 1) if _NUMBERED.search(parts[i])]
