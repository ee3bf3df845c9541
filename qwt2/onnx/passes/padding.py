"""A pass that lets convolutions pad their own inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qwt2.onnx.graph import bypass, constant, quantizer_from
from qwt2.onnx.metadata import note_folded_pads


def fold_pads(graph: ir.Graph) -> None:
    """Remove Pads with zeros that only convolutions read, and add their widths to the convolutions' own ``pads``.

    Models write such Pads where the padding differs between the sides of an image, as TensorFlow's "SAME" does. A
    quantizer may lie between the two, because it maps 0 to its zero point, and convolutions of codes pad with that.
    Engines compute a Pad in float, and cannot merge the layer in front of it with the quantizer behind it.
    """
    for pad in reversed([node for node in graph if node.op_type == "Pad"]):  # of several in a row, the last is first
        widths, source = _image_widths(pad), pad.inputs[0]
        convolutions = _convolutions(pad.outputs[0]) if widths else []
        if convolutions:
            bypass(pad)
        for convolution in convolutions:
            _grow(convolution, widths)
            _resize(convolution.inputs[0], source)


def _image_widths(pad: ir.Node) -> list[int]:
    """Return how many zeros a Pad adds at each side of images, in the order of ``pads``; empty for any other Pad."""
    widths, value, axes = (*pad.inputs[1:], None, None)[:3]
    sides, number = constant(widths), np.zeros(()) if value is None else constant(value)
    if axes is not None or sides is None or number is None or number.any() or (sides < 0).any():
        return []
    sides = sides.reshape(2, -1)
    if pad.attributes.get_string("mode", "constant") != "constant" or sides[:, :2].any():  # images and channels
        return []
    return sides[:, 2:].ravel().tolist()


def _convolutions(padded: ir.Value) -> list[ir.Node]:
    """Return the convolutions that read a value, directly or quantized; empty if anything else reads it."""
    values, found = [padded], []
    while values:
        read = values.pop()
        if read.is_graph_output():
            return []
        for reader, position in read.uses():
            quantizer = quantizer_from(reader)
            if position == 0 and quantizer and _keeps_zero(quantizer):
                values.append(quantizer[-1].outputs[0])
            elif position == 0 and reader.op_type == "Conv" and _counts_padding(reader):
                found.append(reader)
            else:
                return []
    return found


def _keeps_zero(quantizer: Sequence[ir.Node]) -> bool:
    """Return whether a quantizer maps 0 to 0, whatever its scale is."""
    zero = np.zeros(())
    for node in quantizer:
        first, second = map(constant, (*node.inputs[1:], None, None)[:2])  # bounds, or scale and zero point
        if first is None or second is None:
            return False
        if node.op_type == "QuantizeLinear":
            zero = second
        elif node.op_type == "Clip" and not ((first <= zero) & (zero <= second)).all():
            return False
    return second is not None and np.array_equal(zero, second)


def _counts_padding(convolution: ir.Node) -> bool:
    """Return whether a convolution says by numbers how wide its padding is, if it has any."""
    return convolution.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"


def _grow(convolution: ir.Node, widths: list[int]) -> None:
    own = convolution.attributes.get_ints("pads", [0] * len(widths))
    convolution.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, widths, strict=True)])
    note_folded_pads(convolution, widths)


def _resize(value: ir.Value, source: ir.Value) -> None:
    """Correct the recorded shapes of a value and of those between it and the source that it is computed from."""
    while value is not source and (node := value.producer()) is not None:
        if value.shape is not None:
            value.shape = source.shape
        value = node.inputs[0]
