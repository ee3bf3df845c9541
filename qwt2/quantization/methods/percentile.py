"""Percentile ranges for convolutional networks, as the QwT reference code quantizes ResNets."""

from dataclasses import replace

from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import PAPER, PTQMethod, Recipe


@PTQ_METHODS.register("percentile")
class Percentile(PTQMethod):
    """PTQ with percentile ranges, on grids that integer engines support."""

    recipe = Recipe(observer="percentile")


@PTQ_METHODS.register("percentile_published")
class PublishedPercentile(PTQMethod):
    """PTQ of ResNets as in the public code, where "W4A4" is W4A8 with BatchNorm in float; simulation only."""

    recipe = replace(PAPER, fold_batchnorm=False, conv_input_bits=8)
