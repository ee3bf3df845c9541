"""Other tools that make int8 models, and the settings that the comparison tries of each; the best setting is compared.

A setting is a name and a function that writes a file from the float model and the calibration images.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from qwt2 import export_onnx
from qwt2.capture.batch import Inputs, tensors
from qwt2.capture.export import capture
from qwt2.capture.normalise import fold_batchnorms
from qwt2.evaluation import machine
from qwt2.io import quiet

Model = Callable[[np.ndarray], np.ndarray]
Feeds = dict[str, np.ndarray]


class Setting(NamedTuple):
    """One way to run a tool.

    Attributes:
        name: the options, in words.
        write: a function of the path of the file to write.
    """

    name: str
    write: Callable[[Path], Any]


def write_float(model: nn.Module, path: Path, example: Inputs) -> Path:
    """Write the float model for quantize_static, and return ``path``.

    Its BatchNorms are folded: ``quant_pre_process`` does not recognize them as PyTorch's exporter writes them, and they
    would be computed in float between quantized layers.
    """
    captured = capture(model, example)
    captured.edit(fold_batchnorms)
    return export_onnx(captured, path, example)


def single_feeds(batches: Iterable[Inputs]) -> list[Feeds]:
    """Return the inputs of calibration batches one by one, as arrays by name."""
    return [
        {name: tensor[index : index + 1].numpy() for name, tensor in named.items()}
        for named in map(tensors, batches)
        for index in range(len(next(iter(named.values()))))
    ]


def quantize_static_settings(
    float_file: Path, calibration: Sequence[Feeds], is_transformer: bool = False
) -> Iterator[Setting]:
    """Yield settings of ONNX Runtime's tool, on prepared files, with QDQ and per channel as it recommends for CPUs.

    CPUs without VNNI add products of 8 bits in 16, which may overflow, so that weights get 7 bits there (reduce_range).
    Transformers may also have their matrix products quantized only: the tool quantizes a mask's sum with the scores,
    too, and a mask that reaches float32's lowest value leaves the scores no codes.
    """
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = float_file.with_name("prepared.onnx")
    quant_pre_process(float_file, prepared, skip_symbolic_shape=True)
    has_vnni = any("vnni" in name for name in machine.describe()["instruction_sets"])
    methods = (CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile)
    for operators, method in product((None, ["MatMul", "Gemm"]) if is_transformer else (None,), methods):
        name = method.name + ("" if has_vnni else ", reduce_range") + (", products only" if operators else "")
        yield Setting(name, partial(_quantize_static, prepared, calibration, method, not has_vnni, operators))


def _quantize_static(
    prepared: Path, calibration: Sequence[Feeds], method: Any, reduce_range: bool, operators: list[str] | None,
    path: Path,
) -> None:  # fmt: skip
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(calibration)

        def get_next(self) -> Feeds | None:
            return next(self.rest, None)

    quantize_static(
        prepared, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=reduce_range,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=method,
        op_types_to_quantize=operators,
    )  # fmt: skip


def nncf_settings(
    model: nn.Module, example: Inputs, calibration: Sequence[Feeds], is_transformer: bool
) -> Iterator[Setting]:
    """Yield settings of NNCF's post-training quantization of OpenVINO models.

    NNCF is told which models are transformers. It applies SmoothQuant to these only, so that CNNs have half as many
    settings.
    """
    for smooth, fast in product((True, False) if is_transformer else (False,), (True, False)):
        words = ["SmoothQuant"] if smooth else ["no SmoothQuant"] if is_transformer else []
        words.append("fast bias correction" if fast else "full bias correction")
        yield Setting(", ".join(words), partial(_nncf, model, example, calibration, is_transformer, smooth, fast))


def _nncf(
    model: nn.Module, example: Inputs, calibration: Sequence[Feeds], is_transformer: bool, smooth: bool, fast: bool,
    path: Path,
) -> None:  # fmt: skip
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters

    nncf.set_log_level(logging.ERROR)
    # A negative value switches SmoothQuant off.
    alphas = AdvancedSmoothQuantParameters() if smooth else AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    # OpenVINO converts the PyTorch model itself, because from our ONNX file NNCF makes layers that run in float.
    converted = openvino.convert_model(model, example_input=example)
    quantized = nncf.quantize(
        converted, nncf.Dataset([_by_port(converted, feeds) for feeds in calibration]), subset_size=len(calibration),
        fast_bias_correction=fast, model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
        advanced_parameters=AdvancedQuantizationParameters(smooth_quant_alphas=alphas),
    )  # fmt: skip
    openvino.save_model(quantized, path, compress_to_fp16=False)


def _by_port(model: Any, feeds: Feeds) -> Feeds:
    """Return inputs under the names that OpenVINO gives them first; a single input may have any name."""
    [*ports] = model.inputs
    if len(ports) == 1:
        return {ports[0].any_name: next(iter(feeds.values()))}
    return {port.any_name: next(feeds[name] for name in port.get_names() if name in feeds) for port in ports}


def torchao_graph(model: nn.Module, calibration: Tensor, batch: int) -> nn.Module:
    """Return a model that torchao has quantized for Inductor on x86 (PT2E) with its default configuration.

    Its graphs are made for one batch size.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (calibration[:batch],)).module(), quantizer)
    with torch.no_grad():
        for images in calibration.split(batch):
            prepared(images)
    return convert_pt2e(prepared)


def on_inductor(model: nn.Module, images: Tensor) -> Model:
    """Compile a model for images of this shape with the settings of this library's engine of that name."""
    from torch._inductor import config

    compiled = torch.compile(model, backend="inductor", dynamic=False)
    with torch.no_grad(), config.patch({"freezing": True, "compile_threads": 1}), quiet("torch.utils.cpp_extension"):
        compiled(images)

    def run(array: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return compiled(torch.from_numpy(array)).numpy()

    return run
