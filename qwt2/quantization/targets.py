"""What the integer kernels of an engine want of quantizers: deployment, apart from the PTQ method."""

from __future__ import annotations

from dataclasses import dataclass

from qwt2.errors import Qwt2Error


@dataclass(frozen=True)
class Target:
    """Where quantizers stand, and which kind of codes they have, for the kernels of some engines.

    Args:
        symmetric_activations: signed symmetric codes for every activation, with zero point 0. What is never negative
            (after ReLU or softmax) then has half the codes.
        centred: symmetric codes for images and for the operands of residual additions, where these have both signs. A
            layer that reads such an operand takes the same codes, so that one quantizer serves both.
        output_bits: bits of the output of convolutions that something other than a quantized layer reads. Engines whose
            convolution kernels only write integers need it. ``None`` leaves the output in float.
        addition_bits: bits of the operands of residual additions to a convolution's output, which engines compute in
            the convolution's kernel. An output that is quantized already is not quantized again. Where outputs stay in
            float, the first operand that is one is clipped to its quantizer's range and not rounded: OpenVINO adds in
            that convolution's kernel only behind a quantizer, and leaves out the rounding. ``None`` leaves operands in
            float.
        pooling_bits: bits of what a pooling averages, if that is a convolution's output or a residual sum with it. The
            convolution's kernel then adds, activates, rounds and writes codes. ``None`` leaves it in float.
        float_biases: the file has float biases, and values are clipped in place of codes.
    """

    symmetric_activations: bool = False
    centred: bool = False
    output_bits: int | None = 8
    addition_bits: int | None = 8
    pooling_bits: int | None = None
    float_biases: bool = False


TARGETS = {
    # ONNX Runtime, OpenVINO, TVM and PyTorch's own integer kernels run these files.
    "portable": Target(),
    # OpenVINO only: more accurate there and mostly faster, slower on engines whose convolutions give only integers. Its
    # kernels are faster without a zero point; elsewhere asymmetric ranges are worth more than that time.
    "openvino": Target(centred=True, output_bits=None, pooling_bits=8),
    # TensorRT has no zero points and no integer biases.
    "tensorrt": Target(symmetric_activations=True, float_biases=True),
}


def find_target(name: str) -> Target:
    """The target of this name.

    Raises:
        Qwt2Error: there is none; the message lists those there are.
    """
    if name not in TARGETS:
        raise Qwt2Error(f"unknown target {name!r}; use one of: {', '.join(TARGETS)}")
    return TARGETS[name]
