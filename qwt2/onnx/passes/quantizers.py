"""Where activations are rounded: in front of poolings, around additions, and once where several quantizers are equal.

Every value stays what it was, bit for bit: rounding to a grid is repeated only on what lies on it already.
"""

from __future__ import annotations

import onnx_ir as ir

from qwt2.onnx.graph import bypass, copy_node, grid, only_reader, quantizer_from, readers
from qwt2.onnx.metadata import SHARED
from qwt2.onnx.names import POOLED

# What OpenVINO computes, behind an addition, in a convolution's kernel.
_FUSED = ("Gelu", "HardSigmoid", "HardSwish", "Relu", "Sigmoid", "Tanh")


def drop_later_attributes(graph: ir.Graph) -> None:
    """Drop attributes that the exporter writes out with their defaults: quantizers of older opsets do not have them."""
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for name in node.attributes.keys() - {"axis"}:
                del node.attributes[name]


def quantize_before_pooling(graph: ir.Graph) -> None:
    """Quantize what a MaxPool reads too, where quantizers of one scale and nothing else read its output.

    The largest value's code is the largest code, so the quantizers behind it find everything on their grid; the pooling
    and the layer in front then work on codes.
    """
    for pooling in [node for node in graph if node.op_type == "MaxPool"]:
        behind = pooling.outputs[0]
        found = set(readers(behind))
        quantizers = [quantizer_from(node) for node in graph if node in found]  # in order: the first lends its names
        if not all(quantizers) or len(set(map(grid, quantizers))) != 1 or behind.is_graph_output():
            continue
        if not pooling.inputs[0].name.startswith(POOLED):  # else it is done
            _quantize_before(pooling, quantizers[0])


def _quantize_before(pooling: ir.Node, quantizer: list[ir.Node]) -> None:
    """Put a copy of a quantizer in front of a pooling."""
    name, value = f"{POOLED}{pooling.outputs[0].name}", pooling.inputs[0]
    for number, node in enumerate(quantizer):
        copy = copy_node(node, [value, *node.inputs[1:]], lambda _: f"{name}/{number}")  # noqa: B023 - called at once
        pooling.prepend(copy)
        value = copy.outputs[0]
    pooling.replace_input_with(0, value)


def fuse_additions(graph: ir.Graph) -> None:
    """Reduce each quantizer that does not round either to its Clip of values, or to its pair without that Clip.

    In front of an addition, OpenVINO (2026.4) leaves out the rounding of a convolution's quantizer where one quantizer
    reads the sum, and computes all in the convolution's kernel; the pair stays there. Elsewhere OpenVINO would round,
    and the Clip stays. The ends of these quantizers, `<name>.low` and `<name>.high`, are stored beside `<name>.scale`.
    """
    superfluous: list[ir.Node] = []
    for low in [value for name, value in graph.initializers.items() if name.endswith(".low")]:
        scale = graph.initializers.get(f"{low.name.removesuffix('.low')}.scale")
        for quantize in [] if scale is None else [node for node in readers(scale) if node.op_type == "QuantizeLinear"]:
            pair = quantizer_from(quantize)
            superfluous += readers(low) if _is_rounded_once(pair[-1].outputs[0]) else pair
    for node in dict.fromkeys(superfluous):  # a layer that runs several times shares its Clips' ends
        bypass(node)


def _is_rounded_once(operand: ir.Value) -> bool:
    """Whether only one quantizer, or equal ones, read the sum of which a value is an operand, activated or not."""
    node = only_reader(operand)
    if node is None or node.op_type != "Add":
        return False
    while (reader := only_reader(node.outputs[0])) is not None and reader.op_type in _FUSED:
        node = reader
    quantizers = [quantizer_from(reader) for reader in readers(node.outputs[0])]
    return all(quantizers) and len(set(map(grid, quantizers))) == 1 and not node.outputs[0].is_graph_output()


def share_quantizers(graph: ir.Graph) -> None:
    """Let one of several equal quantizers of a tensor do the work of all.

    Engines take a layer and the one quantizer behind it for an integer kernel, and leave it in float where there are
    more.
    Graph.meta, under :data:`qwt2.onnx.metadata.SHARED`, then tells which quantizers are not in the graph any more.
    """
    first: dict[tuple, list[ir.Node]] = {}
    shared = graph.meta.setdefault(SHARED, {})
    for node in graph:
        quantizer = quantizer_from(node)
        if not quantizer or quantizer[-1].outputs[0].is_graph_output():
            continue
        kept = first.setdefault((node.inputs[0], grid(quantizer)), quantizer)
        if kept is not quantizer:
            name, other = (nodes[-1].inputs[1].name.removesuffix(".scale") for nodes in (quantizer, kept))
            shared[name] = other
            quantizer[-1].outputs[0].replace_all_uses_with(kept[-1].outputs[0])
            graph.remove(quantizer, safe=True)
