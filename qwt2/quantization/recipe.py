"""The quantizer layout of a PTQ method, and how it is fitted."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwt2.errors import Qwt2Error
from qwt2.quantization.layers import QuantizedModule
from qwt2.quantization.walk import Walk


@dataclass(frozen=True)
class Recipe:
    """The quantizer layout of one variant of a PTQ method.

    Args:
        observer: chooses every range (see :mod:`qwt2.quantization.observers`).
        symmetric_weights: signed symmetric weight codes, as integer kernels want them.
        symmetric_activations: signed symmetric codes for every activation, zero point 0, as TensorRT wants them. What
            is never negative (after ReLU or softmax) then has half the codes.
        symmetric_matmuls: signed symmetric codes for q, k and v, likewise.
        centred: symmetric codes for images and for the operands of residual additions, where they have both signs; a layer
            that reads such an operand too takes the same codes, so that one quantizer serves both.
            OpenVINO's kernels are faster without a zero point; elsewhere asymmetric ranges are worth more than the time.
        zero_in_range: zero is representable by every activation quantizer.
        integer_zero_points: what remains fractional after re-parameterisation is rounded.
        log_softmax: attention probabilities on the log-sqrt2 grid, else on a uniform one.
        log_floor: smallest ratio that the log-sqrt2 quantizer distinguishes from zero.
        fold_batchnorm: BatchNorm goes into the layer before it, before quantization.
        conv_input_bits: bits of every convolution's input, whatever the precision says.
        output_bits: bits of the output of convolutions that something else than a quantized layer
            reads; engines with integer-only convolution kernels need it. ``None`` leaves it float.
        addition_bits: bits of the operands of residual additions to a convolution's output, which engines then compute
            in the convolution's kernel. An output that is quantized already is not quantized again. Where outputs
            stay float, the first operand that is one is clipped to the range of its quantizer and not rounded: OpenVINO
            adds in that convolution's kernel, which it does only behind a quantizer, and leaves out the rounding.
            ``None`` leaves all float.
        pooling_bits: bits of what a pooling averages, where that is a convolution's output or a residual sum with it. The
            convolution's kernel then adds, activates and rounds, and writes codes; ``None`` leaves it float.
    """

    observer: str
    symmetric_weights: bool = True
    symmetric_activations: bool = False
    symmetric_matmuls: bool = True
    centred: bool = False
    zero_in_range: bool = True
    integer_zero_points: bool = True
    log_softmax: bool = False
    log_floor: float = 0.0
    fold_batchnorm: bool = True
    conv_input_bits: int | None = None
    output_bits: int | None = 8
    addition_bits: int | None = 8
    pooling_bits: int | None = None

    @property
    def exportable(self) -> bool:
        """Whether integer engines can run what this recipe makes."""
        return self.symmetric_weights and self.zero_in_range and self.integer_zero_points and not self.log_softmax


@dataclass
class PTQMethod:
    """A PTQ method: one recipe per variant, and how ranges are chosen.

    Subclasses override :meth:`fit` where the method does more than choosing ranges in execution order.
    """

    variants: dict[str, Recipe] = field(default_factory=dict)

    def recipe(self, variant: str) -> Recipe:
        if variant not in self.variants:
            raise Qwt2Error(
                f"{type(self).__name__} has no variant {variant!r}; use one of: {', '.join(self.variants)}"
            )
        return self.variants[variant]

    def fit(self, walk: Walk, recipe: Recipe) -> None:
        """Choose the ranges of every quantizer, each from values that everything before it has quantized already."""
        for visit in walk.visits(QuantizedModule):
            visit.calibrate()
