"""A PTQ method: which grids its quantizers have, and how it is fitted."""

from __future__ import annotations

from dataclasses import dataclass

from qwt2.quantization.layers import QuantizedModule
from qwt2.quantization.targets import Target
from qwt2.quantization.walk import Walk


@dataclass(frozen=True)
class Recipe:
    """The grids of one PTQ method.

    Args:
        observer: chooses every range (see :mod:`qwt2.quantization.observers`).
        symmetric_weights: signed symmetric weight codes, as integer kernels want them.
        symmetric_matmuls: signed symmetric codes for q, k and v, likewise.
        zero_in_range: zero is representable by every activation quantizer.
        integer_zero_points: what remains fractional after re-parameterisation is rounded.
        log_softmax: attention probabilities on the log-sqrt2 grid, else on a uniform one.
        log_floor: smallest ratio that the log-sqrt2 quantizer distinguishes from zero.
        fold_batchnorm: BatchNorm goes into the layer before it, before quantization.
        conv_input_bits: bits of every convolution's input, whatever the precision says.
        placement: where quantizers stand in simulations of a paper's own code, in place of any target's.
    """

    observer: str
    symmetric_weights: bool = True
    symmetric_matmuls: bool = True
    zero_in_range: bool = True
    integer_zero_points: bool = True
    log_softmax: bool = False
    log_floor: float = 0.0
    fold_batchnorm: bool = True
    conv_input_bits: int | None = None
    placement: Target | None = None

    @property
    def exportable(self) -> bool:
        """Whether integer engines can run what this recipe makes."""
        return self.symmetric_weights and self.zero_in_range and self.integer_zero_points and not self.log_softmax


# Papers' code quantizes what layers and products read, and nothing else.
PAPER = Target(output_bits=None, addition_bits=None)


class PTQMethod:
    """A PTQ method; register a subclass that has a recipe.

    Subclasses override :meth:`fit` where the method does more than choosing ranges in execution order.

    Attributes:
        recipe: the grids.
    """

    recipe: Recipe

    def fit(self, walk: Walk, recipe: Recipe) -> None:
        """Choose the ranges of every quantizer, each from values that everything before it has quantized already."""
        for visit in walk.visits(QuantizedModule):
            visit.calibrate()
