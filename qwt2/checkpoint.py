"""Storing quantized models: safetensors with a JSON header, no pickle."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from qwt2.errors import Qwt2Error
from qwt2.capture.batch import zeros
from qwt2.io import atomic_path
from qwt2.quantization.layers import AffineBlock, CompensatedBlock, QuantizedLayer
from qwt2.quantization.quantize import QuantizationInfo, prepare, quantization_info, wrap_block
from qwt2.quantization.quantizers import Quantizer, UniformQuantizer

HEADER = "qwt2"


def save_quantized(qmodel: nn.Module, path: str | os.PathLike) -> None:
    """Store a quantized model, compensated or not, atomically.

    The file holds the weights as calibration left them, every quantizer's parameters, and the
    compensation; the architecture is not in it.
    """
    header = {
        "quantization": quantization_info(qmodel).to_dict(),
        "axes": {n: m.channel_axis for n, m in qmodel.named_modules() if isinstance(m, UniformQuantizer)},
        "wrappers": {n: _describe(m) for n, m in qmodel.named_modules() if isinstance(m, (CompensatedBlock, AffineBlock))},
    }  # fmt: skip
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in qmodel.state_dict().items()}
    data = save(tensors, metadata={HEADER: json.dumps(header, sort_keys=True)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def load_quantized(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Rebuild a stored quantized model.

    Args:
        model: a float model of the architecture that was quantized; its weights do not matter.
        path: a file from :func:`save_quantized`.

    Raises:
        Qwt2Error: a missing or damaged file, or another architecture.
    """
    header, tensors = _read(path)
    info = QuantizationInfo.from_dict(header["quantization"])
    qmodel = prepare(
        model, zeros(info.input_shape), info.method, info.precision, info.variant, info.blocks, info.sections, info.parts
    )
    for name, settings in header["wrappers"].items():
        wrap_block(qmodel, name, _wrapper(qmodel.get_submodule(name), settings, tensors, name))
    _restore(qmodel, tensors, header["axes"], path)
    return qmodel


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if HEADER not in metadata:
                raise Qwt2Error(f"{path} holds no quantized model; write one with qwt2.save_quantized")
            return json.loads(metadata[HEADER]), {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise Qwt2Error(f"{path} does not exist; run the stage that writes it, or correct the path") from None
    except SafetensorError as error:
        raise Qwt2Error(f"{path} is damaged ({error}); delete it and make it again") from error


def _describe(wrapper: nn.Module) -> dict[str, Any]:
    if isinstance(wrapper, AffineBlock):
        return {"kind": "affine", "channel_axis": wrapper.channel_axis}
    arithmetic = str(wrapper.arithmetic).removeprefix("torch.")
    return {"kind": "linear", "stride": wrapper.stride, "groups": wrapper.groups, "arithmetic": arithmetic}


def _wrapper(block: nn.Module, settings: dict[str, Any], tensors: dict[str, torch.Tensor], name: str) -> nn.Module:
    if settings["kind"] == "affine":
        return AffineBlock(block, tensors[f"{name}.alpha"], tensors[f"{name}.beta"], settings["channel_axis"])
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    arithmetic = getattr(torch, settings["arithmetic"])
    return CompensatedBlock(block, weight, bias, settings["stride"], settings["groups"], weight.dtype, arithmetic)


def _restore(qmodel: nn.Module, tensors: dict[str, torch.Tensor], axes: dict[str, int | None], path) -> None:
    """Give every parameter and buffer its stored tensor, also those that calibration made anew."""
    expected = set(qmodel.state_dict())
    for name, module in qmodel.named_modules():
        if isinstance(module, Quantizer):
            module.calibrated = True
            if isinstance(module, UniformQuantizer):
                module.channel_axis = axes.get(name)
        if isinstance(module, QuantizedLayer) and f"{name}.alpha" in tensors:
            module.set_compensation(tensors[f"{name}.alpha"], tensors[f"{name}.beta"])
    added = {n for n in tensors if n.rpartition(".")[2] in ("alpha", "beta", "bias")}
    if missing := sorted((expected - set(tensors)) | (set(tensors) - expected - added)):
        raise Qwt2Error(f"{path} belongs to another architecture: {missing[0]} is in only one of the two; build the model it was made from")
    for name, tensor in tensors.items():
        parent, _, attribute = name.rpartition(".")
        module = qmodel.get_submodule(parent)
        if attribute in module._parameters:
            module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[attribute] = tensor
