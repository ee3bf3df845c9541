"""Reading and writing the ONNX files of this library; needs no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qwt2.errors import Qwt2Error
from qwt2.io import atomic_path
from qwt2.onnx.int4 import widen_int4

PRODUCER_KEY = "qwt2"
TARGET_KEY = "qwt2_target"  # what the model was quantized for
SHARED_KEY = "qwt2_shared"  # quantizers that are not in the file -> equal ones that do their work
# Names of nodes that qwt2.onnx.passes adds in front of a pooling.
POOLED = "pooled/"
_PART = re.compile(r"(.+)/(\d+)of(\d+)")


def load_onnx(path: str | os.PathLike) -> onnx.ModelProto:
    """Read an ONNX file that this library exported; INT4 weights come back as the int8 they were made from.

    Raises:
        Qwt2Error: no such file, not ONNX, or not ours.
    """
    if not Path(path).is_file():
        raise Qwt2Error(f"{path} does not exist; export the model with qwt2.export_onnx first")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf has no common base for what it raises
        raise Qwt2Error(f"{path} is not an ONNX file; export the model with qwt2.export_onnx") from error
    if PRODUCER_KEY not in {entry.key for entry in model.metadata_props}:
        raise Qwt2Error(f"{path} was not exported by qwt2; export the model with qwt2.export_onnx")
    return widen_int4(model)


def save_onnx(model: onnx.ModelProto, path: str | os.PathLike) -> Path:
    """Write ``model`` atomically; equal models give equal bytes."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    return Path(path)


def with_batch_size(model: onnx.ModelProto, batch_size: int) -> onnx.ModelProto:
    """A copy with a fixed batch dimension; OpenVINO's integer passes need it before they read a model."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    batch = fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # the same of all inputs
    for value in (*fixed.graph.input, *fixed.graph.output, *fixed.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if batch and dim.dim_param == batch:
                dim.dim_value = batch_size
    return fixed


def with_constant_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without arithmetic on shapes, for importers that need every shape as a number.

    Args:
        model: of a fixed batch size.
    """
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    before = -1
    while len(folded.graph.node) != before:  # shapes that follow from other shapes take another round
        before = len(folded.graph.node)
        folded = _fold_constants(onnx.shape_inference.infer_shapes(folded, data_prop=True))
    del folded.graph.value_info[:]
    return folded


def _fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Compute what depends on constants and known shapes alone, except dequantized weights."""
    graph = model.graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (*graph.input, *graph.value_info)}
    kept = []
    for node in graph.node:
        known = all(name in values for name in node.input if name) and node.op_type != "DequantizeLinear"
        if node.op_type == "Shape" and 0 not in shapes.get(node.input[0], [0]):
            known, feeds = True, {node.input[0]: np.empty(shapes[node.input[0]], bool)}
        elif known:
            feeds = {name: values[name] for name in node.input if name}
        if not known:
            kept.append(node)
            continue
        ends = [onnx.ValueInfoProto(name=name) for name in (*feeds, *node.output)]
        piece = helper.make_graph([node], "constant", ends[: len(feeds)], ends[len(feeds) :])
        runner = ReferenceEvaluator(helper.make_model(piece, opset_imports=model.opset_import))
        values |= {name: np.asarray(array) for name, array in zip(node.output, runner.run(None, feeds))}
    used = {name for node in kept for name in node.input} | {value.name for value in graph.output}
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in values.items() if name in used)
    return model


def part_name(name: str, number: int, count: int) -> str:
    """Name of a part of a stored tensor, or of anything else of its layer (:mod:`qwt2.onnx.passes.projections`)."""
    return f"{name}/{number}of{count}"


def part_names(name: str, names: Collection[str]) -> list[str]:
    """``name`` if it is among ``names``, else those of its parts, in order; empty if it has none."""
    if name in names:
        return [name]
    count = next((int(match[3]) for key in names if (match := _PART.fullmatch(key)) and match[1] == name), 0)
    return [part_name(name, number, count) for number in range(count)]


def stored_values(name: str, state: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """What a file stores under ``name`` of a model's tensors: one of them, or a part of it; else ``None``."""
    if name in state:
        return state[name]
    match = _PART.fullmatch(name)
    if match is None or match[1] not in state:
        return None
    return np.ascontiguousarray(np.split(state[match[1]], int(match[3]), axis=-1)[int(match[2])])


def shared_quantizers(model: onnx.ModelProto) -> dict[str, str]:
    """Quantizers that are not in a file -> the equal ones that do their work; see :func:`qwt2.onnx.passes.share_quantizers`."""
    [found] = [entry.value for entry in model.metadata_props if entry.key == SHARED_KEY] or ["{}"]
    return json.loads(found)


def set_shared_quantizers(model: onnx.ModelProto, shared: dict[str, str]) -> None:
    """Note them in a file."""
    kept = [entry for entry in model.metadata_props if entry.key != SHARED_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    if shared:
        model.metadata_props.add(key=SHARED_KEY, value=json.dumps(shared, sort_keys=True))
