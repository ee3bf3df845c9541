"""QwT-v2: channel-wise affine compensation (CWAC), arXiv 2505.20932.

y = alpha * y_q + beta per output channel of each quantized module, in closed form from joint
moments of the quantized and the full-precision output. :func:`qwt2.fold` turns alpha and beta into
the integer layer's own scales and biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qwt2.compensation.blocks import AffineCompensation, put_behind, visits_behind_blocks
from qwt2.compensation.methods import COMPENSATIONS
from qwt2.compensation.moments import Moments
from qwt2.compensation.report import ModuleReport
from qwt2.errors import Qwt2Error
from qwt2.quantization.info import channel_axis
from qwt2.quantization.layers import QuantizedLayer
from qwt2.quantization.recipe import Recipe
from qwt2.quantization.walk import Visit, Walk

# alpha by estimator, of channels that vary; beta = mean(y_f) - alpha * mean(y_q). Least squares is QwT-v2's.
ESTIMATORS: dict[str, Callable[[Moments], Tensor]] = {
    "least_squares": lambda m: m.cov / m.var_q,
    "moment": lambda m: (m.var_f / m.var_q).sqrt(),
    "bias_only": lambda m: torch.ones_like(m.var_q),
}
CHOICES = {
    "target": ("global", "local"),
    "order": ("sequential", "one_pass"),
    "granularity": ("module", "block"),
    "estimator": tuple(ESTIMATORS),
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

    LABEL: ClassVar[str] = "CWAC"
    ORDER: ClassVar[int] = 20
    COLOUR: ClassVar[str] = "#0f9d76"

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

    @property
    def exportable(self) -> bool:
        """Whether integer engines can run the result: an operation behind a whole block cannot be folded."""
        return self.granularity == "module"

    def fit(self, walk: Walk, recipe: Recipe) -> list[ModuleReport]:
        """Fit and apply, in place; see :func:`qwt2.compensate`. What an earlier fit left in the layers is removed."""
        if self.gate != "none" and len(walk.batches) < 2:
            raise Qwt2Error(
                "cwac: the gate holds out whole batches; give at least two calibration batches or gate='none'"
            )
        for layer in walk.model.calls(QuantizedLayer):
            walk.model.get_submodule(layer).set_compensation(None, None)
        fits = []
        for place in PLACES[self.granularity](walk):  # execution order; what comes before is compensated already
            fits.append(self._fit(place, len(walk.batches)))
            if self.order == "sequential":
                fits[-1].apply()
        if self.order == "one_pass":
            for fit in fits:
                fit.apply()
        return [fit.report() for fit in fits]

    def _fit(self, place: Place, batches: int) -> _Fit:
        fitted: list[Moments] = []
        held_out: list[Moments] = []
        for index, y_q, y_f in place.outputs(self.target):
            moments = Moments.of(y_q, y_f, place.channel_axis)
            if not moments.is_finite:
                raise Qwt2Error(f"{place.name} gives NaN or infinity on the calibration images; check its weights")
            part = held_out if self.gate != "none" and _is_held_out(index, batches, self.holdout) else fitted
            part[:] = [part[0] + moments] if part else [moments]
        # The gate decides by parameters fitted without what it looks at; the final ones use every calibration image.
        every = fitted[0] + held_out[0] if held_out else fitted[0]
        fit = _Fit(place, every, *affine(every, self.estimator))
        return fit.gated(held_out[0], affine(fitted[0], self.estimator), self.gate) if held_out else fit


def affine(moments: Moments, estimator: str = "least_squares") -> tuple[Tensor, Tensor]:
    """alpha and beta, float64 (C,), that bring the quantized output to the full-precision one (QwT-v2, section 3)."""
    alpha = torch.where(moments.varies, ESTIMATORS[estimator](moments), torch.ones_like(moments.var_q))
    return alpha, moments.mean_f - alpha * moments.mean_q


class LayerPlace:
    """A layer, whose compensation folds away.

    Attributes:
        name, channel_axis: of it.
    """

    def __init__(self, visit: Visit):
        self.name, self.layer, self.outputs = visit.name, visit.module, visit.layer_outputs
        self.channel_axis = visit.module.channel_axis

    def apply(self, alpha: Tensor, beta: Tensor) -> None:
        """Give the layer its alpha and beta, (C_out,)."""
        self.layer.set_compensation(alpha.float(), beta.float())

    @classmethod
    def all(cls, walk: Walk) -> Iterator[LayerPlace]:
        """Every layer in execution order."""
        return map(cls, walk.visits(QuantizedLayer))


class BlockPlace:
    """The output of a block."""

    def __init__(self, visit: Visit, block: str):
        self.model, self.visit, self.name = visit.walk.model, visit, block
        self.channel_axis = channel_axis(self.model, block)

    def outputs(self, target: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(batch, the quantized block's output, its target), for every batch."""
        for index, (_, y_q), (_, y_f) in self.visit.block_outputs(self.name, target):
            yield index, y_q, y_f

    def apply(self, alpha: Tensor, beta: Tensor) -> None:
        """Put alpha and beta, (C,), behind the block."""
        put_behind(self.model, self.name, AffineCompensation(alpha.float(), beta.float(), self.channel_axis))

    @classmethod
    def all(cls, walk: Walk) -> Iterator[BlockPlace]:
        """Every block in execution order."""
        for visit, block in visits_behind_blocks(walk):
            yield cls(visit, block)


Place = LayerPlace | BlockPlace
PLACES: dict[str, Callable[[Walk], Iterator[Place]]] = {"module": LayerPlace.all, "block": BlockPlace.all}


@dataclass(frozen=True)
class _Fit:
    """What was fitted in one place, and whether the gate kept it."""

    place: Place
    moments: Moments
    alpha: Tensor
    beta: Tensor
    kept: bool = True
    reason: str = ""
    gate_before_db: float = math.nan
    gate_after_db: float = math.nan

    def gated(self, held_out: Moments, fitted: tuple[Tensor, Tensor], gate: str) -> _Fit:
        """The fit with what lowers no error on held-out images taken out, given what the other images led to."""
        gain = held_out.squared_error() - held_out.squared_error(*fitted)
        better = gain > 0 if gate == "channel" else (gain.sum() > 0).expand_as(gain)
        before, after = held_out.sqnr_db(), held_out.sqnr_db(*fitted)
        kept = bool(better.any())
        return replace(
            self, kept=kept, gate_before_db=before, gate_after_db=after,
            reason="" if kept else f"no gain on held-out images: {before:.2f} dB without, {after:.2f} dB with it",
            alpha=torch.where(better, self.alpha, torch.ones_like(self.alpha)),
            beta=torch.where(better, self.beta, torch.zeros_like(self.beta)),
        )  # fmt: skip

    def apply(self) -> None:
        if self.kept:
            self.place.apply(self.alpha, self.beta)

    def report(self) -> ModuleReport:
        moments = self.moments
        error, left = moments.squared_error().sum(), moments.squared_error(self.alpha, self.beta).sum()
        return ModuleReport(
            module=self.place.name,
            sqnr_before_db=moments.sqnr_db(),
            sqnr_after_db=moments.sqnr_db(self.alpha, self.beta),
            r2=float(1 - left / error) if error > 0 else 0.0,
            kept=self.kept,
            reason=self.reason,
            alpha=self.alpha,
            beta=self.beta,
            output_rms=math.sqrt(float((moments.var_f + moments.mean_f.square()).mean())),
            gate_before_db=self.gate_before_db,
            gate_after_db=self.gate_after_db,
        )


def _is_held_out(index: int, count: int, share: float) -> bool:
    """Every n-th batch, spread evenly; never all of them and never none."""
    held = min(max(round(count * share), 1), count - 1)
    return (index + 1) * held // count != index * held // count
