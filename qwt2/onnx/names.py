"""Names in the files of this library: of a model's stored tensors, of their parts, and of nodes that passes add."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import numpy as np

# Prefix of the nodes that qwt2.onnx.passes.quantizers adds in front of a pooling.
POOLED = "pooled/"
_PART = re.compile(r"(.+)/(\d+)of(\d+)")


def part_name(name: str, number: int, count: int) -> str:
    """Return the name of one part of a layer's tensor or node (:mod:`qwt2.onnx.passes.projections`)."""
    return f"{name}/{number}of{count}"


def part_names(name: str, names: Collection[str]) -> list[str]:
    """Return ``[name]`` if ``names`` has it, else the names of its parts in order; empty if there are none."""
    if name in names:
        return [name]
    count = next((int(match[3]) for key in names if (match := _PART.fullmatch(key)) and match[1] == name), 0)
    return [part_name(name, number, count) for number in range(count)]


def stored_values(name: str, state: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return the model's tensor, or the part of one, that a file stores under ``name``; ``None`` if there is none."""
    if name in state:
        return state[name]
    match = _PART.fullmatch(name)
    if match is None or match[1] not in state:
        return None
    return np.ascontiguousarray(np.split(state[match[1]], int(match[3]), axis=-1)[int(match[2])])
