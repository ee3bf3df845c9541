"""Reading and writing the ONNX files of this library, without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qwt2.errors import Qwt2Error
from qwt2.io import atomic_path
from qwt2.onnx.metadata import INT4_KEY, PRODUCER_KEY, properties

if TYPE_CHECKING:
    import onnx_ir as ir


def load_onnx(path: str | os.PathLike) -> onnx.ModelProto:
    """Read an ONNX file that this library exported. INT4 weights are restored to int8.

    Raises:
        Qwt2Error: the file does not exist, is not an ONNX file, or was not exported by this library.
    """
    if not Path(path).is_file():
        raise Qwt2Error(f"{path} does not exist; export the model with qwt2.export_onnx first")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's exceptions have no common base class
        raise Qwt2Error(f"{path} is not an ONNX file; export the model with qwt2.export_onnx") from error
    notes = properties(model)
    if PRODUCER_KEY not in notes:
        raise Qwt2Error(f"{path} was not exported by qwt2; export the model with qwt2.export_onnx")
    return _widened(model) if INT4_KEY in notes else model


def _widened(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx_ir as ir  # imported here, because it takes half a second and only INT4 files need it

    from qwt2.onnx.int4 import widen_int4

    widened = ir.from_proto(model)
    widen_int4(widened)
    return ir.to_proto(widened)


def save_onnx(model: ir.Model, path: str | os.PathLike) -> Path:
    """Write ``model`` atomically and return ``path``. Equal models give equal bytes."""
    import onnx_ir as ir

    data = ir.to_proto(model).SerializeToString(deterministic=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def with_batch_size(model: onnx.ModelProto, batch_size: int) -> onnx.ModelProto:
    """Return a copy with a fixed batch dimension, which OpenVINO needs before its integer passes read a model."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    batch = fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # all inputs share it
    for value in (*fixed.graph.input, *fixed.graph.output, *fixed.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if batch and dim.dim_param == batch:
                dim.dim_value = batch_size
    return fixed


def with_constant_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy without arithmetic on shapes, for importers that need every shape as a number.

    Args:
        model: a model with a fixed batch size.
    """
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    before = -1
    while len(folded.graph.node) != before:  # shapes that depend on computed shapes need another round
        before = len(folded.graph.node)
        folded = _fold_constants(onnx.shape_inference.infer_shapes(folded, data_prop=True))
    del folded.graph.value_info[:]
    return folded


def _fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Compute the nodes that depend only on constants and known shapes, except dequantized weights."""
    graph = model.graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    described = (*graph.input, *graph.value_info)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in described}
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
