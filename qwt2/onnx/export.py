"""Export of folded models to ONNX, with integer weights in the file."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import nn
from torch.utils._pytree import tree_unflatten

from qwt2.capture.batch import Inputs, tensors
from qwt2.capture.check import evaluation_mode
from qwt2.capture.graph import GraphModel
from qwt2.errors import Qwt2Error
from qwt2.folding.layers import IntegerLayer, QuantizeDequantize
from qwt2.io import quiet
from qwt2.onnx.file import (
    PRODUCER_KEY,
    TARGET_KEY,
    load_onnx,
    save_onnx,
    set_shared_quantizers,
    shared_quantizers,
    stored_values,
)  # fmt: skip
from qwt2.onnx.int4 import pack_int4
from qwt2.onnx.passes import clip_values, rewrite_for_engines, rewrite_for_numbers
from qwt2.onnx.tensorrt_rules import check as check_tensorrt
from qwt2.quantization.targets import TARGETS, find_target

# In files of later opsets, ONNX Runtime 1.32 gives quantizers the wrong type when it moves them past other operations.
OPSETS = (18, 19, 20)
WEIGHT_STORAGE = ("int8", "int4")
STRUCTURE_KEY = "qwt2_structure"
# The exporter reports its progress on the console and through warnings; a library must not.
_LOGGERS = ("torch.onnx", "onnxscript", "torch.onnx._internal.exporter", "torch.fx.experimental.symbolic_shapes")


def export_onnx(
    folded: nn.Module,
    path: str | os.PathLike,
    example_input: Inputs,
    weight_storage: str = "int8",
    opset: int = OPSETS[-1],
    output_names: Sequence[str] | None = None,
) -> Path:
    """Write a folded model as an ONNX file with a dynamic batch dimension.

    Weights are int8 and biases int32 in the file; activations pass through QuantizeLinear and
    DequantizeLinear pairs that engines turn into integer kernels. Codes of fewer than 8 bits are
    8-bit codes behind a Clip to those of the grid.

    Args:
        folded: a model from :func:`qwt2.fold`, or a float model (a baseline for benchmarks). One quantized with
            target="tensorrt" gets float biases and nothing that breaks TensorRT's rules
            (:mod:`qwt2.onnx.tensorrt_rules`).
        path: the file; written atomically.
        example_input: one input batch; the file's inputs are called "images", or as in a dictionary.
        weight_storage: "int4" stores codes of at most 4 bits in half the bytes; :func:`qwt2.load_engine` makes
            the same int8 model of it. The file is of opset 21, the first one with INT4, and the model that is
            restored of ``opset``.
        opset: version of ONNX's operators, 18 to 20; the outputs are the same.
        output_names: names of what the model returns, in order; not given, "logits" for one tensor, the keys of a
            dictionary, and else the exporter's.

    Returns:
        ``path``.

    Raises:
        Qwt2Error: a quantized model that was not folded, a model that cannot be exported, an unknown
            storage, an unsupported opset, or a model that the target's rules or the storage cannot hold.
    """
    _refuse_unfolded(folded)
    info = getattr(folded, "quantization", None)
    target = "portable" if info is None else info.target
    check_format(target, weight_storage, opset)
    arguments, free = _example(example_input)
    with evaluation_mode(folded), quiet(*_LOGGERS), torch.no_grad(), _without_collection():
        try:
            program = torch.onnx.export(
                folded, **arguments, dynamo=True, opset_version=opset, input_names=list(tensors(example_input)),
                output_names=list(output_names or _output_names(folded)) or None, dynamic_shapes=free,
                custom_translation_table=_translations(), verbose=False, optimize=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0][:200]
            raise Qwt2Error(
                f"{type(folded).__name__} cannot be exported: {reason}; torch.export must be able to trace its forward, "
                "which excludes branches on the values of tensors"
            ) from error
    model = program.model_proto
    _strip(model)
    _strip_later_attributes(model)
    _use_first_names(model, folded)
    rewrite_for_engines(model, _clipped(folded), keeps_pairs=TARGETS[target].float_biases)
    _stamp(model, folded)
    if TARGETS[target].float_biases:
        _fit_tensorrt(model)
    return save_onnx(pack_int4(model) if weight_storage == "int4" else model, path)


def _example(inputs: Inputs) -> tuple[dict[str, Any], Any]:
    """The exporter's arguments for a model called with these inputs, and which axes are free: the first of each."""
    # A batch of one would be specialized to a constant.
    grown = {name: x.expand(2, *x.shape[1:]) if len(x) == 1 else x for name, x in tensors(inputs).items()}
    batch = torch.export.Dim("batch")
    if isinstance(inputs, dict):
        return {"args": (), "kwargs": grown}, {name: {0: batch} for name in grown}
    return {"args": tuple(grown.values())}, ({0: batch},)


def _output_names(model: nn.Module) -> list[str]:
    """Names of a captured model's outputs; none where they have no names."""
    if not isinstance(model, GraphModel) or len(model.output.args[0]) == 1:
        return ["logits"]
    names = tree_unflatten(list(range(len(model.output.args[0]))), model.signature.out_spec)
    return list(names) if isinstance(names, Mapping) and all(isinstance(v, int) for v in names.values()) else []


@contextmanager
def _without_collection() -> Iterator[None]:
    """The exporter makes millions of objects that live until its end; looking for garbage among them takes a fifth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_format(target: str, weight_storage: str, opset: int) -> None:
    """Refuse what :func:`export_onnx` has not.

    Raises:
        Qwt2Error: unknown target, storage or opset, or two that exclude each other.
    """
    if opset not in OPSETS:
        raise Qwt2Error(f"opset {opset} is not supported; use one of: {', '.join(map(str, OPSETS))}")
    if weight_storage not in WEIGHT_STORAGE:
        raise Qwt2Error(f"unknown weight storage {weight_storage!r}; use one of: {', '.join(WEIGHT_STORAGE)}")
    if find_target(target).float_biases and weight_storage == "int4":
        raise Qwt2Error(f"target {target!r} needs weight storage 'int8': it multiplies int4 weights only in float")


class Exporter:
    """Exports many models; one whose structure was exported before is written into a copy of that file.

    Args:
        example_input: as in :func:`export_onnx`.
    """

    def __init__(self, example_input: Inputs):
        self.example_input = example_input
        self._templates: dict[str, Path] = {}

    def export(self, folded: nn.Module, path: str | os.PathLike) -> Path:
        """As :func:`export_onnx`; the files that were written before must still be there."""
        known = self._templates.get(structure(folded))
        if known is not None:
            return rewrite_onnx(known, folded, path)
        return self.learn(export_onnx(folded, path, self.example_input))

    def learn(self, path: Path) -> Path:
        """Write models of the structure in a file that was exported elsewhere into copies of it; returns ``path``."""
        self._templates |= dict.fromkeys(_structures(load_onnx(path)), path)
        return path


def rewrite_onnx(template: str | os.PathLike, folded: nn.Module, path: str | os.PathLike) -> Path:
    """Write ``folded`` into a copy of an exported file of a model of the same structure.

    Only stored numbers change, so the two files have the same operators in the same order; it also
    takes a fraction of an export's time.

    Raises:
        Qwt2Error: the file was not exported by this library or from another structure.
    """
    model = load_onnx(template)
    if structure(folded) not in _structures(model):
        raise Qwt2Error(f"{template} holds a model of another structure; export this one with qwt2.export_onnx")
    state = {name: tensor.detach().cpu().numpy() for name, tensor in folded.state_dict().items()}
    for tensor in model.graph.initializer:
        values = stored_values(tensor.name, state)
        if values is not None:
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    _check_shared(model, state)
    rewrite_for_numbers(model, _clipped(folded))
    _stamp(model, folded)
    return save_onnx(model, path)


def _check_shared(model: onnx.ModelProto, state: dict[str, np.ndarray]) -> None:
    """Refuse numbers with which quantizers that share one in the file would differ."""
    for name, other in shared_quantizers(model).items():
        for key in [key for key in state if key.rpartition(".")[0] == name]:
            if not np.array_equal(state[key], state[f"{other}.{key.rpartition('.')[2]}"]):
                raise Qwt2Error(f"{name} and {other} differ, which share a quantizer in the file; export the model with qwt2.export_onnx again")


def _translations() -> dict:
    from onnxscript import opset20 as op

    def quantize_dequantize_onnx(x, scale, zero_point, lowest, highest, low, high):
        values = x if low is None else op.Clip(x, low, high)
        codes = op.QuantizeLinear(values, scale, zero_point)
        if lowest is not None:
            codes = op.Clip(codes, lowest, highest)
        return op.DequantizeLinear(codes, scale, zero_point)

    def dequantize_onnx(codes, scale, zero_point, axis: int):
        return op.DequantizeLinear(codes, scale, zero_point, axis=axis)

    return {
        torch.ops.qwt2.quantize_dequantize.default: quantize_dequantize_onnx,
        torch.ops.qwt2.dequantize.default: dequantize_onnx,
    }


def _fit_tensorrt(model: onnx.ModelProto) -> None:
    """Float biases, and values clipped in place of codes; refuse what else does not fit."""
    clip_values(model)
    _float_biases(model)
    [structure] = [entry for entry in model.metadata_props if entry.key == STRUCTURE_KEY]
    structure.value = f"tensorrt {structure.value}"  # another file than the model's own names and types tell
    if violations := check_tensorrt(model):
        raise Qwt2Error(f"target 'tensorrt': {violations[0]}; leave that module in float, or choose another target")


def _float_biases(model: onnx.ModelProto) -> None:
    """Turn int32 biases behind dequantizers into float constants of their names."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    biases = {
        node.output[0]: node for node in model.graph.node
        if node.op_type == "DequantizeLinear" and stored.get(node.input[0], TensorProto()).data_type == TensorProto.INT32
    }  # fmt: skip
    scales = {node.input[0]: node.input[1] for node in biases.values()}  # a layer may run several times
    for name, scale_name in scales.items():
        codes, scale = (numpy_helper.to_array(stored[n]) for n in (name, scale_name))
        stored[name].CopyFrom(numpy_helper.from_array(codes.astype(np.float32) * scale, name))
    sources = {output: node.input[0] for output, node in biases.items()}
    for node in biases.values():
        model.graph.node.remove(node)
    for node in model.graph.node:
        node.input[:] = [sources.get(name, name) for name in node.input]
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    shown = [value for value in model.graph.value_info if value.name not in sources and value.name not in stored]
    del model.graph.initializer[:], model.graph.value_info[:]
    model.graph.initializer.extend(kept)
    model.graph.value_info.extend(shown)


def _strip(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes about its run: paths and stack traces of the exporting machine."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]


def _strip_later_attributes(model: onnx.ModelProto) -> None:
    """Drop what quantizers of later opsets write out although it is their default: older ones have no such attribute."""
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            kept = [attribute for attribute in node.attribute if attribute.name == "axis"]
            del node.attribute[:]
            node.attribute.extend(kept)


def _use_first_names(model: onnx.ModelProto, folded: nn.Module) -> None:
    """Name a stored tensor as `named_modules` does: the exporter may use another name of a shared module."""
    first = {id(tensor): name for name, tensor in (*folded.named_parameters(), *folded.named_buffers())}
    state = folded.state_dict(keep_vars=True)
    new = {name: first[id(state[name])] for t in model.graph.initializer if (name := t.name) in state}
    for tensor in model.graph.initializer:
        tensor.name = new.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]


def _clipped(folded: nn.Module) -> list[str]:
    """Names of the quantizers that do not round."""
    return [name for name, module in folded.named_modules() if isinstance(module, QuantizeDequantize) and not module.rounds]


def _stamp(model: onnx.ModelProto, folded: nn.Module) -> None:
    shared = shared_quantizers(model)
    info = getattr(folded, "quantization", None)
    label = "float" if info is None else f"{info.method} W{info.precision.weight_bits}A{info.precision.activation_bits}"
    target = {} if info is None else {TARGET_KEY: info.target}
    onnx.helper.set_model_props(model, {PRODUCER_KEY: label, STRUCTURE_KEY: structure(folded)} | target)
    set_shared_quantizers(model, shared)


def structure(model: nn.Module) -> str:
    """A digest of the names, shapes and types of everything a model stores."""
    stored = [(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()]
    return hashlib.sha256(json.dumps(stored).encode()).hexdigest()


def _structures(model: onnx.ModelProto) -> set[str]:
    """Of the model that a file was exported from; empty for files of others."""
    return {entry.value for entry in model.metadata_props if entry.key == STRUCTURE_KEY}


def _refuse_unfolded(model: nn.Module) -> None:
    if getattr(model, "quantization", None) is not None and not any(
        isinstance(m, IntegerLayer) for m in model.modules()
    ):
        raise Qwt2Error("the model is quantized but not folded; call qwt2.fold on it before exporting")
