"""Estimate the error that quantizing each module causes at the network's output, for all modules at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qwt2.capture import wiring
from qwt2.capture.batch import Inputs, after, first, image_count, model_inputs
from qwt2.capture.graph import GraphModel
from qwt2.decibel import decibel
from qwt2.errors import Qwt2Error
from qwt2.quantization.layers import QuantizedLayer, QuantizedModule
from qwt2.quantization.precision import Precision
from qwt2.quantization.quantize import quantize

PROJECTIONS = 3
_TOGETHER = 4  # number of images whose activations and gradients are held at the same time


@dataclass(frozen=True)
class ModuleCost:
    """The cost of quantizing one module.

    Attributes:
        module: name of the module.
        kind: "layer" or "product".
        error: power of the error at the network's outputs if only this module is quantized, relative to the power of
            the outputs' spread over the images.
        weight_count: number of weights.
        multiply_accumulates: multiply-accumulates for one image.
    """

    module: str
    kind: str
    error: float
    weight_count: int
    multiply_accumulates: int

    @property
    def sqnr_db(self) -> float:
        """SQNR of the network's outputs if only this module is quantized, dB."""
        return decibel(1.0, self.error)


def sensitivity(
    model: nn.Module,
    calibration: Iterable[Any],
    method: str = "repq",
    precision: Precision = Precision(),
    target: str = "portable",
    images: int = 16,
    **options: Any,
) -> list[ModuleCost]:
    """Return the cost of quantizing each module at the network's output, the most expensive module first.

    Let J be the derivative of the network's outputs with respect to a module's output, and d the quantization error of
    that output. The first-order error at the network's outputs is J d. Its power is the mean of (r' J d)^2 over random
    r of unit variance (Hutchinson, 1990), and one backward pass gives r' J for all modules. Three vectors r per image
    need one float and one quantized forward pass and three backward passes, about as much as eight forward passes.

    Args:
        model: a float model.
        calibration: batches as in :func:`qwt2.quantize`. The ranges are chosen from them, and the costs are measured
            on the first images.
        method, precision, target: as in :func:`qwt2.quantize`.
        images: number of images that the costs are measured on.
        options: further arguments of :func:`qwt2.quantize`.

    Raises:
        Qwt2Error: if :func:`qwt2.quantize` raises it, the outputs do not vary over the images, or no output is
            differentiable.
    """
    batches = list(model_inputs(model, calibration))
    qmodel = quantize(model, batches, method, precision, target, **options)
    macs = wiring.multiply_accumulates(qmodel, first(batches[0], 1))
    errors = output_errors(qmodel, small_batches(batches, images))
    info = qmodel.quantization
    found = []
    for name, kind in info.modules.items():
        module = qmodel.get_submodule(name)
        weights = module.weight.numel() if isinstance(module, QuantizedLayer) else 0
        work = sum(count for node, count in macs.items() if node.target == name)
        found.append(ModuleCost(name, kind, errors.get(name, 0.0), weights, work))
    return sorted(found, key=lambda cost: -cost.error)


def small_batches(batches: list[Inputs], images: int) -> list[Inputs]:
    """Split the first ``images`` images into small batches."""
    pieces: list[Inputs] = []
    for batch in batches:
        for start in range(0, image_count(batch), _TOGETHER):
            if (left := images - sum(map(image_count, pieces))) <= 0:
                return pieces
            pieces.append(first(after(batch, start), min(_TOGETHER, left)))
    return pieces


def output_errors(qmodel: GraphModel, pieces: list[Inputs]) -> dict[str, float]:
    """Return, per module, the power of its error at the outputs divided by the power of the outputs' spread."""
    generator = torch.Generator().manual_seed(0)
    errors: dict[str, float] = {}
    outputs: list[list[Tensor]] = []
    for piece in pieces:
        calls, outputs_now = _run(qmodel, piece)
        outputs.append([y.detach() for y in outputs_now])
        for name, error in _projected(calls, outputs_now, image_count(piece), generator).items():
            errors[name] = errors.get(name, 0.0) + error
    together = [torch.cat(parts).double() for parts in zip(*outputs)]
    spread = sum(float((y - y.mean(0)).square().sum()) for y in together)
    if spread <= 0:
        raise Qwt2Error("the model gives the same outputs for all calibration images; give images that differ")
    return {name: error / spread for name, error in errors.items()}


# A module's name, its float output, and the error that quantization adds to it.
_Call = tuple[str, Tensor, Tensor]


def _run(qmodel: GraphModel, inputs: Inputs) -> tuple[list[_Call], list[Tensor]]:
    """Run the float network with gradients; return its module calls with their quantization errors, and its outputs."""
    calls: list[_Call] = []

    def visit(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        module = qmodel.module_of(node)
        if not isinstance(module, QuantizedModule):
            return qmodel.evaluate(node, values)
        args = [values[argument] for argument in node.args]
        exact = module.full_precision(*args)
        # Adding a leaf makes the output differentiable even if none of the module's inputs is.
        output = exact + torch.zeros((), requires_grad=True, device=exact.device)
        with torch.no_grad():
            calls.append((node.target, output, module(*args) - exact))
        return output

    with torch.enable_grad():
        found = qmodel.of_size(qmodel.tensors_of(inputs)).walk(inputs, visit)
    outputs = [y for y in found if isinstance(y, Tensor) and y.requires_grad]
    if not outputs:
        raise Qwt2Error(f"no output of {qmodel.title} can be differentiated; let it return its logits")
    return calls, outputs


def _projected(calls: list[_Call], outputs: list[Tensor], images: int, generator: torch.Generator) -> dict[str, float]:
    errors: dict[str, float] = {}
    for number in range(PROJECTIONS):
        directions = [torch.randn(y.shape, generator=generator).to(y.device) for y in outputs]
        gradients = torch.autograd.grad(
            outputs, [y for _, y, _ in calls], directions, retain_graph=number < PROJECTIONS - 1, allow_unused=True
        )
        for (name, _, error), gradient in zip(calls, gradients):
            if gradient is not None:
                # Directions are independent, so any grouping is unbiased; grouping by image has the least noise.
                groups = images if len(error) % images == 0 else 1
                products = (gradient * error).reshape(groups, -1).double().sum(1)
                errors[name] = errors.get(name, 0.0) + float(products.square().sum()) / PROJECTIONS
    return errors
