"""ONNX models under test: rewriting them by single passes, running them, and looking up values and nodes."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
from onnx import helper, numpy_helper


def after(model: onnx.ModelProto, *passes: Callable[[ir.Graph], None]) -> onnx.ModelProto:
    """Return a copy of a model that the passes have rewritten, and that ONNX's checker accepts."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)  # otherwise the two would share tensors and their names
    changed = ir.from_proto(copied)
    for rewrite in passes:
        rewrite(changed.graph)
    result = ir.to_proto(changed)
    onnx.checker.check_model(result, full_check=True)
    return result


def parsed(graph: str) -> onnx.ModelProto:
    """Return a model from ONNX's text form, with shapes inferred from those of its inputs."""
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(onnx.parser.parse_graph(graph), opset_imports=opsets, ir_version=10)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def run(model: onnx.ModelProto, seed: int = 0) -> list[np.ndarray]:
    """Return ONNX Runtime's outputs for normally distributed inputs, without any graph optimization."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    inputs = {value.name: rng.normal(size=value.shape).astype(np.float32) for value in session.get_inputs()}
    return session.run(None, inputs)


def equal(left: onnx.ModelProto, right: onnx.ModelProto) -> bool:
    """Return whether the outputs of two models are equal bit for bit."""
    return all(np.array_equal(a, b) for a, b in zip(run(left), run(right), strict=True))


def values_of(model: onnx.ModelProto) -> dict[str, ir.Value]:
    """Return the values of a copy of a model's graph by name; each knows its producer and its readers."""
    return ir.convenience.create_value_mapping(ir.from_proto(model).graph)


def kinds(model: onnx.ModelProto) -> list[str]:
    """Return the names of the operators in order, without constants."""
    return [node.op_type for node in model.graph.node if node.op_type != "Constant"]


def stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return the initializers by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
