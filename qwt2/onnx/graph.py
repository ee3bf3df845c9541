"""Who makes and who reads each tensor of an ONNX graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

import onnx

_ROUNDING = ("Clip", "QuantizeLinear")


class OnnxGraph:
    """The wiring of a model's graph as it was when this was made.

    Attributes:
        nodes: in execution order.
        made: tensor -> the node that makes it.
        readers: tensor -> the nodes that read it, one entry for each operand; empty for what nothing reads.
        constants: tensor -> what is stored of it: initializers and the tensors of Constant nodes.
        shapes: tensor -> its sizes, as far as the model tells them; 0 where one depends on the number of images.
        outputs: the graph's outputs.
    """

    def __init__(self, model: onnx.ModelProto):
        self._graph = model.graph
        self.nodes = list(model.graph.node)
        self.made = {name: node for node in self.nodes for name in node.output}
        self.readers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.outputs = {value.name for value in model.graph.output}
        self.shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.value_info
        }

    def only_reader(self, tensor: str) -> onnx.NodeProto | None:
        """The node that reads a tensor, if no other does and the tensor is no output."""
        readers = self.readers[tensor]
        return readers[0] if len(readers) == 1 and tensor not in self.outputs else None

    def quantizer_from(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The QuantizeLinear, Clip (if any) and DequantizeLinear, perhaps behind another Clip, that start with ``node``, or nothing."""
        chain = [node]
        while chain[-1].op_type in _ROUNDING and len(self.readers[chain[-1].output[0]]) == 1:
            chain += self.readers[chain[-1].output[0]]
        kinds = [n.op_type for n in chain]
        return chain if kinds[-1] == "DequantizeLinear" and "QuantizeLinear" in kinds else []

    def quantizer_before(self, dequantize: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The QuantizeLinear and the Clips (if any) around it that make what one dequantizer alone reads, or nothing."""
        chain: list[onnx.NodeProto] = []
        tensor = dequantize.input[0]
        while (node := self.made.get(tensor)) is not None and node.op_type in _ROUNDING and self.only_reader(tensor):
            chain.insert(0, node)
            tensor = node.input[0]
        return chain if any(node.op_type == "QuantizeLinear" for node in chain) else []

    def replace_nodes(self, nodes: Sequence[onnx.NodeProto], forget: Collection[str] = ()) -> None:
        """Give the model's graph these nodes, its own among them, in this order, and drop what it stores for others.

        Constants that no other node reads are left out.

        Args:
            forget: tensors whose shape or type is another now.
        """
        read = {name for node in nodes for name in node.input} | self.outputs
        kept = [node for node in nodes if node.op_type != "Constant" or node.output[0] in read]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        used = {name for node in copies for name in (*node.input, *node.output)} | self.outputs
        stored = [tensor for tensor in self._graph.initializer if tensor.name in used]
        unchanged = used - set(forget)
        known = [value for value in self._graph.value_info if value.name in unchanged]
        del self._graph.node[:], self._graph.initializer[:], self._graph.value_info[:]
        self._graph.node.extend(copies)
        self._graph.initializer.extend(stored)
        self._graph.value_info.extend(known)
