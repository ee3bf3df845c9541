"""Percentile ranges for convolutional networks, as the QwT reference code quantizes ResNets."""

from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import PAPER, PTQMethod, Recipe


@PTQ_METHODS.register("percentile")
class Percentile(PTQMethod):
    """Percentile ranges on grids that integer engines have."""

    recipe = Recipe(observer="percentile")


@PTQ_METHODS.register("percentile_published")
class PublishedPercentile(PTQMethod):
    """The public code's ResNets: "W4A4" is W4/A8 there, with BatchNorm left in float; simulation only."""

    recipe = Recipe(
        observer="percentile",
        symmetric_weights=False,
        symmetric_matmuls=False,
        zero_in_range=False,
        fold_batchnorm=False,
        conv_input_bits=8,
        placement=PAPER,
    )
