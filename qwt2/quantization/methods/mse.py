"""Plain reference: every range by the mse observer."""

from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import PTQMethod, Recipe

PTQ_METHODS.register("mse")(
    PTQMethod(
        variants={
            "default": Recipe(observer="mse"),
            "openvino": Recipe(observer="mse", output_bits=None, pooling_bits=8, centred=True),
            "tensorrt": Recipe(observer="mse", symmetric_activations=True),
        }
    )
)
