"""Export of folded models: the file is run on an engine, and kept only if it computes what the model computes."""

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
from qwt2.evaluation.mismatch import engine_mismatch, record_modules
from qwt2.folding.layers import IntegerLayer
from qwt2.io import atomic_path
from qwt2.onnx.export import OPSETS, write_onnx
from qwt2.onnx.file import load_onnx

# Which engine runs a file for the check: the first that is installed. The last needs nothing but PyTorch.
_ENGINES = {"openvino": ("openvino", "onnxruntime", "torch_int8")}
_OTHERS = ("onnxruntime", "openvino", "torch_int8")
# Outputs this close need no second look: what two correct engines of a deep low-bit network differ by can be more, as a
# value on a rounding boundary changes all that follows.
_CLOSE_DB = 20.0
_FAR_DB = 3.0
_MAX_STEPS = 1.5


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

    Weights are int8 and biases int32 in the file; activations pass through QuantizeLinear and
    DequantizeLinear pairs that engines turn into integer kernels. Codes of fewer than 8 bits are
    8-bit codes behind a Clip to those of the grid.

    Args:
        folded: a model from :func:`qwt2.fold`, or a float model (a baseline for benchmarks). One quantized with
            target="tensorrt" gets float biases and nothing that breaks TensorRT's rules
            (:mod:`qwt2.onnx.tensorrt_rules`).
        path: the file; written atomically, and only if it passes the check.
        example_input: one input batch; the file's inputs are called "images", or as in a dictionary. Its first images
            are what the check runs on.
        weight_storage: "int4" stores codes of at most 4 bits in half the bytes; :func:`qwt2.load_engine` makes
            the same int8 model of it. The file is of opset 21, the first one with INT4, and the model that is
            restored of ``opset``.
        opset: version of ONNX's operators, 18 to 20; the outputs are the same.
        output_names: names of what the model returns, in order; not given, "logits" for one tensor, the keys of a
            dictionary, and else the exporter's.
        check: run the file on an installed engine, once, and compare its outputs with the model's.

    Returns:
        ``path``.

    Raises:
        Qwt2Error: a quantized model that was not folded, a model that cannot be exported, an unknown
            storage, an unsupported opset, a model that the target's rules or the storage cannot hold, or a file that
            computes something else than the model (the module is named if it is one).
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
    close = min(map(_sqnr_db, exact, found), default=np.inf)
    if close >= _CLOSE_DB:
        return
    module, steps = _worst_module(folded, file, first(inputs, 1), engine)
    if steps > _MAX_STEPS or close < _FAR_DB:
        where = f"{module} differs by {steps:.1f} output steps" if steps > _MAX_STEPS else "no single module differs"
        raise Qwt2Error(
            f"{name}: on {engine}, the file's outputs are only {close:.1f} dB from the model's ({where}); it was not "
            "kept, export with check=False to look at it"
        )


def _installed(target: str) -> str:
    packages: dict[str, Any] = {name: getattr(ENGINES.get(name), "package", None) for name in _OTHERS}
    candidates = _ENGINES.get(target, _OTHERS)
    return next(n for n in candidates if packages[n] is None or importlib.util.find_spec(packages[n]) is not None)


def _worst_module(folded: nn.Module, file: Path, inputs: Inputs, engine: str) -> tuple[str, float]:
    """The integer module that differs most when engine and model give it the same input, and by how many steps."""
    if not any(isinstance(module, IntegerLayer) for module in folded.modules()):
        return "", 0.0
    records = record_modules(folded, inputs)
    mismatches = engine_mismatch(load_onnx(file), engine, records, torch.get_num_threads())
    return max(((name, mismatch.steps) for name, mismatch in mismatches.items()), key=lambda found: found[1])


def _sqnr_db(exact: np.ndarray, found: np.ndarray) -> float:
    exact = exact.astype(np.float64)
    noise = float(np.square(found - exact).sum())
    with np.errstate(divide="ignore"):
        return float(np.inf if noise == 0 else 10 * np.log10(np.square(exact).sum() / noise))
