"""Plain reference: every range by the minmax observer."""

from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import PTQMethod, Recipe


@PTQ_METHODS.register("minmax")
class MinMax(PTQMethod):
    """Ranges from the smallest to the largest value."""

    recipe = Recipe(observer="minmax")
