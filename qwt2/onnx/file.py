"""Reading and slicing the ONNX files that this library writes; needs no torch."""

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
from qwt2.onnx.graph import OnnxGraph
from qwt2.onnx.int4 import widen_int4

PRODUCER_KEY = "qwt2"
VARIANT_KEY = "qwt2_variant"  # how the model was quantized
SHARED_KEY = "qwt2_shared"  # quantizers that are not in the file -> equal ones that do their work
# Names of nodes that qwt2.onnx.passes adds in front of a pooling.
POOLED = "pooled/"
_PART = re.compile(r"(.+)/(\d+)of(\d+)")
# Between a layer and the next quantizer, engines merge these into the layer's integer kernel.
_MERGED = ("Relu", "Clip", "QuantizeLinear", "DequantizeLinear")


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


def slice_modules(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> tuple[onnx.ModelProto, dict[str, "Slice"]]:
    """One model that runs every integer module by itself.

    Each module becomes a separate piece of the graph with its own inputs and output: from the float
    tensor before its quantizer to its output, or, where the exported graph goes on to the next
    quantizer through nothing but an activation, to there (engines then run one integer kernel).

    Args:
        model: an exported model.
        inputs: arrays named "<module>.input", or "<module>.a" and "<module>.b" for products.

    Returns:
        The model, whose inputs bear those names, and module name -> :class:`Slice`.
    """
    graph = _Modules(model)
    modules = sorted({name.rpartition(".")[0] for name in inputs})
    nodes, slices = [], {}
    for module in modules:
        piece, output, epilogue = graph.piece(module)
        nodes += piece
        slices[module] = Slice(output, [graph.describe(n) for n in epilogue], graph.output_scale(module))
    values = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, a.shape) for n, a in inputs.items()]
    used = {name for node in nodes for name in node.input}
    sliced = helper.make_graph(
        nodes, "modules", values,
        [helper.make_tensor_value_info(s.output, onnx.TensorProto.FLOAT, None) for s in slices.values()],
        [tensor for tensor in model.graph.initializer if tensor.name in used],
    )  # fmt: skip
    return helper.make_model(sliced, opset_imports=model.opset_import, ir_version=model.ir_version), slices


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


class Slice:
    """Where a module's slice ends, and what follows the module inside the slice.

    Attributes:
        output: name of the slice's output tensor.
        scale: of the module's own output quantizer, if it has one.
    """

    def __init__(self, output: str, epilogue: list[tuple[str, list[np.ndarray]]], scale: float | None):
        self.output, self.epilogue, self.scale = output, epilogue, scale

    def expected(self, y: np.ndarray) -> np.ndarray:
        """The slice's output, from the module's own output."""
        for kind, constants in self.epilogue:
            if kind == "Relu":
                y = np.maximum(y, 0)
            elif kind == "Clip":
                y = np.clip(y, *constants)
            elif kind == "QuantizeLinear":
                scale, zero = constants
                limits = np.iinfo(zero.dtype)
                y = np.clip(np.rint(y / scale) + zero, limits.min, limits.max)
            else:
                scale, zero = constants
                y = ((y - zero) * scale).astype(np.float32)
        return y

    def step(self, expected: np.ndarray) -> float:
        """One output step: the quantizer's scale at the slice's end, or an 8-bit step of its range."""
        for kind, constants in reversed(self.epilogue):
            if kind == "DequantizeLinear":
                return float(constants[0])
        return self.scale or max(float(expected.max() - expected.min()) / 255, np.finfo(np.float32).tiny)


class _Modules(OnnxGraph):
    """The integer modules of a graph."""

    def __init__(self, model: onnx.ModelProto):
        super().__init__(model)
        self.shared = shared_quantizers(model)

    def piece(self, module: str) -> tuple[list[onnx.NodeProto], str, list[onnx.NodeProto]]:
        """Nodes of one module's slice, its output tensor, and the part after the module itself.

        Of a module that runs several times in one pass, the first run is taken.
        """
        roles = ["input"] if part_names(f"{module}.weight", self.constants) else ["a", "b"]
        operations, nodes = self._layer(module) if roles == ["input"] else self._products(module)
        aliases = {}
        for operand, role in enumerate(roles):
            quantizer = self._quantizer(f"{module}.{role}")
            aliases[quantizer[0].input[0]] = f"{module}.{role}"
            aliases[quantizer[-1].input[0]] = quantizer[-2].output[0]  # codes may be rolled between the two
            nodes += quantizer
            # A reshape or transpose may lie between; the recorded inputs are as the module saw them.
            aliases |= {operation.input[operand]: quantizer[-1].output[0] for operation in operations}
        nodes += operations
        if len(operations) > 1:
            nodes.append(helper.make_node("Concat", [o.output[0] for o in operations], [module], axis=1))
        if f"{module}.output.scale" in self.constants:
            nodes += self._quantizer(f"{module}.output")
        epilogue = self._epilogue(nodes[-1].output[0])
        copies = _isolated(nodes + epilogue, module, aliases)
        return copies, copies[-1].output[0], epilogue

    def _layer(self, module: str) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
        """A layer's operation, or those of its parts, and what dequantizes its weight and bias."""
        operations, nodes = [], []
        for weight_name, bias_name in zip(*(part_names(f"{module}.{kind}", self.constants) for kind in ("weight", "bias"))):
            weight, bias = self.readers[weight_name][0], self.readers[bias_name][0]
            operations.append(self.readers[weight.output[0]][0])
            nodes.append(weight)
            if bias.op_type == "DequantizeLinear":  # else it is float, and the operation reads it
                nodes.append(bias)
        return operations, nodes

    def _products(self, module: str) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
        return [self._product(self._quantizer(f"{module}.a")[-1].output[0])], []

    def _product(self, tensor: str) -> onnx.NodeProto:
        """The matrix product that reads a tensor, perhaps after a transpose."""
        [reader] = self.readers[tensor]
        return reader if reader.op_type == "MatMul" else self._product(reader.output[0])

    def output_scale(self, module: str) -> float | None:
        """Scale of a module's output quantizer, if it has one."""
        tensor = self.constants.get(f"{module}.output.scale")
        return None if tensor is None else float(numpy_helper.to_array(tensor))

    def _quantizer(self, prefix: str) -> list[onnx.NodeProto]:
        """The QuantizeLinear, Clip (if any) and DequantizeLinear with these scales, or equal ones, perhaps behind another Clip."""
        prefix = self.shared.get(prefix, prefix)
        users = self.readers[f"{prefix}.scale"]
        users = [node for node in users if not node.name.startswith(POOLED)]
        quantize = next(n for n in users if n.op_type == "QuantizeLinear")
        dequantize = next(n for n in users if n.op_type == "DequantizeLinear")
        values, codes = (
            [node for node in self.readers[f"{prefix}.{end}"] if not node.name.startswith(POOLED)][:1] for end in ("low", "lowest")
        )
        return [*values, quantize, *codes, dequantize]

    def _epilogue(self, tensor: str) -> list[onnx.NodeProto]:
        """What lies between a tensor and the end of the next quantizer, if only mergeable nodes do."""
        nodes: list[onnx.NodeProto] = []
        while (reader := self.only_reader(tensor)) is not None and reader.op_type in _MERGED:
            nodes.append(reader)
            tensor = reader.output[0]
            if nodes[-1].op_type == "DequantizeLinear":
                return nodes
        return []

    def describe(self, node: onnx.NodeProto) -> tuple[str, list[np.ndarray]]:
        return node.op_type, [numpy_helper.to_array(self.constants[name]) for name in node.input[1:]]


def _isolated(nodes: list[onnx.NodeProto], module: str, aliases: dict[str, str]) -> list[onnx.NodeProto]:
    """Copies whose own tensors bear the module's name, so that slices may share nodes of the graph."""
    made = {name for node in nodes for name in node.output}
    copies = []
    for number, node in enumerate(nodes):
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{module}/{number}"
        inputs = [aliases.get(name, name) for name in node.input]
        copy.input[:] = [f"{module}/{name}" if name in made else name for name in inputs]
        copy.output[:] = [f"{module}/{name}" for name in node.output]
        copies.append(copy)
    return copies
