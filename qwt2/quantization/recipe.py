"""PTQ methods: the grids of their quantizers, and how these are fitted."""

from __future__ import annotations

from dataclasses import dataclass

from qwt2.quantization.layers import QuantizedLayer, QuantizedModule
from qwt2.quantization.targets import Target
from qwt2.quantization.walk import Visit, Walk


@dataclass(frozen=True)
class Recipe:
    """The grids of one PTQ method.

    Args:
        observer: name of the observer that chooses every range (:mod:`qwt2.quantization.observers`).
        symmetric_weights: use signed symmetric weight codes, as integer kernels need them.
        symmetric_matmuls: use signed symmetric codes for q, k and v, as integer kernels need them.
        zero_in_range: make every activation quantizer able to represent zero.
        integer_zero_points: round the zero points that re-parameterisation leaves fractional.
        log_softmax: quantize attention probabilities on the log-sqrt2 grid, else on a uniform one.
        log_floor: lower bound of x / scale in the log-sqrt2 quantizer.
        fold_batchnorm: fold BatchNorms, and multiplications by a constant per channel such as LayerScale, into the
            layers before them, before quantization.
        conv_input_bits: bits of every convolution's input, regardless of the precision; ``None`` uses the precision.
        placement: placement of quantizers in simulations of a paper's own code; it replaces the target.
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
        """Whether integer engines can run models made with this recipe."""
        return self.symmetric_weights and self.zero_in_range and self.integer_zero_points and not self.log_softmax


# The grids of the papers' code, which quantizes only the inputs of layers and products.
PAPER = Recipe(
    observer="percentile",
    symmetric_weights=False,
    symmetric_matmuls=False,
    zero_in_range=False,
    placement=Target(output_bits=None, addition_bits=None),
)


class PTQMethod:
    """Base of PTQ methods; register a subclass that has a recipe.

    Subclasses override :meth:`fit` if the method does more than choose ranges in execution order.

    Attributes:
        recipe: the grids.
        all_images: whether the method uses all calibration images, and not only those that ranges are chosen from.
    """

    recipe: Recipe
    all_images = False

    def fit(self, walk: Walk, recipe: Recipe) -> None:
        """Choose the ranges of every quantizer in execution order, with everything before it already quantized.

        Args:
            walk: the calibration images on their way through the quantized model.
            recipe: the grids in use.
        """
        for visit in walk.visits(QuantizedModule):
            visit.calibrate()


class LayerwiseMethod(PTQMethod):
    """Base of PTQ methods that choose each layer's weight codes from all calibration images, in execution order."""

    all_images = True

    def fit(self, walk: Walk, recipe: Recipe) -> None:
        """See :meth:`PTQMethod.fit`."""
        for visit in walk.visits(QuantizedModule):
            is_layer = isinstance(visit.module, QuantizedLayer)
            visit.calibrate(stay=is_layer)
            if is_layer:
                self.fit_layer(visit)
                visit.choose_output_range()

    def fit_layer(self, visit: Visit) -> None:
        """Set the codes of a layer whose ranges are chosen, with everything before it quantized."""
        raise NotImplementedError
