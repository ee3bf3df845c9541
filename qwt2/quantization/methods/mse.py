"""Plain reference: every range by the mse observer."""

from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import PTQMethod, Recipe


@PTQ_METHODS.register("mse")
class MSE(PTQMethod):
    """Ranges of least squared error."""

    recipe = Recipe(observer="mse")
