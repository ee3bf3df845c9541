"""Differences between two executions of the same integer module, in output steps (LSB).

Whole-network outputs of low-bit models differ by rounding: a value that falls on the other
side of a rounding boundary changes everything after it. Modules are therefore compared one by one,
and both executions get the same recorded input. A step is the scale of the quantizer at the module's
output, or 1/255 of the output's range where there is no quantizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from qwt2.engines import ENGINES
from qwt2.onnx.slices import slice_modules

if TYPE_CHECKING:
    from torch import nn

    from qwt2.capture.batch import Inputs
    from qwt2.capture.graph import GraphModel


@dataclass(frozen=True)
class Mismatch:
    """Difference between two outputs of one module.

    Attributes:
        steps: largest difference, in output steps.
        fraction: share of elements (0-1) that differ by half a step or more.
    """

    steps: float
    fraction: float

    @classmethod
    def of(cls, actual: np.ndarray, expected: np.ndarray, step: float) -> Mismatch:
        """Compare two outputs of equal shape, given the size of an output step."""
        difference = np.abs(actual.astype(np.float64) - expected) / step
        return cls(float(difference.max()), float((difference >= 0.5).mean()))

    @classmethod
    def worst(cls, mismatches: list[Mismatch]) -> Mismatch:
        """Return the largest ``steps`` and the largest ``fraction`` over modules."""
        return cls(max(m.steps for m in mismatches), max(m.fraction for m in mismatches))


def record_modules(folded: nn.Module, inputs: Inputs) -> dict[str, np.ndarray]:
    """Record inputs and outputs of every integer module of a folded model in the first call of the module.

    Args:
        folded: a model from :func:`qwt2.fold`.
        inputs: the inputs of the forward pass.

    Returns:
        Arrays named "<module>.input" (or ".a" and ".b" for products) and "<module>.result". Those of linear layers have
        two dimensions.
    """
    import torch

    from qwt2.capture.batch import call
    from qwt2.capture.check import watching
    from qwt2.folding.layers import IntegerLayer, IntegerLinear, IntegerMatmul

    records: dict[str, np.ndarray] = {}

    def record(name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if f"{name}.result" in records:
            return
        roles = ("a", "b") if isinstance(module, IntegerMatmul) else ("input",)
        for role, value in zip((*roles, "result"), (*args, output)):
            flat = value.flatten(0, -2) if isinstance(module, IntegerLinear) else value
            # Cloned, because in-place activations overwrite these tensors.
            records[f"{name}.{role}"] = flat.clone(memory_format=torch.contiguous_format).numpy()

    kinds = (IntegerLayer, IntegerMatmul)
    modules = {name: module for name, module in folded.named_modules() if isinstance(module, kinds)}
    with watching(modules, record), torch.no_grad():
        call(folded, inputs)
    return records


def engine_mismatch(
    model: onnx.ModelProto, engine: str, records: dict[str, np.ndarray], threads: int = 1
) -> dict[str, Mismatch]:
    """Compare an engine with the simulation, module by module.

    Args:
        model: the exported model.
        engine: a registered engine.
        records: from :func:`record_modules` on the folded model that was exported.
        threads: CPU threads of the engine.

    Returns:
        Module name -> :class:`Mismatch`.

    Raises:
        Qwt2Error: the engine is unknown, or its package is missing.
    """
    inputs = {name: array for name, array in records.items() if not name.endswith(".result")}
    sliced, slices = slice_modules(model, inputs)
    outputs = ENGINES.get(engine)(sliced, threads)(inputs)
    result = {}
    for module, piece in slices.items():
        expected = piece.expected(records[f"{module}.result"])
        result[module] = Mismatch.of(outputs[piece.output], expected, piece.step(expected))
    return result


def fold_mismatch(qmodel: GraphModel, folded: GraphModel, inputs: Inputs) -> dict[str, Mismatch]:
    """Compare the folded integer layers with the unfolded fake-quantized ones, layer by layer.

    Both get the inputs that the layer has in the unfolded model.

    Args:
        qmodel: the fake-quantized model.
        folded: the same model after :func:`qwt2.fold`.
        inputs: the inputs of the forward pass.

    Returns:
        Layer name -> :class:`Mismatch`; for a layer that runs several times, the worst of its calls.
    """
    import torch

    from qwt2.capture.batch import call
    from qwt2.capture.check import watching
    from qwt2.folding.check import output_step
    from qwt2.quantization.info import quantized_layers

    result: dict[str, Mismatch] = {}

    def compare(name: str, layer: nn.Module, args: tuple, output: torch.Tensor) -> None:
        actual = folded.get_submodule(name)(args[0]).numpy()
        found = Mismatch.of(actual, output.numpy(), output_step(layer, output) or 1.0)
        result[name] = Mismatch.worst([found, result.get(name, found)])

    with watching(quantized_layers(qmodel), compare), torch.no_grad():
        call(qmodel, inputs)
    return result
