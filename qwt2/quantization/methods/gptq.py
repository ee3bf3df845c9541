"""GPTQ (arXiv 2210.17323): weights rounded one input at a time, with the error spread over the inputs to come."""

from __future__ import annotations

import torch

from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import LayerwiseMethod, Recipe
from qwt2.quantization.rounding import Feedback
from qwt2.quantization.rows import by_row, rows, weight_rows
from qwt2.quantization.walk import Visit


@PTQ_METHODS.register("gptq")
class GPTQ(LayerwiseMethod):
    """GPTQ's rounding (section 3.3), in the order of activations, with 1 % damping, on the quantized layer's input."""

    recipe = Recipe(observer="percentile")

    def fit_layer(self, visit: Visit) -> None:
        """See :meth:`LayerwiseMethod.fit_layer`."""
        layer, quantizer = visit.module, visit.module.weight_quantizer
        weight = weight_rows(layer, layer.weight)
        size = weight.shape[2]
        gram = torch.zeros(len(weight), size, size, dtype=torch.float64, device=weight.device)
        for _, x, y in visit.layer_inputs("local"):
            for inputs, _ in rows(layer, x, y):
                gram += inputs.transpose(1, 2) @ inputs
        [gram] = visit.walk.processes.added([gram])
        scale, zero_point = by_row(layer, quantizer.scale), by_row(layer, quantizer.zero_point)
        codes = Feedback(gram).rounded(weight, scale, zero_point, quantizer.grid)
        layer.set_codes(codes.reshape(layer.weight.shape))
