"""Passes that change where activations are quantized: before poolings, around additions, and once for equal quantizers.

No value changes, bit for bit: rounding to a grid is repeated only on values that already lie on it.
"""

from __future__ import annotations

import onnx_ir as ir

from qwt2.onnx.graph import bypass, copy_node, grid, only_reader, quantizer_from, readers
from qwt2.onnx.metadata import SHARED
from qwt2.onnx.names import POOLED

# Operations behind an addition that OpenVINO computes in a convolution's kernel.
_FUSED = ("Gelu", "HardSigmoid", "HardSwish", "Relu", "Sigmoid", "Tanh")


def drop_later_attributes(graph: ir.Graph) -> None:
    """Remove default-valued attributes that the exporter writes but quantizers of older opsets do not have."""
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for name in node.attributes.keys() - {"axis"}:
                del node.attributes[name]


def quantize_before_pooling(graph: ir.Graph) -> None:
    """Quantize the input of a MaxPool too, if only equal quantizers read its output.

    The code of the largest value is the largest code, so the quantizers behind the MaxPool read values that already lie
    on their grid. The pooling and the layer in front of it then work on codes.
    """
    for pooling in [node for node in graph if node.op_type == "MaxPool"]:
        behind = pooling.outputs[0]
        found = set(readers(behind))
        quantizers = [quantizer_from(node) for node in graph if node in found]  # in graph order, to copy the first
        if not all(quantizers) or len(set(map(grid, quantizers))) != 1 or behind.is_graph_output():
            continue
        if not pooling.inputs[0].name.startswith(POOLED):  # else the input is quantized already
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
    """Reduce each clip-only quantizer to its float Clip, or to its QuantizeLinear/DequantizeLinear pair.

    OpenVINO (2026.4) skips the rounding of a convolution's quantizer in front of an addition if one quantizer reads the
    sum, and computes all of it in the convolution's kernel. There the pair stays. Elsewhere OpenVINO would round, so
    the Clip stays. The bounds of these quantizers are stored as ``<name>.low`` and ``<name>.high`` beside
    ``<name>.scale``.
    """
    superfluous: list[ir.Node] = []
    for low in [value for name, value in graph.initializers.items() if name.endswith(".low")]:
        scale = graph.initializers.get(f"{low.name.removesuffix('.low')}.scale")
        for quantize in [] if scale is None else [node for node in readers(scale) if node.op_type == "QuantizeLinear"]:
            pair = quantizer_from(quantize)
            superfluous += readers(low) if _is_rounded_once(pair[-1].outputs[0]) else pair
    for node in dict.fromkeys(superfluous):  # Clips of a layer that runs several times share their bounds
        bypass(node)


def _is_rounded_once(operand: ir.Value) -> bool:
    """Return whether a value is an operand of a sum that, perhaps after activations, only equal quantizers read."""
    node = only_reader(operand)
    if node is None or node.op_type != "Add":
        return False
    while (reader := only_reader(node.outputs[0])) is not None and reader.op_type in _FUSED:
        node = reader
    quantizers = [quantizer_from(reader) for reader in readers(node.outputs[0])]
    return all(quantizers) and len(set(map(grid, quantizers))) == 1 and not node.outputs[0].is_graph_output()


def share_quantizers(graph: ir.Graph) -> None:
    """Replace several equal quantizers of a tensor by the first of them.

    Engines run a layer in an integer kernel if one quantizer follows it, and in float if several do.
    ``graph.meta[SHARED]`` (:data:`qwt2.onnx.metadata.SHARED`) then maps each removed quantizer to the kept one.
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
