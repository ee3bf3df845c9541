"""Names in the files of this library: those of a model's stored tensors, of their parts, and of what passes add."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import numpy as np

# Names of nodes that qwt2.onnx.passes.quantizers adds in front of a pooling.
POOLED = "pooled/"
_PART = re.compile(r"(.+)/(\d+)of(\d+)")


def part_name(name: str, number: int, count: int) -> str:
    """Name of a part of a stored tensor, or of anything else of its layer (:mod:`qwt2.onnx.passes.projections`)."""
    return f"{name}/{number}of{count}"


def part_names(name: str, names: Collection[str]) -> list[str]:
    """``name`` if it is among ``names``, else those of its parts, in order; empty if it has none."""
    if name in names:
        return [name]
    count = next((int(match[3]) for key in names if (match := _PART.fullmatch(key)) and match[1] == name), 0)
    return [part_name(name, number, count) for number in range(count)]


def stored_values(name: str, state: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """What a file stores under ``name`` of a model's tensors: one of them, or a part of it; else ``None``."""
    if name in state:
        return state[name]
    match = _PART.fullmatch(name)
    if match is None or match[1] not in state:
        return None
    return np.ascontiguousarray(np.split(state[match[1]], int(match[3]), axis=-1)[int(match[2])])
