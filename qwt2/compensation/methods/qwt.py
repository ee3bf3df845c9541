"""QwT: a linear layer beside each block (arXiv 2411.13918, CVPR 2025).

y = block_q(x) + W x + b, where (W, b) is the least-squares solution of block_f(x) - block_q(x) on [x, 1]. For blocks
that work on images, W is a grouped convolution with the block's stride. A block whose regression explains nothing
(R^2 <= 0) is not compensated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qwt2.capture.blocks import is_inside
from qwt2.compensation.blocks import LinearCompensation, put_behind, visits_behind_blocks
from qwt2.compensation.methods import COMPENSATIONS
from qwt2.compensation.report import ModuleReport
from qwt2.decibel import decibel
from qwt2.errors import Qwt2Error
from qwt2.quantization.info import channel_axis, quantization_info
from qwt2.quantization.processes import Processes
from qwt2.quantization.recipe import Recipe
from qwt2.quantization.regression import Regression
from qwt2.quantization.rows import by_group
from qwt2.quantization.walk import Visit, Walk

DTYPES = {"float16": torch.float16, "float32": torch.float32}


@COMPENSATIONS.register("qwt")
@dataclass
class QwT:
    """Settings of QwT.

    Args:
        target: "local" for the full-precision block's output on the quantized network's input (as in the paper);
            "global" for the block's output in the full-precision network.
        dtype: type of the added layer's weight, "float16" (as in the paper) or "float32". If integer engines can run
            the model, the simulation converts the weight to float32 as they do; else it multiplies in this type.
        kernel_size: kernel size of the convolution beside image blocks, odd.
        channels_per_group: least number of input channels per group of that convolution.
        damping: share of the Gram matrix's mean diagonal that is added to its diagonal.
        r2: "pooled" measures R^2 about each channel's mean; "positional" measures it about the mean of each channel and
            position, as the public ResNet code does (this can reject good blocks).

    Raises:
        Qwt2Error: if a setting has an unknown value.
    """

    LABEL: ClassVar[str] = "QwT"
    ORDER: ClassVar[int] = 10
    COLOUR: ClassVar[str] = "#3b82f6"

    target: str = "local"
    dtype: str = "float16"
    kernel_size: int = 1
    channels_per_group: int = 16
    damping: float = 1e-6
    r2: str = "pooled"

    def __post_init__(self):
        for name, choices in {
            "target": ("local", "global"),
            "dtype": tuple(DTYPES),
            "r2": ("pooled", "positional"),
        }.items():
            if getattr(self, name) not in choices:
                raise Qwt2Error(f"qwt: unknown {name} {getattr(self, name)!r}; use one of: {', '.join(choices)}")
        if not isinstance(self.kernel_size, int) or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise Qwt2Error(f"qwt: kernel_size is {self.kernel_size!r}; use an odd number")
        if self.damping < 0 or self.channels_per_group < 1:
            raise Qwt2Error("qwt: damping must be at least 0 and channels_per_group at least 1")

    @property
    def exportable(self) -> bool:
        """Whether integer engines can run the result; they compute the added layers in float."""
        return True

    def fit(self, walk: Walk, recipe: Recipe) -> list[ModuleReport]:
        """Fit and apply the compensation in place.

        Args:
            walk: the calibration set on its way through the quantized model.
            recipe: the PTQ method's grids; the added layers compute in float32 if engines can run them.

        Returns:
            One report per block, in execution order.

        Raises:
            Qwt2Error: if the model has no blocks, or an output is NaN or infinite (the block is named).
        """
        if not quantization_info(walk.model).blocks:
            raise Qwt2Error("qwt: the model has no blocks to put a layer beside; name them with quantize(blocks=[...])")
        return [self._fit_block(visit, block, recipe) for visit, block in visits_behind_blocks(walk)]

    def _fit_block(self, visit: Visit, name: str, recipe: Recipe) -> ModuleReport:
        """Fit one block and insert its layer after it."""
        info = quantization_info(visit.walk.model)
        if {layer for layer in info.layers if is_inside(layer, name)} <= set(info.repeated):
            return ModuleReport(name, math.nan, math.nan, math.nan, False, "the block runs several times in one pass")
        rows = self._rows_of(visit, name)
        regression: Regression | None = None
        signal, error, misfits = 0.0, 0.0, 0
        for _, (x, y_q), (_, y_f) in visit.block_outputs(name, self.target):
            misfits += not rows.fits(x, y_q)
            if misfits:
                continue
            signal += float(y_f.double().square().sum())
            error += float((y_f - y_q).double().square().sum())
            sums = Regression.of(rows.of_input(x), rows.of_output(y_f - y_q))
            regression = sums if regression is None else regression + sums
        if float(visit.walk.processes.added([misfits])[0]):
            return ModuleReport(name, math.nan, math.nan, math.nan, False, "input and output positions differ")
        assert regression is not None, name  # there is at least one batch
        regression = visit.walk.processes.merged({False: regression})[False]
        signal, error = map(float, visit.walk.processes.added([signal, error]))
        rows.merge(visit.walk.processes)
        if not math.isfinite(error):
            raise Qwt2Error(f"{name} gives NaN or infinity on the calibration images; check its weights")
        weight, bias = regression.solve(self.damping)
        r2 = rows.positional_r2(regression, weight, error) if self.r2 == "positional" else regression.r2(weight)
        before, kept = decibel(signal, error), r2 > 0
        if kept:
            # A model for engines is simulated in the arithmetic that engines support.
            arithmetic = "float32" if recipe.exportable else self.dtype
            stored, bias = rows.layer(weight, bias)
            layer = LinearCompensation(stored.to(DTYPES[self.dtype]), bias, rows.stride, rows.groups, arithmetic)
            put_behind(visit.walk.model, name, layer)
        after = decibel(signal, regression.residual(weight)) if kept else before
        return ModuleReport(name, before, after, r2, kept, "" if kept else "R^2 is not positive")

    def _rows_of(self, visit: Visit, name: str) -> Tokens | Patches:
        if channel_axis(visit.walk.model, name) == 1:
            x, y = (node.meta["shape"] for node in visit.calls[0].args)
            return Patches(x, y, self)
        return Tokens()


@COMPENSATIONS.register("qwt_global")
@dataclass
class GlobalQwT(QwT):
    """QwT fitted to the full-precision network's own outputs instead of the block's output on quantized inputs."""

    LABEL: ClassVar[str] = "QwT, global"
    ORDER: ClassVar[int] = 11
    COLOUR: ClassVar[str] = "#93c5fd"

    target: str = "global"


class Tokens:
    """Rows of the regression if channels are the last axis: one linear map."""

    stride, groups = 1, 1

    def fits(self, x: Tensor, y: Tensor) -> bool:
        """Return whether input and output have the same positions."""
        return x.shape[:-1] == y.shape[:-1]

    def of_input(self, x: Tensor) -> Tensor:
        """Reshape (..., C) to rows (1, n, C)."""
        return x.flatten(0, -2)[None]

    of_output = of_input

    def merge(self, processes: Processes) -> None:
        """Do nothing: rows of tokens have no sums of their own."""

    def layer(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's weight (C_out, C_in) and bias (C_out,), float32."""
        return weight[0].T.float(), bias[0].float()

    def positional_r2(self, regression: Regression, weight: Tensor, power: float) -> float:
        """Return R^2 about each channel's mean, as "pooled" does."""
        return regression.r2(weight)


class Patches:
    """Rows of the regression on image patches: a grouped convolution.

    Args:
        x, y: shapes of the block's input and output, (N, C, H, W).
        settings: kernel size and channels per group.
    """

    def __init__(self, x: tuple, y: tuple, settings: QwT):
        self.kernel = settings.kernel_size
        self.stride = tuple(max(1, math.ceil(x[d] / y[d])) for d in (2, 3))
        wanted = max(x[1] // settings.channels_per_group, 1)
        self.groups = math.gcd(wanted, math.gcd(x[1], y[1]))
        self.channels = x[1]
        self.samples, self.position_sum = 0, torch.zeros(())

    def fits(self, x: Tensor, y: Tensor) -> bool:
        """Return whether the convolution's output has as many positions as the block's."""
        pad = self.kernel // 2
        size = [(x.shape[d] + 2 * pad - self.kernel) // s + 1 for d, s in zip((2, 3), self.stride)]
        return size == list(y.shape[2:])

    def of_input(self, x: Tensor) -> Tensor:
        """Return patches of images (N, C, H, W) as rows (groups, N * positions, C / groups * k * k)."""
        return by_group(F.unfold(x, self.kernel, padding=self.kernel // 2, stride=self.stride), self.groups)

    def of_output(self, error: Tensor) -> Tensor:
        """Return targets (N, C, H, W) as rows (groups, N * positions, C / groups), and sum them up per position."""
        self.samples += error.shape[0]
        self.position_sum = self.position_sum + error.double().sum(0)
        return by_group(error.flatten(2), self.groups)

    def merge(self, processes: Processes) -> None:
        """Add up the sums per position over all processes."""
        samples, self.position_sum = processes.added([self.samples, self.position_sum])
        self.samples = int(samples)

    def layer(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's weight (C_out, C_in / groups, k, k) and bias (C_out,), float32."""
        kernel = weight.transpose(1, 2).reshape(-1, self.channels // self.groups, self.kernel, self.kernel)
        return kernel.float(), bias.reshape(-1).float()

    def positional_r2(self, regression: Regression, weight: Tensor, power: float) -> float:
        """Return R^2 about the mean of each channel and position, as in the public ResNet code.

        Args:
            regression: the sums over all batches.
            weight: its coefficients, (groups, d, o).
            power: sum of the squared targets.
        """
        total = power - float((self.position_sum.square() / self.samples).sum())
        return 1 - regression.residual(weight) / total if total > 0 else -math.inf
