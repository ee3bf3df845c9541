"""Take one model of the zoo through another tool: NNCF with OpenVINO, or ONNX Runtime's quantize_static.

Both tools get the images that this library calibrates on, and are set as in :mod:`benchmarks.peers`.
"""

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.zoo_models import built, parts_of
from qwt2.capture.batch import tensors
from qwt2.capture.check import outputs_of
from qwt2.quantization.allocation import centred_sqnr_db

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


def measured_by(tool: str, name: str) -> dict[str, Any]:
    """Quantize a model with a tool and run it.

    Returns:
        Outcome, reason (the error in one phrase), SQNR as :mod:`benchmarks.zoo` measures it, and the CPU seconds of
        conversion and quantization.
    """
    os.environ["OPENVINO_TELEMETRY"] = "0"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    model, calibration, test = built(name)
    exact = outputs_of(model, test)
    started = time.process_time()
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            run = TOOLS[tool](model, parts_of(calibration), Path(folder))
            seconds = time.process_time() - started
            found = [run(feeds(batch)) for batch in parts_of(test)]
    except Exception as error:  # tools fail with exceptions of every kind
        return {"outcome": "fails", "reason": phrase(error)}
    outputs = [torch.from_numpy(np.concatenate(batches)) for batches in zip(*found)]
    floats = [y for y in exact if isinstance(y, Tensor) and y.is_floating_point()]
    if [y.shape for y in floats] != [y.shape for y in outputs]:
        return {"outcome": "fails", "reason": f"outputs of shapes {[tuple(y.shape) for y in outputs]}"}
    return {"outcome": "runs", "db": round(centred_sqnr_db(floats, outputs), 2), "seconds": round(seconds, 1)}


def phrase(error: Exception) -> str:
    """Return an exception's first line, of at most 120 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:120]


def feeds(batch: Any) -> dict[str, np.ndarray]:
    """Return a batch as arrays by name."""
    return {name: tensor.numpy() for name, tensor in tensors(batch).items()}


def nncf(model: nn.Module, parts: list[Any], folder: Path) -> Run:
    """Quantize with NNCF what OpenVINO converts; models with LayerNorms are declared to be transformers."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    is_transformer = any(isinstance(module, nn.LayerNorm) for module in model.modules())
    converted = openvino.convert_model(model, example_input=parts[0])
    names = {port.get_any_name() for port in converted.inputs}

    def given(arrays: dict[str, np.ndarray]) -> Any:
        # A model of only images may name its input otherwise.
        return arrays if names >= arrays.keys() else next(iter(arrays.values()))

    quantized = nncf.quantize(
        converted,
        nncf.Dataset([given(feeds(batch)) for batch in parts]),
        subset_size=len(parts),
        model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
    )
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(quantized, "CPU", exact)
    return lambda arrays: _floats(compiled(given(arrays)).values())


def quantize_static(model: nn.Module, parts: list[Any], folder: Path) -> Run:
    """Quantize with ONNX Runtime what torch.onnx exports: QDQ, per channel, after preprocessing."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    exported, prepared, quantized = (folder / f"{stage}.onnx" for stage in ("exported", "prepared", "quantized"))
    args, kwargs = ((), parts[0]) if isinstance(parts[0], dict) else ((parts[0],), {})
    torch.onnx.export(model, args, exported, kwargs=kwargs, dynamo=True, external_data=False, verbose=False)
    inputs = [port.name for port in onnxruntime.InferenceSession(exported).get_inputs()]

    def named(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return arrays if arrays.keys() == set(inputs) else dict(zip(inputs, arrays.values(), strict=True))

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Any] = iter(parts)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else named(feeds(batch))

    quant_pre_process(exported, prepared, skip_symbolic_shape=True)
    quantize(
        prepared, quantized, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(quantized, options)
    return lambda arrays: _floats(session.run(None, named(arrays)))


def _floats(arrays: Any) -> list[np.ndarray]:
    return [np.array(array) for array in arrays if array.dtype.kind == "f"]


TOOLS: dict[str, Callable[[nn.Module, list[Any], Path], Run]] = {"nncf": nncf, "quantize_static": quantize_static}
