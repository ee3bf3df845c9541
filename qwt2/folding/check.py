"""Compare folded modules with the quantized ones."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from qwt2.capture.graph import GraphModel
from qwt2.quantization.layers import QuantizedAdd, QuantizedLayer, QuantizedMatmul, QuantizedModule
from qwt2.quantization.quantizers import UniformQuantizer

# Accepted difference in output steps. A value between two codes may be rounded either way.
MAX_STEPS = 1 + 1e-3
_RESOLVED = 2.0**-20  # resolution of float32 sums, relative to the largest value
_BEYOND = 0.05  # share of a range by which values may exceed it, so that clipping is compared too


def differing_steps(qmodel: GraphModel, folded: GraphModel) -> dict[str, float]:
    """Compare every quantized module with its integer form, on random values from the ranges of its input quantizers.

    The comparison needs no images, and takes about as long as one forward pass of each model for one image.

    Returns:
        Module name -> largest difference in output steps, for the modules where it is more than one.
    """
    found: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, calls in qmodel.calls(QuantizedModule).items():
            module = qmodel.get_submodule(name)
            if not module.quantizers():  # modules that stay in float are the same in both models
                continue
            arguments = _arguments(module, calls[0], generator)
            steps = _steps(module, module(*arguments), folded.get_submodule(name)(*arguments))
            if not steps <= MAX_STEPS:  # NaN differs too
                found[name] = steps
    return found


def _arguments(module: QuantizedModule, call: fx.Node, generator: torch.Generator) -> list[Tensor]:
    quantizers = {
        QuantizedMatmul: lambda: (module.a_quantizer, module.b_quantizer),
        QuantizedAdd: lambda: (module.a_quantizer or module.b_quantizer, module.b_quantizer or module.a_quantizer),
    }.get(type(module), lambda: (module.input_quantizer,))()
    shapes = [tuple(size or 1 for size in argument.meta["shape"]) for argument in call.args]
    return [_values(quantizer, shape, generator) for quantizer, shape in zip(quantizers, shapes, strict=True)]


def _values(quantizer: UniformQuantizer, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    grid, scale, zero_point = quantizer.grid, quantizer.scale, quantizer.zero_point
    low, high = (grid.qmin - zero_point) * scale, (grid.qmax - zero_point) * scale
    share = torch.rand(shape, generator=generator).to(scale.device)
    return low + (high - low) * ((1 + 2 * _BEYOND) * share - _BEYOND)


def output_step(module: nn.Module, output: Tensor) -> float:
    """Return a module's output step: its output quantizer's scale, or 1/255 of the range of a float output."""
    if isinstance(module, QuantizedLayer) and module.output_quantizer is not None:
        return float(module.output_quantizer.scale)
    return float(output.max() - output.min()) / 255


def _steps(module: nn.Module, expected: Tensor, found: Tensor) -> float:
    """Return the largest difference in output steps.

    A step is taken to be at least the resolution of float32, which matters for constant inputs and large biases.
    """
    step = max(output_step(module, expected), float(expected.abs().max()) * _RESOLVED)
    difference = float((found - expected).abs().max())
    return difference / max(step, torch.finfo(torch.float32).tiny) if difference else 0.0
