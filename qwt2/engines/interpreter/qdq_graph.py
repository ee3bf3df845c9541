"""Conversion of an exported ONNX file to a PyTorch graph of the quantize and dequantize operators of its compilers.

PyTorch's compilers expect nothing between the two operators of a pair, so values are clipped instead of codes. Weights
are int8 constants followed by a dequantize operator, and activations pass through quantize and dequantize. Biases are
float32, as those compilers require.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from qwt2.engines.interpreter.graph import OPS, Codes, TorchGraph
from qwt2.errors import Qwt2Error
from qwt2.onnx.graph import copy_node, make, make_constant, maker
from qwt2.onnx.passes.tensorrt import clip_values

OPERATORS = torch.ops.quantized_decomposed


class QuantizedGraph(TorchGraph):
    """A :class:`qwt2.engines.interpreter.graph.TorchGraph` that is traced instead of run.

    Attributes:
        input_values: the graph's inputs.
        inputs: the names of the graph's inputs.
    """

    def __init__(self, model: onnx.ModelProto):
        clipped = ir.from_proto(model)
        clip_values(clipped.graph)
        _pad_codes(clipped.graph)
        model = ir.to_proto(clipped)
        super().__init__(model)
        self.input_values = list(model.graph.input)
        self.inputs = [value.name for value in self.input_values]
        self._prepare_constants()

    def _function(self, node: onnx.NodeProto, opsets: dict[str, int]) -> Callable[..., Any]:
        own: dict[str, Callable[..., Any]] = {
            "QuantizeLinear": self._quantize, "DequantizeLinear": self._dequantize,
            "Gemm": _gemm, "MatMul": _matmul, "Conv": _conv,
        }  # fmt: skip
        if node.op_type == "Clip" and self.constants.keys() >= {name for name in node.input[1:] if name}:
            return _clip
        function = own.get(node.op_type) or OPS.get(node.op_type)
        if function is None:
            raise Qwt2Error(f"inductor has no {node.op_type}; run this file on another engine")
        return function

    def trace(self, inputs: list[Tensor]) -> fx.GraphModule:
        """Trace the graph for inputs of these shapes, in the order of :attr:`inputs`; the result returns a tuple."""

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.run(dict(zip(self.inputs, tensors))).values())

        with torch.no_grad():
            traced = make_fx(run)(*inputs)
        traced.graph.eliminate_dead_code()
        traced.recompile()
        return traced

    def _prepare_constants(self) -> None:
        """Transpose Gemm weights to (out, in), as in ``nn.Linear``, and dequantize biases to float32."""
        dequantize = {node.output[0]: node for node in self.nodes if node.op_type == "DequantizeLinear"}
        codes = [
            dequantize[node.input[1]].input[0]
            for node in self.nodes
            if node.op_type == "Gemm" and node.input[1] in dequantize
        ]
        for name in set(codes):
            self.constants[name] = self.constants[name].t().contiguous()
        for name, node in dequantize.items():
            stored = self.constants.get(node.input[0])
            if stored is not None and stored.dtype == torch.int32:
                scale, zero_point = (self.constants[i] for i in node.input[1:])
                self.constants[name] = Codes(stored, scale, zero_point, 0).dequantize()
                self._drop(node)
            elif stored is not None:
                self.constants[node.input[2]] = self.constants[node.input[2]].long()

    def _quantize(self, attributes, x, scale, zero_point):
        return OPERATORS.quantize_per_tensor.default(x, *self._parameters(scale, zero_point))

    def _dequantize(self, attributes, codes, scale, zero_point):
        """Dequantize an activation. A weight stays codes, because only the layer that reads it knows its axis."""
        if scale.dim():
            return Codes(codes, scale, zero_point, attributes.get("axis", 1))
        return OPERATORS.dequantize_per_tensor.default(codes, *self._parameters(scale, zero_point))

    @staticmethod
    def _parameters(scale: Tensor, zero_point: Tensor) -> tuple[float, int, int, int, torch.dtype]:
        """Return scale, zero point, smallest and largest code, and type of the codes."""
        limits = torch.iinfo(zero_point.dtype)
        return float(scale), int(zero_point), limits.min, limits.max, zero_point.dtype

    def _drop(self, node: onnx.NodeProto) -> None:
        index = self.nodes.index(node)
        for steps in (self.nodes, self.functions, self.attributes, self.released):
            del steps[index]
        self.released = [[name for name in names if name not in self.constants] for names in self.released]


def _pad_codes(graph: ir.Graph) -> None:
    """Pad codes in front of convolutions whose padding differs between the sides.

    PyTorch has no such convolutions, and its compilers need the dequantizer right in front of a convolution.
    """
    for conv in [node for node in graph if node.op_type == "Conv" and _is_uneven(node)]:
        dequantize = maker(conv.inputs[0], "DequantizeLinear")
        if dequantize is None:
            continue
        top, left, bottom, right = conv.attributes.get_ints("pads")
        widths = make_constant(f"{conv.name}/widths", np.array([0, 0, top, left, 0, 0, bottom, right]))
        pad = make("Pad", [dequantize.inputs[0], widths.outputs[0], dequantize.inputs[2]], f"{conv.name}/padded")
        own = copy_node(dequantize, [pad.outputs[0], *dequantize.inputs[1:]], lambda name: f"{conv.name}/{name}")  # noqa: B023 - called at once
        conv.prepend([widths, pad, own])
        conv.replace_input_with(0, own.outputs[0])
        del conv.attributes["pads"]


def _is_uneven(conv: ir.Node) -> bool:
    pads = conv.attributes.get_ints("pads", [])
    return pads[: len(pads) // 2] != pads[len(pads) // 2 :]


def _weight(weight: Codes | Tensor) -> Tensor:
    """Dequantize a weight whose first axis is the output channel."""
    if isinstance(weight, Tensor):
        return weight
    return OPERATORS.dequantize_per_channel.default(
        weight.codes, weight.scale, weight.zero_point, 0, -128, 127, torch.int8
    )


def _clip(attributes, x, low=None, high=None):
    """Clip to numbers: Inductor merges a clamp into the convolution in front of it, but not one to tensors."""
    return x.clamp(*(None if bound is None else float(bound) for bound in (low, high)))


def _gemm(attributes, a, b, c=None):
    if isinstance(b, Codes):
        return F.linear(a, _weight(b), c)
    y = (a.T if attributes.get("transA") else a) @ (b.T if attributes.get("transB") else b)
    return y if c is None else y + c


def _matmul(attributes, a, b):
    return a @ b


def _conv(attributes, x, weight, bias=None):
    stride, dilation = (attributes.get(name, [1, 1]) for name in ("strides", "dilations"))
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, _weight(weight), bias, stride, (top, left), dilation, attributes.get("group", 1))
