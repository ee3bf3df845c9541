"""Requirements of engines' integer kernels on quantizers, independent of the PTQ method."""

from __future__ import annotations

from dataclasses import dataclass

from qwt2.errors import Qwt2Error


@dataclass(frozen=True)
class Target:
    """The placement of quantizers, and the kind of their codes, for the kernels of some engines.

    Args:
        symmetric_activations: use signed symmetric codes with zero point 0 for every activation. Values that are never
            negative (after ReLU or softmax) then use only half the codes.
        centred: use symmetric codes for images and for the operands of residual additions if these have both signs. A
            layer that reads the same operand uses the same codes, so that one quantizer serves both.
        output_bits: bits of the output of convolutions that are read by something other than a quantized layer. Engines
            whose convolution kernels only write integers need it. ``None`` leaves the output in float.
        addition_bits: bits of the operands of residual additions to a convolution's output, which engines compute in
            the convolution's kernel. An output that is already quantized is not quantized again. If outputs stay in
            float, the first operand that is a convolution's output is only clipped to its quantizer's range, not
            rounded: OpenVINO fuses the addition into that convolution's kernel only if a quantizer follows the
            convolution, and then skips the rounding. ``None`` leaves operands in float.
        pooling_bits: bits of a pooling's input if it is a convolution's output or a residual sum with one. The
            convolution's kernel then adds, activates, rounds and writes codes. ``None`` leaves it in float.
        float_biases: write float biases to the file, and clip values instead of codes.
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
    # OpenVINO only: more accurate and mostly faster there; slower on engines whose convolutions write only integers.
    # OpenVINO's kernels are faster without a zero point; elsewhere, asymmetric ranges are worth the extra time.
    "openvino": Target(centred=True, output_bits=None, pooling_bits=8),
    # TensorRT supports neither zero points nor integer biases.
    "tensorrt": Target(symmetric_activations=True, float_biases=True),
}


def find_target(name: str) -> Target:
    """Return the target called ``name``.

    Raises:
        Qwt2Error: if the name is unknown; the message lists the known ones.
    """
    if name not in TARGETS:
        raise Qwt2Error(f"unknown target {name!r}; use one of: {', '.join(TARGETS)}")
    return TARGETS[name]
