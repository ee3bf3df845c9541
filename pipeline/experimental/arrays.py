"""Inputs by name, as engines take them: their batches, and the tensors that networks take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qwt2.capture.batch import Inputs

Arrays = dict[str, np.ndarray]


def split(inputs: Arrays, size: int) -> list[Arrays]:
    """Return batches of ``size`` inputs; the last one may be smaller."""
    starts = range(0, len(next(iter(inputs.values()))), size)
    return [{name: array[start : start + size] for name, array in inputs.items()} for start in starts]


def tensors(inputs: Arrays) -> Inputs:
    """Return arrays as tensors that share their memory."""
    import torch

    return {name: torch.from_numpy(array) for name, array in inputs.items()}
