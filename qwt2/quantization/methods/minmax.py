"""Plain reference: every range by the minmax observer."""

from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import PTQMethod, Recipe

PTQ_METHODS.register("minmax")(
    PTQMethod(
        variants={
            "default": Recipe(observer="minmax"),
            "openvino": Recipe(observer="minmax", output_bits=None, pooling_bits=8, centred=True),
            "tensorrt": Recipe(observer="minmax", symmetric_activations=True),
        }
    )
)
