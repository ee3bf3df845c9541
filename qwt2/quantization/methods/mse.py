"""A simple baseline: the mse observer chooses every range."""

from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import PTQMethod, Recipe


@PTQ_METHODS.register("mse")
class MSE(PTQMethod):
    """PTQ with ranges of least mean squared error."""

    recipe = Recipe(observer="mse")
