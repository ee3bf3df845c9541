"""QwT-v2: channel-wise affine compensation (CWAC), arXiv 2505.20932.

y = alpha * y_q + beta per output channel of each quantized module, in closed form from joint
moments of the quantized and the full-precision output. :func:`qwt2.fold` turns alpha and beta into
the integer layer's own scales and biases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterable, Iterator

import torch
from torch import Tensor, nn

from qwt2.compensation import COMPENSATIONS, ModuleReport
from qwt2.compensation.walk import UnitStream, calibration_batches
from qwt2.errors import Qwt2Error
from qwt2.compensation.malloc import give_back_after
from qwt2.quantization.layers import AffineBlock, QuantizedLayer, full_precision
from qwt2.quantization.quantize import block_channel_axis, quantization_info, quantized_layers, wrap_block
from qwt2.compensation.moments import ChannelMoments

CHOICES = {
    "target": ("global", "local"),
    "order": ("sequential", "one_pass"),
    "granularity": ("module", "block"),
    "estimator": ("least_squares", "bias_only", "moment"),
    "gate": ("none", "module", "channel"),
}

@COMPENSATIONS.register("cwac")
@dataclass
class CWAC:
    """Settings of CWAC.

    Args:
        target: "global", the full-precision network's own output of the module; "local", the
            full-precision module's output on the input that the quantized module gets.
        order: "sequential", each module on top of the already compensated ones; "one_pass", all
            on the uncompensated network.
        granularity: "module", every Linear and Conv2d (folds away completely); "block", every
            block's output (an extra operation that cannot be folded).
        estimator: "least_squares", "moment" or "bias_only".
        gate: on held-out calibration batches, keep a compensation only if it lowers the squared
            error of the "module" as a whole, or of each "channel" by itself; "none" keeps all.
        holdout: share of the batches held out for the gate, at least one batch.
    """

    target: str = "global"
    order: str = "sequential"
    granularity: str = "module"
    estimator: str = "least_squares"
    gate: str = "module"
    holdout: float = 0.25

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise Qwt2Error(f"cwac: unknown {name} {getattr(self, name)!r}; use one of: {', '.join(choices)}")
        if not isinstance(self.holdout, float) or not 0 < self.holdout < 1:
            raise Qwt2Error(f"cwac: holdout is {self.holdout!r}; use a share between 0 and 1")

    def fit(self, qmodel: nn.Module, calibration: Iterable[Any], offload_dir: str | None) -> list[ModuleReport]:
        """Fit and apply, in place; see :func:`qwt2.compensate`. What an earlier fit left in the layers is removed."""
        batches = calibration_batches(qmodel, calibration)
        if self.gate != "none" and len(batches) < 2:
            raise Qwt2Error("cwac: the gate holds out whole batches; give at least two calibration batches or gate='none'")
        info = quantization_info(qmodel)
        for layer in quantized_layers(qmodel).values():
            layer.set_compensation(None, None)
        quantized = UnitStream(qmodel, batches, reference=False, offload_dir=offload_dir)
        reference = None
        if self.target == "global":
            reference = UnitStream(qmodel, batches, reference=True, offload_dir=offload_dir)
        fits: list[_Fit] = []
        for unit in info.units:
            if self.granularity == "module":
                layers = [name for name in info.layers if name == unit or name.startswith(unit + ".")]
                groups = [[name] for name in layers] if self.order == "sequential" else [layers]
            else:
                groups = [[unit]] if unit in info.blocks else []
            for group in groups:
                new = self._fit_group(qmodel, group, quantized, reference, is_last=group is groups[-1])
                fits += new
                if self.order == "sequential":
                    for fit in new:
                        fit.apply(qmodel)
            quantized.advance()
            if reference is not None:
                reference.advance()
        if self.order == "one_pass":
            for fit in fits:
                fit.apply(qmodel)
        return [fit.report() for fit in fits]

    def _fit_group(
        self, qmodel: nn.Module, names: list[str], quantized: UnitStream, reference: UnitStream | None, is_last: bool
    ) -> list["_Fit"]:
        """Fit these modules together; of the last ones in a unit, the reference's outputs are then known."""
        fits = {name: _Fit(name, self) for name in names}
        for index in range(len(quantized.batches)):
            held_out = self.gate != "none" and _is_held_out(index, len(quantized.batches), self.holdout)
            outputs = self._block_outputs if self.granularity == "block" else self._layer_outputs
            for name, y_q, y_f, axis in outputs(qmodel, names, index, quantized, reference, is_last):
                fits[name].update(y_q, y_f, axis, held_out)
            give_back_after(index)
        for fit in fits.values():
            fit.solve()
        return list(fits.values())

    def _layer_outputs(self, qmodel, names, index, quantized, reference, is_last) -> Iterator[tuple[str, Tensor, Tensor, int]]:
        """(layer, quantized output, target, channel axis), once for each run of each layer."""
        inputs = quantized.layer_inputs(index, names)
        layers: dict[str, QuantizedLayer] = {name: qmodel.get_submodule(name) for name in names}
        if reference is None:
            targets = {name: map(layers[name].full_precision, inputs[name]) for name in names}
        else:
            targets = reference.layer_outputs(index, names, to_end=is_last)
        for name, layer in layers.items():
            products = [layer.products(x) for x in inputs.pop(name)]
            quantized.keep(index, name, products)
            for y, y_f in zip(products, targets[name], strict=True):
                yield name, layer.with_bias(y), y_f, layer.channel_axis

    def _block_outputs(self, qmodel, names, index, quantized, reference, is_last) -> Iterator[tuple[str, Tensor, Tensor, int]]:
        y_q = quantized.run(index)
        if reference is not None:
            y_f = reference.run(index, keep=is_last)
        else:
            with full_precision(qmodel):
                y_f = quantized.run(index)
        yield names[0], y_q, y_f, block_channel_axis(qmodel, names[0])


class _Fit:
    """Moments, solution and gate of one module."""

    def __init__(self, name: str, settings: CWAC):
        self.name, self.settings = name, settings
        self.fitted, self.held_out = ChannelMoments(), ChannelMoments()
        self.kept, self.reason = True, ""
        self.gate_before_db = self.gate_after_db = math.nan

    def update(self, y_q: Tensor, y_f: Tensor, axis: int, held_out: bool) -> None:
        (self.held_out if held_out else self.fitted).update(y_q, y_f, axis)
        self.axis = axis

    def solve(self) -> None:
        if not (self.fitted.is_finite and self.held_out.is_finite):
            raise Qwt2Error(f"{self.name} gives NaN or infinity on the calibration images; check its weights")
        alpha, beta = self.fitted.affine(self.settings.estimator)
        better = torch.ones_like(alpha, dtype=torch.bool)
        if self.settings.gate != "none":
            gain = self.held_out.squared_error() - self.held_out.squared_error(alpha, beta)
            self.gate_before_db, self.gate_after_db = self.held_out.sqnr_db(), self.held_out.sqnr_db(alpha, beta)
            better = gain > 0 if self.settings.gate == "channel" else (gain.sum() > 0).expand_as(alpha)
            # The gate has decided; the final parameters use every calibration image.
            self.fitted.merge(self.held_out)
            alpha, beta = self.fitted.affine(self.settings.estimator)
        self.kept = bool(better.any())
        if not self.kept:
            self.reason = (
                f"no gain on held-out images: {self.gate_before_db:.2f} dB without, {self.gate_after_db:.2f} dB with it"
            )
        self.alpha = torch.where(better, alpha, torch.ones_like(alpha))
        self.beta = torch.where(better, beta, torch.zeros_like(beta))

    def apply(self, qmodel: nn.Module) -> None:
        if not self.kept:
            return
        module = qmodel.get_submodule(self.name)
        if isinstance(module, QuantizedLayer):
            module.set_compensation(self.alpha.float(), self.beta.float())
        else:
            wrap_block(qmodel, self.name, AffineBlock(module, self.alpha.float(), self.beta.float(), self.axis))

    def report(self) -> ModuleReport:
        error, compensated = self.fitted.squared_error().sum(), self.fitted.squared_error(self.alpha, self.beta).sum()
        return ModuleReport(
            module=self.name,
            sqnr_before_db=self.fitted.sqnr_db(),
            sqnr_after_db=self.fitted.sqnr_db(self.alpha, self.beta),
            r2=float(1 - compensated / error) if error > 0 else 0.0,
            kept=self.kept,
            reason=self.reason,
            alpha=self.alpha,
            beta=self.beta,
            output_rms=math.sqrt(float((self.fitted.var_f + self.fitted.mean_f.square()).mean())),
            gate_before_db=self.gate_before_db,
            gate_after_db=self.gate_after_db,
        )


def _is_held_out(index: int, count: int, share: float) -> bool:
    """Every n-th batch, spread evenly; never all of them and never none."""
    held = min(max(round(count * share), 1), count - 1)
    return (index + 1) * held // count != index * held // count
