"""Export of folded models to ONNX, with integer weights in the file."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from qwt2.capture.batch import Inputs, tensors
from qwt2.capture.check import evaluation_mode
from qwt2.capture.export import free_axes
from qwt2.capture.graph import GraphModel
from qwt2.errors import Qwt2Error
from qwt2.folding.layers import IntegerLayer, onnx_operators
from qwt2.io import quiet
from qwt2.onnx.file import save_onnx
from qwt2.onnx.int4 import pack_int4
from qwt2.onnx.metadata import stamp
from qwt2.onnx.passes import rewrite
from qwt2.onnx.passes.names import FIRST_NAMES
from qwt2.onnx.tensorrt_rules import violations
from qwt2.quantization.targets import TARGETS, find_target

# ONNX Runtime 1.32 moves quantizers past other operations; from opset 21 on, it gives them the wrong type there.
OPSETS = (18, 19, 20)
WEIGHT_STORAGE = ("int8", "int4")
_COPY = torch.ops.aten.clone.default
# The exporter reports its progress on the console and through warnings; a library must not.
_LOGGERS = ("torch.onnx", "onnxscript", "torch.onnx._internal.exporter", "torch.fx.experimental.symbolic_shapes")


def write_onnx(
    folded: nn.Module,
    path: str | os.PathLike,
    example_input: Inputs,
    weight_storage: str = "int8",
    opset: int = OPSETS[-1],
    output_names: Sequence[str] | None = None,
) -> Path:
    """Write a folded model as an ONNX file; :func:`qwt2.export_onnx` checks the file too.

    Args:
        folded, path, example_input, weight_storage, opset, output_names: as in :func:`qwt2.export_onnx`.

    Returns:
        ``path``.

    Raises:
        Qwt2Error: as in :func:`qwt2.export_onnx`, except for what the check of the file finds.
    """
    _refuse_unfolded(folded)
    info = getattr(folded, "quantization", None)
    target = "portable" if info is None else info.target
    check_format(target, weight_storage, opset)
    arguments, free = _example(folded, example_input)
    written = _with_tensor_outputs(folded) if isinstance(folded, GraphModel) else folded
    with evaluation_mode(folded), quiet(*_LOGGERS), torch.no_grad(), _without_collection():
        try:
            program = torch.onnx.export(
                written, **arguments, dynamo=True, opset_version=opset, input_names=list(tensors(example_input)),
                output_names=list(output_names or _output_names(folded)) or None, dynamic_shapes=free,
                custom_translation_table=onnx_operators(), verbose=False, optimize=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0][:200]
            raise Qwt2Error(
                f"{type(folded).__name__} cannot be exported: {reason}; torch.export must be able to trace its "
                "forward, which excludes branches on the values of tensors"
            ) from error
    assert program is not None  # with dynamo=True
    model = program.model
    model.graph.meta[FIRST_NAMES] = _first_names(folded)
    rewrite(model.graph, target)
    stamp(model, folded, target)
    if TARGETS[target].float_biases and (broken := violations(model)):
        raise Qwt2Error(f"target {target!r}: {broken[0]}; leave that module in float, or choose another target")
    if weight_storage == "int4":
        pack_int4(model)
    return save_onnx(model, path)


def _example(model: nn.Module, inputs: Inputs) -> tuple[dict[str, Any], Any]:
    """Return the exporter's arguments for a model with these inputs, and its dynamic axes: the first of each input."""
    # A batch of one would be specialized to a constant.
    grown = {name: x.expand(2, *x.shape[1:]) if len(x) == 1 else x for name, x in tensors(inputs).items()}
    args, kwargs = ((), grown) if isinstance(inputs, dict) else (tuple(grown.values()), {})
    return {"args": args, "kwargs": kwargs}, free_axes(model, args, kwargs)


def _with_tensor_outputs(model: GraphModel) -> GraphModel:
    """Return the model with outputs that a file can hold: only tensors, and no tensor twice."""
    outputs, kept = model.output.args[0], _tensor_outputs(model)
    if len(set(kept)) == len(outputs):
        return model
    written = copy.copy(model)  # it shares the modules
    values: dict[fx.Node, fx.Node] = {}
    written.graph = fx.Graph()
    written.graph.graph_copy(model.graph, values)
    unique = [
        values[node] if node not in kept[:number] else written.graph.call_function(_COPY, (values[node],))
        for number, node in enumerate(kept)
    ]
    written.graph.output(unique)
    written.prune()
    spec = tree_flatten(tuple(kept) if len(kept) > 1 else 0)[1]
    written.set_signature(replace(model.signature, out_spec=spec))
    return written


def _tensor_outputs(model: GraphModel) -> list[fx.Node]:
    return [node for node in model.output.args[0] if isinstance(node, fx.Node) and node.meta["shape"] is not None]


def _output_names(model: nn.Module) -> list[str]:
    """Return the names of a captured model's outputs that are tensors; an empty list where they have no names."""
    if not isinstance(model, GraphModel) or len(_tensor_outputs(model)) == 1:
        return ["logits"]
    outputs = model.output.args[0]
    names = tree_unflatten(list(range(len(outputs))), model.signature.out_spec)
    if not isinstance(names, Mapping) or not all(isinstance(number, int) for number in names.values()):
        return []
    return [name for name, number in names.items() if outputs[number] in _tensor_outputs(model)]


@contextmanager
def _without_collection() -> Iterator[None]:
    """Switch the garbage collector off: the exporter keeps its objects to the end, so collecting only wastes time.

    The collector's search through those millions of objects takes a fifth of the export's time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_format(target: str, weight_storage: str, opset: int) -> None:
    """Raise unless :func:`write_onnx` supports the target, the weight storage and the opset.

    Raises:
        Qwt2Error: one of them is not supported, or target and weight storage exclude each other.
    """
    if opset not in OPSETS:
        raise Qwt2Error(f"opset {opset} is not supported; use one of: {', '.join(map(str, OPSETS))}")
    if weight_storage not in WEIGHT_STORAGE:
        raise Qwt2Error(f"unknown weight storage {weight_storage!r}; use one of: {', '.join(WEIGHT_STORAGE)}")
    if find_target(target).float_biases and weight_storage == "int4":
        raise Qwt2Error(f"target {target!r} needs weight storage 'int8': it multiplies int4 weights only in float")


def _first_names(folded: nn.Module) -> dict[str, str]:
    """Map the names of stored tensors to their first names, where a module is registered under several."""
    first = {id(tensor): name for name, tensor in (*folded.named_parameters(), *folded.named_buffers())}
    names = {name: first[id(tensor)] for name, tensor in folded.state_dict(keep_vars=True).items()}
    return {name: other for name, other in names.items() if name != other}


def _refuse_unfolded(model: nn.Module) -> None:
    if getattr(model, "quantization", None) is not None and not any(
        isinstance(m, IntegerLayer) for m in model.modules()
    ):
        raise Qwt2Error("the model is quantized but not folded; call qwt2.fold on it before exporting")
