"""Export of folded models; the file is run on an engine, and kept only if it computes the same as the model."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwt2.capture.batch import Inputs, first, tensors
from qwt2.capture.check import outputs_of
from qwt2.engines import ENGINES, load_engine
from qwt2.errors import Qwt2Error
from qwt2.evaluation.metrics import sqnr_db
from qwt2.evaluation.mismatch import engine_mismatch, record_modules
from qwt2.folding.layers import IntegerLayer
from qwt2.io import atomic_path
from qwt2.onnx.export import OPSETS, write_onnx
from qwt2.onnx.file import load_onnx

# The check runs on the first of these engines that is installed. The last one only needs PyTorch.
_ENGINES = {"openvino": ("openvino", "onnxruntime", "torch_int8")}
_OTHERS = ("onnxruntime", "openvino", "torch_int8")
# Outputs with at least this SQNR pass at once. Two correct engines may differ more in a deep low-bit network, because
# one value on a rounding boundary changes everything after it; the modules are then compared one by one.
_CLOSE_DB = 20.0
_FAR_DB = 3.0
_MAX_STEPS = 1.5
_DISTURBANCE = 1e-3  # noise relative to the inputs, about what rounding to 8 bits adds


def export_onnx(
    folded: nn.Module,
    path: str | os.PathLike,
    example_input: Inputs,
    weight_storage: str = "int8",
    opset: int = OPSETS[-1],
    output_names: Sequence[str] | None = None,
    check: bool = True,
) -> Path:
    """Write a folded model as an ONNX file with a dynamic batch dimension, and check the file on an engine.

    In the file, weights are int8 and biases int32. Activations pass through QuantizeLinear and DequantizeLinear pairs,
    which engines turn into integer kernels. Codes of fewer than 8 bits are 8-bit codes that are clipped to the grid.

    Args:
        folded: a model from :func:`qwt2.fold`, or a float model (a baseline for benchmarks). A model quantized with
            target="tensorrt" gets float biases, and the file keeps TensorRT's rules (:mod:`qwt2.onnx.tensorrt_rules`).
        path: the file; it is written atomically, and only if it passes the check.
        example_input: one input batch. The file's input is called "images", or its inputs have the names of a
            dictionary. The check runs on the first images.
        weight_storage: "int8", or "int4" to store codes of at most 4 bits in half the bytes. :func:`qwt2.load_engine`
            restores the same int8 model, of version ``opset``; the file itself is of opset 21, the first with INT4.
        opset: version of ONNX's operators, 18 to 20; the outputs do not depend on it.
        output_names: names of the model's outputs, in order. By default "logits" for one tensor, the keys of a
            dictionary, and otherwise the exporter's names.
        check: run the file once on an installed engine, and compare its outputs with the model's.

    Returns:
        ``path``.

    Raises:
        Qwt2Error: if the model is quantized but not folded, or cannot be exported; if the storage or opset is not
            supported, or the model does not fit the target's rules or the storage; or if the file's outputs differ
            from the model's (the message names the module if a single one differs).
    """
    with atomic_path(path) as temporary:
        write_onnx(folded, temporary, example_input, weight_storage, opset, output_names)
        if check:
            _check_file(folded, temporary, first(example_input, 2), str(path))
    return Path(path)


def _check_file(folded: nn.Module, file: Path, inputs: Inputs, name: str) -> None:
    info = getattr(folded, "quantization", None)
    engine = _installed("portable" if info is None else info.target)
    exact = [y.cpu().numpy() for y in outputs_of(folded, inputs) if isinstance(y, Tensor)]
    feeds = {key: tensor.cpu().numpy() for key, tensor in tensors(inputs).items()}
    outputs = load_engine(file, engine, torch.get_num_threads())(feeds)
    found = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
    if len(exact) != len(found) or any(e.shape != f.shape for e, f in zip(exact, found)):
        shapes = [f.shape for f in found]
        raise Qwt2Error(f"{name}: on {engine}, outputs of shapes {shapes} come from the file; it was not kept")
    close = min(map(sqnr_db, found, exact), default=np.inf)
    if close >= _CLOSE_DB:
        return
    module, steps = _worst_module(folded, file, first(inputs, 1), engine)
    if steps > _MAX_STEPS or (close < _FAR_DB and close < _stability_db(folded, inputs, exact) - _FAR_DB):
        where = f"{module} differs by {steps:.1f} output steps" if steps > _MAX_STEPS else "no single module differs"
        raise Qwt2Error(
            f"{name}: on {engine}, the file's outputs are only {close:.1f} dB from the model's ({where}); it was not "
            "kept, export with check=False to look at it"
        )


def _stability_db(folded: nn.Module, inputs: Inputs, exact: list[np.ndarray]) -> float:
    """Return the SQNR of the model's own outputs under small noise in its inputs.

    It is low in a network that chooses among almost equal scores. Two correct engines then differ as much.
    """
    generator = torch.Generator().manual_seed(0)
    noisy = {name: _disturbed(tensor, generator) for name, tensor in tensors(inputs).items()}
    outputs = outputs_of(folded, noisy if isinstance(inputs, dict) else noisy["images"])
    return min(map(sqnr_db, [y.cpu().numpy() for y in outputs if isinstance(y, Tensor)], exact), default=np.inf)


def _disturbed(x: Tensor, generator: torch.Generator) -> Tensor:
    if not x.is_floating_point():
        return x
    return x + _DISTURBANCE * x.std() * torch.randn(x.shape, generator=generator).to(x)


def _installed(target: str) -> str:
    packages: dict[str, Any] = {name: getattr(ENGINES.get(name), "package", None) for name in _OTHERS}
    candidates = _ENGINES.get(target, _OTHERS)
    return next(n for n in candidates if packages[n] is None or importlib.util.find_spec(packages[n]) is not None)


def _worst_module(folded: nn.Module, file: Path, inputs: Inputs, engine: str) -> tuple[str, float]:
    """Return the integer module whose output differs most for the same input, and its difference in output steps."""
    if not any(isinstance(module, IntegerLayer) for module in folded.modules()):
        return "", 0.0
    records = record_modules(folded, inputs)
    mismatches = engine_mismatch(load_onnx(file), engine, records, torch.get_num_threads())
    return max(((name, mismatch.steps) for name, mismatch in mismatches.items()), key=lambda found: found[1])
