"""A simple baseline: the minmax observer chooses every range."""

from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import PTQMethod, Recipe


@PTQ_METHODS.register("minmax")
class MinMax(PTQMethod):
    """PTQ with ranges from the smallest to the largest value."""

    recipe = Recipe(observer="minmax")
