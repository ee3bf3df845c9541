"""Slicing of the ONNX files of this library into their integer modules, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qwt2.onnx.graph import constant, copy_node, make, only_reader, readers
from qwt2.onnx.metadata import folded_pads, properties, shared_quantizers
from qwt2.onnx.names import POOLED, part_names

# Operations between a layer and the next quantizer that engines merge into the layer's integer kernel.
_MERGED = ("Relu", "Clip", "QuantizeLinear", "DequantizeLinear")


def slice_modules(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> tuple[onnx.ModelProto, dict[str, Slice]]:
    """Build one model that runs every integer module by itself.

    Each module becomes a separate piece of the graph with its own inputs and output. It starts at the float tensor
    before the module's quantizer and ends at the module's output. If only an activation lies between that output and
    the next quantizer, the piece ends behind that quantizer, because engines run all of it in one integer kernel.

    Args:
        model: an exported model.
        inputs: arrays named "<module>.input", or "<module>.a" and "<module>.b" for products.

    Returns:
        The model, with inputs of those names, and a dictionary from module name to :class:`Slice`.
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
    """The end of a module's slice, and the nodes behind the module inside the slice.

    Attributes:
        output: name of the slice's output tensor.
        epilogue: kind and constants of each node behind the module; ``None`` for a bound that a Clip does not have.
        scale: scale of the module's own output quantizer, if it has one.
    """

    def __init__(self, output: str, epilogue: list[tuple[str, list[Any]]], scale: float | None):
        self.output, self.epilogue, self.scale = output, epilogue, scale

    def expected(self, y: np.ndarray) -> np.ndarray:
        """Return the slice's output for the module's own output ``y``."""
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
        """Return one output step: the scale of the last quantizer, or 1/255 of the range of ``expected``."""
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
        """Return a module's nodes, the nodes of its slice behind it, and the values that the slice reads for others.

        For a module that runs several times in one forward pass, these are the nodes of the first run.
        """
        roles = ["input"] if part_names(f"{module}.weight", self.stored) else ["a", "b"]
        operations, nodes = self._layer(module) if roles == ["input"] else self._products(module)
        aliases = {}
        for operand, role in enumerate(roles):
            quantizer = self._quantizer(f"{module}.{role}")
            aliases[quantizer[0].inputs[0]] = recorded[f"{module}.{role}"]
            aliases[quantizer[-1].inputs[0]] = quantizer[-2].outputs[0]  # codes may be rolled between the two
            nodes += quantizer
            # A reshape or transpose may lie between; the recorded inputs have the shape that the module saw.
            aliases |= {operation.inputs[operand]: quantizer[-1].outputs[0] for operation in operations}
        nodes += operations
        if len(operations) > 1:
            nodes.append(make("Concat", [operation.outputs[0] for operation in operations], module, axis=1))
        if f"{module}.output.scale" in self.stored:
            nodes += self._quantizer(f"{module}.output")
        return nodes, _epilogue(nodes[-1].outputs[0]), aliases

    def _layer(self, module: str) -> tuple[list[ir.Node], list[ir.Node]]:
        """Return the operation of a layer, or those of its parts, and the dequantizers of its weight and bias."""
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
        """Return the scale of a module's output quantizer, if it has one."""
        scale = constant(self.stored.get(f"{module}.output.scale"))
        return None if scale is None else float(scale)

    def _quantizer(self, prefix: str) -> list[ir.Node]:
        """Return the nodes of a quantizer, or of the equal one that does its work in the file.

        They are a Clip of values (if any), the QuantizeLinear, a Clip of codes (if any) and the DequantizeLinear.
        """
        prefix = self.shared.get(prefix, prefix)
        users, values, codes = (self._users(f"{prefix}.{name}") for name in ("scale", "low", "lowest"))
        quantize = next(node for node in users if node.op_type == "QuantizeLinear")
        dequantize = next(node for node in users if node.op_type == "DequantizeLinear")
        return [*values[:1], quantize, *codes[:1], dequantize]

    def _users(self, name: str) -> list[ir.Node]:
        """Return the nodes that read the stored tensor of this name, except the copies in front of a pooling."""
        nodes = readers(self.stored[name]) if name in self.stored else []
        return [node for node in nodes if not node.name.startswith(POOLED)]


def _product(value: ir.Value) -> ir.Node:
    """Return the matrix product that reads a tensor, directly or behind a transpose."""
    [reader] = readers(value)
    return reader if reader.op_type == "MatMul" else _product(reader.outputs[0])


def _epilogue(value: ir.Value) -> list[ir.Node]:
    """Return the nodes from a tensor to the end of the next quantizer; empty if one of them cannot be merged."""
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
    """Copy nodes and prefix their tensors with the module's name, so that slices may share nodes of the graph.

    Args:
        nodes: the nodes of one slice, in order.
        module: name of the module.
        aliases: values of the graph -> values that the slice reads instead.
        stored: constants of the graph -> constants of the slices. New ones are added in place.
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
        if folded := folded_pads(node):  # the module's recorded inputs are padded already
            own_pads = [a - b for a, b in zip(node.attributes.get_ints("pads"), folded)]
            copies[-1].attributes["pads"] = ir.AttrInt64s("pads", own_pads)
        made |= zip(node.outputs, copies[-1].outputs)
    return copies
