"""Storage of quantized models: safetensors with a JSON header, no pickle."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from qwt2.capture.batch import zeros
from qwt2.capture.export import capture
from qwt2.capture.graph import GraphModel
from qwt2.capture.rotation import rotated
from qwt2.compensation.blocks import (
    AffineCompensation,
    BlockCompensation,
    LinearCompensation,
    compensated_blocks,
    put_behind,
)
from qwt2.errors import Qwt2Error
from qwt2.io import atomic_path
from qwt2.quantization.info import QuantizationInfo, quantization_info
from qwt2.quantization.layers import QuantizedLayer
from qwt2.quantization.quantize import prepare
from qwt2.quantization.quantizers import Quantizer, UniformQuantizer

HEADER = "qwt2"
_BEHIND_BLOCKS = {"linear": LinearCompensation, "affine": AffineCompensation}


def save_quantized(qmodel: GraphModel, path: str | os.PathLike) -> None:
    """Store a quantized model, compensated or not, atomically.

    The file holds the weights as they are after calibration, every quantizer's parameters and the compensation. It does
    not hold the architecture.

    Args:
        qmodel: a model from :func:`qwt2.quantize`.
        path: the file to write.

    Raises:
        Qwt2Error: if the model is not quantized.
    """
    header = {
        "quantization": quantization_info(qmodel).to_dict(),
        "axes": {n: m.channel_axis for n, m in qmodel.named_modules() if isinstance(m, UniformQuantizer)},
        "behind_blocks": {block: _describe(module) for block, module in compensated_blocks(qmodel).items()},
    }
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in qmodel.state_dict().items()}
    data = save(tensors, metadata={HEADER: json.dumps(header, sort_keys=True)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def load_quantized(model: nn.Module, path: str | os.PathLike) -> GraphModel:
    """Rebuild a stored quantized model.

    Args:
        model: a float model of the architecture that was quantized, or its captured graph; its weights are not used.
        path: a file from :func:`save_quantized`.

    Returns:
        The quantized model, with its compensation.

    Raises:
        Qwt2Error: if the file is missing or damaged, or belongs to another architecture.
    """
    header, tensors = _read(path)
    info = QuantizationInfo.from_dict(header["quantization"])
    example = zeros(info.input_shape, info.input_types)
    captured = capture(model, example)
    captured = rotated(captured) if info.request.rotate else captured
    qmodel = prepare(captured, example, info.request, info.unfaithful)
    for block, settings in header["behind_blocks"].items():
        put_behind(qmodel, block, _behind_block(settings, tensors, f"{block}.compensation"))
    _restore(qmodel, tensors, header["axes"], info, path)
    return qmodel


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if HEADER not in metadata:
                raise Qwt2Error(f"{path} holds no quantized model; write one with qwt2.save_quantized")
            # The open file is not a dictionary and cannot be iterated.
            return json.loads(metadata[HEADER]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise Qwt2Error(f"{path} does not exist; run the stage that writes it, or correct the path") from None
    except SafetensorError as error:
        raise Qwt2Error(f"{path} is damaged ({error}); delete it and make it again") from error


def _describe(module: BlockCompensation) -> dict[str, Any]:
    [kind] = [name for name, known in _BEHIND_BLOCKS.items() if type(module) is known]
    return {"kind": kind, **module.settings()}


def _behind_block(settings: dict[str, Any], tensors: dict[str, Tensor], name: str) -> BlockCompensation:
    kind = _BEHIND_BLOCKS[settings["kind"]]
    stored = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name}
    return kind(**stored, **{key: value for key, value in settings.items() if key != "kind"})


def _restore(
    qmodel: GraphModel,
    tensors: dict[str, Tensor],
    axes: dict[str, int | None],
    info: QuantizationInfo,
    path: str | os.PathLike,
) -> None:
    """Set every parameter and buffer to its stored tensor, including those that calibration creates."""
    _check_names(qmodel, tensors, info, path)
    for name, module in qmodel.named_modules():
        if isinstance(module, Quantizer):
            module.calibrated = True
        if isinstance(module, UniformQuantizer):
            module.channel_axis = axes[name]
    for name, tensor in tensors.items():
        parent, _, attribute = name.rpartition(".")
        module = qmodel.get_submodule(parent)
        if attribute in module._parameters:
            module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[attribute] = tensor


def _check_names(
    qmodel: GraphModel, tensors: dict[str, Tensor], info: QuantizationInfo, path: str | os.PathLike
) -> None:
    expected, added = set(qmodel.state_dict()), set()
    for name, module in qmodel.named_modules():
        if isinstance(module, (QuantizedLayer, nn.LayerNorm)):  # methods add tensors to these
            added |= {f"{name}.{attribute}" for attribute in ("alpha", "beta", "codes", "weight", "bias")}
    differing = sorted((expected - set(tensors)) | (set(tensors) - expected - added))
    if not differing:
        return
    if qmodel.quantization.structure == info.structure:
        reason = f"{differing[0]} is in only one of the two"
    else:
        reason = f"the model is captured as another graph than it was, with PyTorch {torch.__version__} now"
    raise Qwt2Error(f"{path} belongs to another architecture: {reason}; build the model it was made from")
