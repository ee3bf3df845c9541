"""GPTAQ (arXiv 2504.02692): GPTQ towards the full-precision network's output, given the quantized network's input."""

from __future__ import annotations

import torch

from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.recipe import LayerwiseMethod, Recipe
from qwt2.quantization.rounding import Feedback
from qwt2.quantization.rows import by_row, input_rows, parts, weight_rows
from qwt2.quantization.walk import Visit

STRENGTH = 0.25  # of the correction for the difference of inputs, as in the authors' code


@PTQ_METHODS.register("gptaq")
class GPTAQ(LayerwiseMethod):
    """GPTAQ's asymmetric calibration (section 3), in the order of activations, with 1 % damping."""

    recipe = Recipe(observer="percentile")

    def fit_layer(self, visit: Visit) -> None:
        """See :meth:`LayerwiseMethod.fit_layer`."""
        layer, quantizer = visit.module, visit.module.weight_quantizer
        weight = weight_rows(layer, layer.weight)
        gram = torch.zeros(len(weight), *2 * weight.shape[2:], dtype=torch.float64, device=weight.device)
        cross = torch.zeros_like(gram)
        for _, x, exact in visit.layer_inputs("input"):
            for part, exact_part in parts(layer, x, exact):
                inputs = input_rows(layer, part)
                gram += inputs.transpose(1, 2) @ inputs
                cross += (input_rows(layer, exact_part) - inputs).transpose(1, 2) @ inputs
        gram, cross = visit.walk.processes.added([gram, cross])
        scale, zero_point = by_row(layer, quantizer.scale), by_row(layer, quantizer.zero_point)
        codes = Feedback(gram, cross=STRENGTH * cross).rounded(weight, scale, zero_point, quantizer.grid)
        layer.set_codes(codes.reshape(layer.weight.shape))
