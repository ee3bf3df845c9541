"""Percentile ranges for convolutional networks, as the QwT reference code quantizes ResNets."""

from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import PTQMethod, Recipe

PTQ_METHODS.register("percentile")(
    PTQMethod(
        variants={
            "default": Recipe(observer="percentile"),
            "openvino": Recipe(observer="percentile", output_bits=None, pooling_bits=8, centred=True),
            "tensorrt": Recipe(observer="percentile", symmetric_activations=True),
            # The public code's "W4A4" ResNet is W4/A8 with BatchNorm left in float.
            "published": Recipe(
                observer="percentile",
                symmetric_weights=False,
                symmetric_matmuls=False,
                zero_in_range=False,
                fold_batchnorm=False,
                conv_input_bits=8,
                output_bits=None,
                addition_bits=None,
            ),
        }
    )
)
