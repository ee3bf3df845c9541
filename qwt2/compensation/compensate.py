"""Compensation of quantization error in closed form."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qwt2.capture.batch import model_inputs
from qwt2.capture.graph import GraphModel
from qwt2.compensation.methods import COMPENSATIONS
from qwt2.compensation.report import CompensationReport
from qwt2.errors import Qwt2Error
from qwt2.quantization.checks import check_batches
from qwt2.quantization.info import quantization_info
from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.processes import Processes
from qwt2.quantization.walk import Progress, Walk


def compensate(
    qmodel: GraphModel, calibration: Iterable[Any], method: str = "cwac", offload_dir: str | None = None,
    memory_limit: int = 0, progress: Progress | None = None, group: dist.ProcessGroup | None = None, **options: Any,
) -> CompensationReport:  # fmt: skip
    """Compensate a quantized model's error, in place.

    The calibration set is run through the graph once, module by module. For every image, the values that are alive at
    the current position are stored in memory or on disk: once for the quantized network, and once for the
    full-precision network if its own activations are the target.

    Args:
        qmodel: a model from :func:`qwt2.quantize`.
        calibration: batches as in :func:`qwt2.quantize`; read once, in order.
        method: a registered compensation method ("cwac", "qwt").
        offload_dir: existing folder for stored values, which go into a temporary folder inside it; ``None`` keeps them
            in memory.
        memory_limit: bytes per network that stay in memory before the folder is used.
        progress: called with the number of compensated modules and the number of all modules, for progress bars.
        group: processes that call this together, as with ``torchrun``. Each of them gives the same model and the same
            calibration set, of which it runs its share of the batches, and gets the same result.
        options: settings of the method (:class:`qwt2.compensation.methods.cwac.CWAC`,
            :class:`qwt2.compensation.methods.qwt.QwT`).

    Returns:
        A report on every compensated module, in execution order.

    Raises:
        Qwt2Error: if the method, an option or its value is unknown, the folder does not exist, the model is not
            quantized, the calibration set is empty or does not fit, an activation is NaN or infinite (the module is
            named), or processes disagree.
    """
    started = time.perf_counter()
    info = quantization_info(qmodel)
    settings = COMPENSATIONS.get(method)
    known = [setting.name for setting in fields(settings)]
    if unknown := [name for name in options if name not in known]:
        raise Qwt2Error(f"{method}: unknown option {unknown[0]!r}; use some of: {', '.join(known)}")
    compensation = settings(**options)
    batches = list(model_inputs(qmodel, calibration))
    check_batches(batches, info.input_shape, qmodel)
    processes = Processes(group)
    processes.check_batches(batches)
    with torch.no_grad(), _temporary_folder(offload_dir) as folder:
        walk = Walk(qmodel, batches, folder, memory_limit, progress, processes)
        modules = compensation.fit(walk, PTQ_METHODS.get(info.method).recipe)
    processes.check_parameters(qmodel)
    return CompensationReport(method, modules, time.perf_counter() - started)


def _temporary_folder(parent: str | None) -> AbstractContextManager[str | None]:
    """Return a temporary folder for this run, so that runs can share ``parent`` and errors leave nothing behind."""
    if parent is None:
        return nullcontext()
    if not Path(parent).is_dir():
        raise Qwt2Error(f"{parent} is no folder; make it first, or leave out offload_dir to work in memory")
    return tempfile.TemporaryDirectory(prefix="qwt2-", dir=parent)
