"""Reports on the effect of a compensation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass
class ModuleReport:
    """The effect of compensation on one module or block.

    Attributes:
        module: name of the module or block.
        sqnr_before_db, sqnr_after_db: SQNR of its output against the target of the fit on the calibration set, dB.
        r2: share of the error that the compensation explains: of its variance for QwT, of its power for CWAC.
        kept: whether the compensation is applied.
        reason: reason why it is not applied, or "".
        alpha, beta: CWAC's parameters as applied, float64 (C,), with 1 and 0 for channels that the gate rejected;
            ``None`` for QwT.
        output_rms: root mean square of the target, to compare beta with.
        gate_before_db, gate_after_db: SQNR on the held-out images, without and with the parameters fitted on the other
            images, dB; NaN if no images were held out.
        ridge: strength of Refit's regression; infinite if it kept the weight and only rounded it by feedback, ``None``
            if it kept the PTQ method's own codes.
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
    ridge: float | None = None


@dataclass
class CompensationReport:
    """The result of a compensation.

    Attributes:
        method: name of the compensation method.
        modules: one report per module, in execution order.
        seconds: run time of the whole compensation.
    """

    method: str
    modules: list[ModuleReport] = field(default_factory=list)
    seconds: float = 0.0
