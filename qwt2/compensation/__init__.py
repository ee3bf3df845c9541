"""Compensation of quantization error in closed form: QwT and QwT-v2's CWAC, one file each."""

from __future__ import annotations

import math
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ContextManager, Iterable

import torch
from torch import nn

from qwt2.errors import Qwt2Error
from qwt2.quantization.quantize import quantization_info
from qwt2.registry import Registry

COMPENSATIONS: Registry = Registry("compensation method", __name__)


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


def compensate(
    qmodel: nn.Module, calibration: Iterable[Any], method: str = "cwac", offload_dir: str | None = None, **options: Any
) -> CompensationReport:
    """Compensate a quantized model's error, in place.

    Blocks are processed in execution order. What is kept per calibration image is the input of the
    current block and the outputs of sections, in memory or on disk, once for the quantized network and
    once more where the target is the full-precision network's own activation.

    Args:
        qmodel: a model from :func:`qwt2.quantize`.
        calibration: batches as in :func:`qwt2.quantize`; gone through once, in order.
        method: "cwac" or "qwt".
        offload_dir: existing folder for the block inputs, which go into a temporary folder inside it;
            ``None`` keeps them in memory.
        options: settings of the method (:class:`qwt2.compensation.cwac.CWAC`,
            :class:`qwt2.compensation.qwt.QwT`).

    Raises:
        Qwt2Error: unknown method, option or option value, a missing folder, a model that is not
            quantized, an empty calibration set, or NaN/infinity in an activation (the module is named).
    """
    started = time.perf_counter()
    quantization_info(qmodel)
    settings = COMPENSATIONS.get(method)
    known = [setting.name for setting in fields(settings)]
    if unknown := [name for name in options if name not in known]:
        raise Qwt2Error(f"{method}: unknown option {unknown[0]!r}; use some of: {', '.join(known)}")
    compensation = settings(**options)
    with torch.no_grad(), _temporary_folder(offload_dir) as folder:
        modules = compensation.fit(qmodel, calibration, folder)
    return CompensationReport(method, modules, time.perf_counter() - started)


def _temporary_folder(parent: str | None) -> ContextManager[str | None]:
    """A folder of this run alone, so that runs can share ``parent`` and an error leaves nothing behind."""
    if parent is None:
        return nullcontext()
    if not Path(parent).is_dir():
        raise Qwt2Error(f"{parent} is no folder; make it first, or leave out offload_dir to work in memory")
    return tempfile.TemporaryDirectory(prefix="qwt2-", dir=parent)
