"""Choice of each module's quantizers: the grids come from a PTQ method, the placement from a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from qwt2.capture import wiring
from qwt2.capture.graph import GraphModel
from qwt2.errors import Qwt2Error
from qwt2.quantization.info import QuantizationInfo
from qwt2.quantization.layers import QuantizedAdd, QuantizedConv2d, QuantizedLinear, QuantizedMatmul, QuantizedPooling
from qwt2.quantization.methods import PTQ_METHODS
from qwt2.quantization.observers import Grid
from qwt2.quantization.precision import Precision
from qwt2.quantization.quantizers import LogSqrt2Quantizer, Quantizer, UniformQuantizer
from qwt2.quantization.recipe import Recipe
from qwt2.quantization.targets import Target, find_target

# Treatment of an addition's operands: "quantized", "clipped" (to the grid's range), or ``None`` (unchanged).
Operands = tuple[str | None, str | None]


@dataclass(frozen=True)
class Layout:
    """Creates the quantized modules that replace a graph's float ones.

    Args:
        recipe: the PTQ method's grids.
        target: where quantizers are placed.
        precision: bit widths.
    """

    recipe: Recipe
    target: Target
    precision: Precision

    @classmethod
    def of(cls, method: str, target: str, precision: Precision) -> Layout:
        """Return the layout of a registered PTQ method for a target.

        Raises:
            Qwt2Error: if the method or target is unknown, or if a target is given for a method that no engine runs.
        """
        recipe, wanted = PTQ_METHODS.get(method).recipe, find_target(target)
        if recipe.placement is not None and target != "portable":
            raise Qwt2Error(f"{method} runs in simulation only; leave out target={target!r}, or use another method")
        return cls(recipe, recipe.placement or wanted, precision)

    def layer(self, layer: Any, is_first: bool, is_edge: bool, escapes: bool) -> QuantizedLinear | QuantizedConv2d:
        """Return a quantized Linear or Conv2d.

        Args:
            layer: the float layer.
            is_first: whether it reads the network's input.
            is_edge: whether it is the first or a last layer, which use ``first_last_bits``.
            escapes: whether it is a convolution whose output is read by something other than a quantized layer.
        """
        recipe, precision, is_conv = self.recipe, self.precision, isinstance(layer, nn.Conv2d)
        weight_bits, input_bits = precision.weight_bits, precision.activation_bits
        if is_conv and recipe.conv_input_bits:
            input_bits = recipe.conv_input_bits
        if is_edge and precision.first_last_bits:
            weight_bits = input_bits = precision.first_last_bits
        weight_grid = Grid(weight_bits, recipe.symmetric_weights, recipe.zero_in_range, narrow=weight_bits == 8)
        output_bits = self.target.output_bits if escapes else None
        kind = QuantizedConv2d if is_conv else QuantizedLinear
        return kind(
            layer,
            self._activation(input_bits, centred=self.target.centred and is_first),
            UniformQuantizer(weight_grid, recipe.observer, channel_axis=0),
            self._activation(output_bits) if output_bits else None,
            recipe.exportable,
        )

    def matmul(self, is_softmax: bool) -> QuantizedMatmul:
        """Return a quantized product of activations, whose first operand may be a softmax's output."""
        recipe, precision = self.recipe, self.precision
        symmetric = recipe.symmetric_matmuls or self.target.symmetric_activations
        operand = Grid(precision.activation_bits, symmetric, recipe.zero_in_range)
        a: Quantizer = UniformQuantizer(operand, recipe.observer)
        if is_softmax and recipe.log_softmax:
            a = LogSqrt2Quantizer(precision.activation_bits, recipe.log_floor)
        elif is_softmax:
            a = UniformQuantizer(Grid(precision.softmax_bits, self.target.symmetric_activations), recipe.observer)
        return QuantizedMatmul(a, UniformQuantizer(operand, recipe.observer))

    def addition(self, operands: Operands) -> QuantizedAdd:
        """Return a quantized residual addition; see :meth:`operands`."""

        def quantizer(kind: str | None) -> UniformQuantizer | None:
            rounds, bits = kind == "quantized", self.target.addition_bits
            if kind is None or bits is None:
                return None
            return self._activation(bits, rounds=rounds, centred=self.target.centred)

        return QuantizedAdd(*map(quantizer, operands))

    def pooling(self, pooling: nn.Module) -> QuantizedPooling:
        """Return a quantized pooling of a convolution's output, for a target with ``pooling_bits``."""
        assert self.target.pooling_bits is not None
        return QuantizedPooling(pooling, self._activation(self.target.pooling_bits))

    def _activation(self, bits: int, rounds: bool = True, centred: bool = False) -> UniformQuantizer:
        grid = Grid(bits, self.target.symmetric_activations, self.recipe.zero_in_range, centred=centred)
        return UniformQuantizer(grid, self.recipe.observer, rounds=rounds)

    def poolings(self, qmodel: GraphModel) -> list[str]:
        """Return the names of the poolings to quantize."""
        return wiring.kernel_poolings(qmodel) if self.target.pooling_bits else []

    def operands(self, qmodel: GraphModel, info: QuantizationInfo) -> dict[str, Operands]:
        """Return the treatment of the operands of every residual addition; see :attr:`Target.addition_bits`."""
        sums = wiring.residual_sums(qmodel) if self.target.addition_bits else {}
        return {name: self._operands(makers, info) for name, makers in sums.items() if info.covers(name)}

    def _operands(self, makers: tuple[str | None, str | None], info: QuantizationInfo) -> Operands:
        convolutions = [position for position, name in enumerate(makers) if name in info.layers]
        if not convolutions:
            return None, None
        if self.target.output_bits:
            first, second = (None if maker else "quantized" for maker in makers)
        else:
            first, second = ("clipped" if position == convolutions[0] else "quantized" for position in range(2))
        return first, second
