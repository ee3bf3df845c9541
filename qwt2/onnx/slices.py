"""Slicing of the ONNX files that this library writes: every integer module by itself; needs no torch."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qwt2.onnx.file import POOLED, part_names, shared_quantizers
from qwt2.onnx.graph import OnnxGraph

# Between a layer and the next quantizer, engines merge these into the layer's integer kernel.
_MERGED = ("Relu", "Clip", "QuantizeLinear", "DequantizeLinear")


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
