"""Slicing of the ONNX files that this library writes: every integer module by itself; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qwt2.onnx.graph import constant, copy_node, make, only_reader, readers
from qwt2.onnx.metadata import properties, shared_quantizers
from qwt2.onnx.names import POOLED, part_names

# Between a layer and the next quantizer, engines merge these into the layer's integer kernel.
_MERGED = ("Relu", "Clip", "QuantizeLinear", "DequantizeLinear")


def slice_modules(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> tuple[onnx.ModelProto, dict[str, Slice]]:
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
    modules = _Modules(model)
    recorded = {name: ir.val(name, ir.DataType.FLOAT, array.shape) for name, array in inputs.items()}
    stored: dict[ir.Value, ir.Value] = {}
    nodes: list[ir.Node] = []
    outputs: list[ir.Value] = []
    slices: dict[str, Slice] = {}
    for module in sorted({name.rpartition(".")[0] for name in inputs}):
        piece, epilogue, aliases = modules.piece(module, recorded)
        nodes += _isolated(piece + epilogue, module, aliases, stored)
        outputs += nodes[-1].outputs
        outputs[-1].dtype = ir.DataType.FLOAT
        slices[module] = Slice(outputs[-1].name, [_describe(node) for node in epilogue], modules.output_scale(module))
    graph = ir.Graph(
        list(recorded.values()), outputs, nodes=nodes,
        initializers=list(stored.values()), opset_imports=modules.graph.opset_imports, name="modules",
    )  # fmt: skip
    return ir.to_proto(ir.Model(graph, ir_version=model.ir_version)), slices


class Slice:
    """Where a module's slice ends, and what follows the module inside the slice.

    Attributes:
        output: name of the slice's output tensor.
        epilogue: kind and constants of each node that follows; ``None`` for an end that a Clip does not have.
        scale: of the module's own output quantizer, if it has one.
    """

    def __init__(self, output: str, epilogue: list[tuple[str, list[Any]]], scale: float | None):
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
        return self.scale or max(float(expected.max() - expected.min()) / 255, float(np.finfo(np.float32).tiny))


class _Modules:
    """The integer modules of a model."""

    def __init__(self, model: onnx.ModelProto):
        self.graph = ir.from_proto(model).graph
        self.stored = self.graph.initializers
        self.shared = shared_quantizers(properties(model))

    def piece(
        self, module: str, recorded: Mapping[str, ir.Value]
    ) -> tuple[list[ir.Node], list[ir.Node], dict[ir.Value, ir.Value]]:
        """Nodes of one module, the part of its slice after it, and what is read in the slice in place of other values.

        Of a module that runs several times in one pass, the first run is taken.
        """
        roles = ["input"] if part_names(f"{module}.weight", self.stored) else ["a", "b"]
        operations, nodes = self._layer(module) if roles == ["input"] else self._products(module)
        aliases = {}
        for operand, role in enumerate(roles):
            quantizer = self._quantizer(f"{module}.{role}")
            aliases[quantizer[0].inputs[0]] = recorded[f"{module}.{role}"]
            aliases[quantizer[-1].inputs[0]] = quantizer[-2].outputs[0]  # codes may be rolled between the two
            nodes += quantizer
            # A reshape or transpose may lie between; the recorded inputs are as the module saw them.
            aliases |= {operation.inputs[operand]: quantizer[-1].outputs[0] for operation in operations}
        nodes += operations
        if len(operations) > 1:
            nodes.append(make("Concat", [operation.outputs[0] for operation in operations], module, axis=1))
        if f"{module}.output.scale" in self.stored:
            nodes += self._quantizer(f"{module}.output")
        return nodes, _epilogue(nodes[-1].outputs[0]), aliases

    def _layer(self, module: str) -> tuple[list[ir.Node], list[ir.Node]]:
        """A layer's operation, or those of its parts, and what dequantizes its weight and bias."""
        operations, nodes = [], []
        names = [part_names(f"{module}.{kind}", self.stored) for kind in ("weight", "bias")]
        for weight, bias in ((readers(self.stored[name])[0] for name in pair) for pair in zip(*names)):
            operations.append(readers(weight.outputs[0])[0])
            nodes.append(weight)
            if bias.op_type == "DequantizeLinear":  # else it is float, and the operation reads it
                nodes.append(bias)
        return operations, nodes

    def _products(self, module: str) -> tuple[list[ir.Node], list[ir.Node]]:
        return [_product(self._quantizer(f"{module}.a")[-1].outputs[0])], []

    def output_scale(self, module: str) -> float | None:
        """Scale of a module's output quantizer, if it has one."""
        scale = constant(self.stored.get(f"{module}.output.scale"))
        return None if scale is None else float(scale)

    def _quantizer(self, prefix: str) -> list[ir.Node]:
        """The QuantizeLinear, Clip (if any) and DequantizeLinear with these scales, or equal ones.

        The first is another Clip where the quantizer does not round.
        """
        prefix = self.shared.get(prefix, prefix)
        users, values, codes = (self._users(f"{prefix}.{name}") for name in ("scale", "low", "lowest"))
        quantize = next(node for node in users if node.op_type == "QuantizeLinear")
        dequantize = next(node for node in users if node.op_type == "DequantizeLinear")
        return [*values[:1], quantize, *codes[:1], dequantize]

    def _users(self, name: str) -> list[ir.Node]:
        """The nodes that read what is stored under a name, but for those in front of a pooling."""
        nodes = readers(self.stored[name]) if name in self.stored else []
        return [node for node in nodes if not node.name.startswith(POOLED)]


def _product(value: ir.Value) -> ir.Node:
    """The matrix product that reads a tensor, perhaps after a transpose."""
    [reader] = readers(value)
    return reader if reader.op_type == "MatMul" else _product(reader.outputs[0])


def _epilogue(value: ir.Value) -> list[ir.Node]:
    """What lies between a tensor and the end of the next quantizer, if only mergeable nodes do."""
    nodes: list[ir.Node] = []
    while (reader := only_reader(value)) is not None and reader.op_type in _MERGED:
        nodes.append(reader)
        value = reader.outputs[0]
        if reader.op_type == "DequantizeLinear":
            return nodes
    return []


def _describe(node: ir.Node) -> tuple[str, list[np.ndarray | None]]:
    return node.op_type, [constant(value) for value in node.inputs[1:]]


def _isolated(
    nodes: list[ir.Node], module: str, aliases: Mapping[ir.Value, ir.Value], stored: dict[ir.Value, ir.Value]
) -> list[ir.Node]:
    """Copies whose own tensors bear the module's name, so that slices may share nodes of the graph.

    Args:
        stored: constants of the graph -> those of the slices, which this adds to.
    """
    made: dict[ir.Value, ir.Value] = {}

    def own(value: ir.Value) -> ir.Value:
        value = aliases.get(value, value)
        if (array := constant(value)) is not None:
            stored.setdefault(value, ir.val(value.name, const_value=ir.tensor(array, name=value.name)))
        return made.get(value) or stored.get(value) or value

    copies = []
    for node in nodes:
        copies.append(copy_node(node, list(map(own, node.inputs)), lambda name: f"{module}/{name}"))
        made |= zip(node.outputs, copies[-1].outputs)
    return copies
