"""QwT: a linear layer beside each block (arXiv 2411.13918, CVPR 2025).

y = block_q(x) + W x + b, with (W, b) the least-squares solution of block_f(x) - block_q(x) on
[x, 1]. For blocks that work on images, W is a grouped convolution with the block's stride. A block
whose regression explains nothing (R^2 <= 0) is left as it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwt2.compensation import COMPENSATIONS, ModuleReport
from qwt2.compensation.activation_store import ActivationStore
from qwt2.compensation.walk import UnitStream, calibration_batches
from qwt2.errors import Qwt2Error
from qwt2.compensation.malloc import give_back_after
from qwt2.quantization.layers import CompensatedBlock, full_precision
from qwt2.quantization.quantize import block_channel_axis, quantization_info, wrap_block
from qwt2.compensation.moments import GroupedRegression, decibel

DTYPES = {"float16": torch.float16, "float32": torch.float32}


@COMPENSATIONS.register("qwt")
@dataclass
class QwT:
    """Settings of QwT.

    Args:
        target: "local", the full-precision block on the quantized network's input (the paper);
            "global", the full-precision network's own output of the block.
        dtype: "float16" (the paper) or "float32" for the added layer's weight. Where integer engines
            can run the model, the simulation widens it to float32 as they do; else it multiplies in it.
        kernel_size: of the convolution beside image blocks, odd.
        channels_per_group: input channels that one group of that convolution sees, at least.
        damping: share of the Gram matrix' mean diagonal that is added to its diagonal.
        r2: "pooled" measures R^2 about each channel's mean; "positional" about the mean of each
            channel and position, as the public ResNet code does (it can reject good blocks).
    """

    target: str = "local"
    dtype: str = "float16"
    kernel_size: int = 1
    channels_per_group: int = 16
    damping: float = 1e-6
    r2: str = "pooled"

    def __post_init__(self):
        for name, choices in {"target": ("local", "global"), "dtype": tuple(DTYPES), "r2": ("pooled", "positional")}.items():
            if getattr(self, name) not in choices:
                raise Qwt2Error(f"qwt: unknown {name} {getattr(self, name)!r}; use one of: {', '.join(choices)}")
        if not isinstance(self.kernel_size, int) or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise Qwt2Error(f"qwt: kernel_size is {self.kernel_size!r}; use an odd number")
        if self.damping < 0 or self.channels_per_group < 1:
            raise Qwt2Error("qwt: damping must be at least 0 and channels_per_group at least 1")

    def fit(self, qmodel: nn.Module, calibration: Iterable[Any], offload_dir: str | None) -> list[ModuleReport]:
        """Fit and apply, in place; see :func:`qwt2.compensate`."""
        info = quantization_info(qmodel)
        if not info.blocks:
            raise Qwt2Error("qwt: the model has no blocks to put a layer beside; name them with quantize(blocks=[...])")
        batches = calibration_batches(qmodel, calibration)
        quantized = UnitStream(qmodel, batches, reference=False, offload_dir=offload_dir)
        reference = None
        if self.target == "global":
            reference = UnitStream(qmodel, batches, reference=True, offload_dir=offload_dir)
        reports = []
        for unit in info.units:
            outputs = ActivationStore(offload_dir, "outputs")
            if unit in info.blocks:
                reports.append(self._fit_block(qmodel, unit, quantized, reference, outputs))
            quantized.advance(self._compensated(quantized, outputs) if outputs.trees else None)
            outputs.clear()
            if reference is not None:
                reference.advance()
        return reports

    def _fit_block(
        self, qmodel: nn.Module, name: str, quantized: UnitStream, reference: UnitStream | None, outputs: ActivationStore
    ) -> ModuleReport:
        """Fit one block and put its layer beside it; what the bare block gave on each batch is kept in ``outputs``."""
        layers = {layer for layer in quantization_info(qmodel).layers if layer.startswith(name + ".")}
        if layers <= quantized.repeated:
            return ModuleReport(name, math.nan, math.nan, math.nan, False, "the block runs several times in one pass")
        is_image = block_channel_axis(qmodel, name) == 1
        error: _ImageError | _TokenError | None = None
        signal = 0.0
        for index in range(len(quantized.batches)):
            (x, *_), _ = quantized.inputs[index]
            y_q = quantized.run(index)
            if reference is None:
                with full_precision(qmodel):
                    y_f = quantized.run(index)
            else:
                y_f = reference.run(index, keep=True)
            if error is None:
                error = _ImageError(x, y_q, self) if is_image else _TokenError()
                if not error.fits(x, y_q):
                    return ModuleReport(name, math.nan, math.nan, math.nan, False, "input and output positions differ")
            signal += float(y_f.double().square().sum())
            error.update(x, y_f - y_q)
            if not math.isfinite(error.power):
                raise Qwt2Error(f"{name} gives NaN or infinity on the calibration images; check its weights")
            outputs[index] = y_q
            give_back_after(index)
        weight = error.regression.solve(self.damping)
        r2 = error.positional_r2(weight[0]) if is_image and self.r2 == "positional" else error.regression.r2(weight[0])
        return self._apply(qmodel, name, error, weight, r2, signal)

    def _compensated(self, quantized: UnitStream, outputs: ActivationStore) -> Callable[[int], Tensor]:
        """The current unit's output from what its bare block gave, for each batch."""

        def output_of(index: int) -> Tensor:
            (x, *_), _ = quantized.inputs[index]
            unit = quantized.unit
            return outputs[index] + unit.compensation(x) if isinstance(unit, CompensatedBlock) else outputs[index]

        return output_of

    def _apply(self, qmodel, name, error, solution, r2: float, signal: float) -> ModuleReport:
        before = decibel(signal, error.power)
        kept = r2 > 0
        if kept:
            weight, bias = error.layer(*solution)
            block = qmodel.get_submodule(name)
            dtype = DTYPES[self.dtype]
            # What goes to an engine is simulated in the arithmetic that engines have.
            arithmetic = torch.float32 if quantization_info(qmodel).exportable else dtype
            layer = CompensatedBlock(block, weight.float(), bias.float(), error.stride, error.groups, dtype, arithmetic)
            wrap_block(qmodel, name, layer)
        after = decibel(signal, error.regression.residual(solution[0])) if kept else before
        return ModuleReport(name, before, after, r2, kept, "" if kept else "R^2 is not positive")


class _TokenError:
    """Regression of a block's error where channels are the last axis: one linear map."""

    stride, groups = 1, 1

    def __init__(self):
        self.regression, self.power = GroupedRegression(), 0.0

    def fits(self, x: Tensor, y: Tensor) -> bool:
        return x.shape[:-1] == y.shape[:-1]

    def update(self, x: Tensor, error: Tensor) -> None:
        self.power += float(error.double().square().sum())
        self.regression.update(x.flatten(0, -2)[None], error.flatten(0, -2)[None])

    def layer(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight[0].T, bias[0]


class _ImageError:
    """Regression of a block's error on image patches: a grouped convolution."""

    def __init__(self, x: Tensor, y: Tensor, settings: QwT):
        self.kernel = settings.kernel_size
        self.stride = tuple(max(1, math.ceil(x.shape[d] / y.shape[d])) for d in (2, 3))
        wanted = max(x.shape[1] // settings.channels_per_group, 1)
        self.groups = math.gcd(wanted, math.gcd(x.shape[1], y.shape[1]))
        self.channels = x.shape[1]
        self.regression, self.power = GroupedRegression(self.groups), 0.0
        self.samples, self.position_sum = 0, 0.0

    def fits(self, x: Tensor, y: Tensor) -> bool:
        pad = self.kernel // 2
        size = [(x.shape[d] + 2 * pad - self.kernel) // s + 1 for d, s in zip((2, 3), self.stride)]
        return size == list(y.shape[2:])

    def update(self, x: Tensor, error: Tensor) -> None:
        self.power += float(error.double().square().sum())
        self.samples += error.shape[0]
        self.position_sum = self.position_sum + error.double().sum(0)
        patches = F.unfold(x, self.kernel, padding=self.kernel // 2, stride=self.stride)
        self.regression.update(self._rows(patches), self._rows(error.flatten(2)))

    def _rows(self, values: Tensor) -> Tensor:
        """(N, G * d, positions) -> (G, N * positions, d)."""
        n, _, positions = values.shape
        return values.reshape(n, self.groups, -1, positions).permute(1, 0, 3, 2).reshape(self.groups, n * positions, -1)

    def layer(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        kernel = weight.transpose(1, 2).reshape(-1, self.channels // self.groups, self.kernel, self.kernel)
        return kernel, bias.reshape(-1)

    def positional_r2(self, weight: Tensor) -> float:
        total = self.power - float((self.position_sum.square() / self.samples).sum())
        return 1 - self.regression.residual(weight) / total if total > 0 else -math.inf
