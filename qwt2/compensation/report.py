"""What a compensation did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass
class ModuleReport:
    """What compensation did to one module or block.

    Attributes:
        module: its name.
        sqnr_before_db, sqnr_after_db: of its output against the target it was fitted to, on the
            calibration set.
        r2: share of the error's variance (QwT) that the compensation explains.
        kept: whether the gate kept it.
        reason: why not.
        alpha, beta: CWAC's parameters as applied, float64 (C,): 1 and 0 where the gate rejected them; ``None`` for QwT.
        output_rms: root mean square of the target, which beta compares with.
        gate_before_db, gate_after_db: SQNR on the held-out images that the gate decided by, without and with the
            parameters fitted on the others; NaN where nothing was held out.
    """

    module: str
    sqnr_before_db: float
    sqnr_after_db: float
    r2: float
    kept: bool
    reason: str = ""
    alpha: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    output_rms: float = math.nan
    gate_before_db: float = math.nan
    gate_after_db: float = math.nan


@dataclass
class CompensationReport:
    """One entry per compensated module, in execution order, and the seconds it all took."""

    method: str
    modules: list[ModuleReport] = field(default_factory=list)
    seconds: float = 0.0
