"""QwT-v2: channel-wise affine compensation (CWAC), arXiv 2505.20932.

y = alpha * y_q + beta per output channel of each quantized module. The parameters follow in closed form from the joint
moments of the quantized output and its target. :func:`qwt2.fold` folds alpha and beta into the integer layer's own
scales and biases. By default, the target is what the residual stream lacks; "cwac_paper" is the paper's own form.
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
from qwt2.decibel import decibel
from qwt2.errors import Qwt2Error
from qwt2.quantization.info import channel_axis
from qwt2.quantization.layers import QuantizedLayer
from qwt2.quantization.observers import OBSERVERS
from qwt2.quantization.recipe import Recipe
from qwt2.quantization.walk import Visit, Walk

# Estimators of alpha for channels that are not constant; beta = mean(y_f) - alpha * mean(y_q). QwT-v2: least squares.
# "branch" is "moment" inside a residual branch and "least_squares" at its end, less what chance explains.
ESTIMATORS: dict[str, Callable[[Moments], Tensor]] = {
    "least_squares": lambda m: m.cov / m.var_q,
    "moment": lambda m: (m.var_f / m.var_q).sqrt(),
    "bias_only": lambda m: torch.ones_like(m.var_q),
}
# Gain by chance that is allowed for, in units of the expected one. Channels share their chances, which then vary more.
CHANCE = 2
CHOICES = {
    "target": ("stream", "global", "local"),
    "order": ("sequential", "one_pass"),
    "granularity": ("module", "block"),
    "estimator": ("branch", *ESTIMATORS),
    "gate": ("stream", "module", "channel", "none"),
}


@COMPENSATIONS.register("cwac")
@dataclass
class CWAC:
    """Settings of CWAC.

    Args:
        target: "stream" for what the residual stream lacks if a module's output is added to it (the full-precision
            stream behind the addition minus the quantized stream before it), and "global" for other modules; "global"
            for the module's output in the full-precision network; "local" for the full-precision module's output on
            the quantized module's input.
        order: "sequential" fits each module after the modules before it are compensated; "one_pass" fits all modules
            on the uncompensated network.
        granularity: "module" compensates every Linear and Conv2d, which folds away completely; "block" compensates
            every block's output by an extra operation that cannot be folded.
        estimator: "branch", "least_squares" (the paper), "moment" or "bias_only". Least squares shrinks a noisy output,
            and inside a branch every later module would see less signal. "branch" therefore takes "moment" inside a
            residual branch, and "least_squares" at its end and outside, and pulls both towards no compensation as
            far as few images would give parameters by chance (:func:`shrunk`).
        gate: keep a compensation only if it lowers the squared error on held-out calibration batches: "stream" decides
            per module by the residual stream behind its branch (by the module's output where there is none), "module"
            by the module's output, "channel" by each channel of it, and "none" keeps all.
        ranges: observer that chooses the ranges of activations of fewer than 8 bits again on the compensated network;
            those of compensated layers' outputs are chosen again by their own observer. ``None`` keeps all ranges, and
            so does compensation of blocks.
        holdout: share of the batches held out for the gate, at least one batch.

    Raises:
        Qwt2Error: if a setting has an unknown value.
    """

    LABEL: ClassVar[str] = "CWAC"
    ORDER: ClassVar[int] = 20
    COLOUR: ClassVar[str] = "#0f9d76"

    target: str = "stream"
    order: str = "sequential"
    granularity: str = "module"
    estimator: str = "branch"
    gate: str = "stream"
    ranges: str | None = "mse"
    holdout: float = 0.25

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise Qwt2Error(f"cwac: unknown {name} {getattr(self, name)!r}; use one of: {', '.join(choices)}")
        check_calibration("cwac", self.ranges, self.holdout)

    @property
    def exportable(self) -> bool:
        """Whether integer engines can run the result; a compensation of a whole block cannot be folded."""
        return self.granularity == "module"

    def fit(self, walk: Walk, recipe: Recipe) -> list[ModuleReport]:
        """Fit and apply the compensation in place.

        An earlier one in the layers is removed first; weight codes and ranges that it chose stay.

        Args:
            walk: the calibration set on its way through the quantized model.
            recipe: the PTQ method's grids; not used.

        Returns:
            One report per module or block, in execution order.

        Raises:
            Qwt2Error: if the gate has fewer than two batches, or an output is NaN or infinite (the module is named).
        """
        if self.gate != "none" and len(walk.batches) < 2:
            raise Qwt2Error(
                "cwac: the gate holds out whole batches; give at least two calibration batches or gate='none'"
            )
        remove_compensation(walk)
        fits = []
        for place in PLACES[self.granularity](walk, self.ranges):  # in execution order
            fits.append(self._fit(place, walk))
            if self.order == "sequential":
                fits[-1].apply()
        if self.order == "one_pass":
            for fit in fits:
                fit.apply()
        return [fit.report() for fit in fits]

    def _fit(self, place: Place, walk: Walk) -> _Fit:
        held = held_out_batches(len(walk.batches), self.holdout) if self.gate != "none" else set()
        parts: dict[bool, Moments] = {}
        for index, y_q, y_f in place.outputs(self.target):
            moments, key = Moments.of(y_q, y_f, place.channel_axis), index in held
            parts[key] = parts[key] + moments if key in parts else moments
        parts = walk.processes.merged(parts)
        if not all(moments.is_finite for moments in parts.values()):
            raise Qwt2Error(f"{place.name} gives NaN or infinity on the calibration images; check its weights")
        every = parts[False] + parts[True] if held else parts[False]
        fit = _Fit(place, every, *self._parameters(place, every, walk.images()))
        if not held:
            return fit
        # The gate judges parameters that were fitted without the held-out images; the final ones use all images.
        trial = self._parameters(place, parts[False], walk.images() - walk.images(held))
        return self._gated(fit, held, parts[True], trial)

    def _parameters(self, place: Place, moments: Moments, images: int) -> tuple[Tensor, Tensor]:
        if self.estimator != "branch":
            return affine(moments, self.estimator)
        return shrunk(*affine(moments, estimator_at(place.is_inside_branch)), moments, images)

    def _gated(self, fit: _Fit, held: set[int], held_out: Moments, trial: tuple[Tensor, Tensor]) -> _Fit:
        """Return the fit without parameters that do not help on held-out batches.

        Args:
            fit: the fit on all batches.
            held: numbers of the held-out batches.
            held_out: their moments.
            trial: alpha and beta fitted on the other batches, (C,).
        """
        if self.gate == "stream" and (found := fit.place.stream_errors(held, trial)):
            signal, before, after = found
            return fit.keeping(torch.tensor(after < before), decibel(signal, before), decibel(signal, after))
        gain = held_out.squared_error() - held_out.squared_error(*trial)
        better = gain > 0 if self.gate == "channel" else gain.sum() > 0
        return fit.keeping(better, held_out.sqnr_db(), held_out.sqnr_db(*trial))


@COMPENSATIONS.register("cwac_paper")
@dataclass
class PaperCWAC(CWAC):
    """CWAC exactly as QwT-v2 describes it (arXiv 2505.20932, section 3): least squares to each module's own output."""

    LABEL: ClassVar[str] = "CWAC, paper"
    ORDER: ClassVar[int] = 19
    COLOUR: ClassVar[str] = "#86d3bd"

    target: str = "global"
    estimator: str = "least_squares"
    gate: str = "none"
    ranges: str | None = None


def estimator_at(is_inside_branch: bool) -> str:
    """Return the estimator that keeps the size of the signal inside a branch, and lowers the error elsewhere."""
    return "moment" if is_inside_branch else "least_squares"


def affine(moments: Moments, estimator: str = "least_squares") -> tuple[Tensor, Tensor]:
    """Return alpha and beta, float64 (C,), that map the quantized to the full-precision output (QwT-v2, section 3)."""
    alpha = torch.where(moments.varies, ESTIMATORS[estimator](moments), torch.ones_like(moments.var_q))
    return alpha, moments.mean_f - alpha * moments.mean_q


def shrunk(alpha: Tensor, beta: Tensor, moments: Moments, images: int) -> tuple[Tensor, Tensor]:
    """Pull a layer's parameters towards no compensation by the share of their gain that chance explains.

    A parameter fitted on n values lowers an unpredictable error by about 1 / n of it. With the layer's error E before
    and R after a fit, the share that is kept is 1 - c R / (n (E - R)) with c = :data:`CHANCE`, and never negative
    (Stein's estimator, James and Stein 1961): once for alpha - 1, from centred values, and once for the shift of the
    mean. Positions within an image are more alike than images, so n is the geometric mean of both counts.

    Args:
        alpha, beta: the parameters, (C,).
        moments: of the layer's output and its target.
        images: number of images behind the moments.
    """
    m = moments
    count = math.sqrt(images * m.count)
    gap, shift = m.mean_f - m.mean_q, alpha * m.mean_q + beta - m.mean_q
    error = (m.var_q - 2 * m.cov + m.var_f).sum()
    left = torch.where(m.varies, m.var_f - m.cov.square() / m.var_q, m.var_f).sum()
    alpha = 1 + _kept(error, left, count) * (alpha - 1)
    shift = _kept(error + gap.square().sum(), error, count) * shift
    return alpha, (1 - alpha) * m.mean_q + shift


def _kept(error: Tensor, left: Tensor, count: float) -> float:
    gain = float(error - left)
    return max(0.0, 1 - CHANCE * float(left) / (count * gain)) if gain > 0 else 0.0


class LayerPlace:
    """A layer, whose compensation can be folded.

    Attributes:
        name: name of the layer.
        channel_axis: channel axis of its output.
        is_inside_branch: whether it lies inside a residual branch, and not at its end.
    """

    def __init__(self, visit: Visit):
        self.name, self.layer, self.outputs = visit.name, visit.module, visit.layer_outputs
        self.visit, self.channel_axis, self.is_inside_branch = visit, visit.module.channel_axis, visit.is_inside_branch

    def stream_errors(self, batches: set[int], parameters: tuple[Tensor, Tensor]) -> tuple[float, float, float] | None:
        """Return what the layer's parameters do to the residual stream behind its branch.

        Args:
            batches: numbers of the batches to run.
            parameters: alpha and beta.

        Returns:
            The power of the full-precision stream, and of the quantized stream's error without and with the
            parameters, each summed over all values; ``None`` if the layer is not inside a branch.
        """
        without = self.visit.stream_error(batches) if self.is_inside_branch else None
        if without is None:
            return None
        self.apply(*parameters)
        compensated = self.visit.stream_error(batches)
        self.layer.set_compensation(None, None)
        assert compensated is not None  # the same stream
        return *without, compensated[1]

    def apply(self, alpha: Tensor, beta: Tensor) -> None:
        """Set the layer's alpha and beta, (C_out,)."""
        self.layer.set_compensation(alpha.float(), beta.float())

    @classmethod
    def all(cls, walk: Walk, ranges: str | None) -> Iterator[LayerPlace]:
        """Yield every layer in execution order."""
        return map(cls, walk.layer_visits(ranges))


class BlockPlace:
    """A block, whose compensation is a module of its own after the block.

    Attributes:
        name: name of the block.
        channel_axis: channel axis of its output.
        is_inside_branch: False; the output of a block is the stream itself.
    """

    is_inside_branch = False

    def __init__(self, visit: Visit, block: str):
        self.model, self.visit, self.name = visit.walk.model, visit, block
        self.channel_axis = channel_axis(self.model, block)

    def outputs(self, target: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (batch number, the quantized block's output, its target) for every batch."""
        for index, (_, y_q), (_, y_f) in self.visit.block_outputs(self.name, target):
            yield index, y_q, y_f

    def stream_errors(self, batches: set[int], parameters: tuple[Tensor, Tensor]) -> None:
        """Return ``None``: the gate decides by the block's output."""
        return

    def apply(self, alpha: Tensor, beta: Tensor) -> None:
        """Insert alpha and beta, (C,), after the block."""
        put_behind(self.model, self.name, AffineCompensation(alpha.float(), beta.float(), self.channel_axis))

    @classmethod
    def all(cls, walk: Walk, ranges: str | None) -> Iterator[BlockPlace]:
        """Yield every block in execution order; ranges stay as they are."""
        for visit, block in visits_behind_blocks(walk):
            yield cls(visit, block)


Place = LayerPlace | BlockPlace
PLACES: dict[str, Callable[[Walk, str | None], Iterator[Place]]] = {"module": LayerPlace.all, "block": BlockPlace.all}


@dataclass(frozen=True)
class _Fit:
    """The parameters fitted in one place, and the decision of the gate."""

    place: Place
    moments: Moments
    alpha: Tensor
    beta: Tensor
    kept: bool = True
    reason: str = ""
    gate_before_db: float = math.nan
    gate_after_db: float = math.nan

    def keeping(self, better: Tensor, before_db: float, after_db: float) -> _Fit:
        """Return the fit with only those parameters that are better than none.

        Args:
            better: whether they are, bool, () or (C,).
            before_db, after_db: SQNR on held-out images without and with them.
        """
        kept = bool(better.any())
        return replace(
            self, kept=kept, gate_before_db=before_db, gate_after_db=after_db,
            reason="" if kept else f"no gain on held-out images: {before_db:.2f} dB without, {after_db:.2f} dB with it",
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


def remove_compensation(walk: Walk) -> None:
    """Remove alpha and beta from every layer of the walk's model."""
    for layer in walk.model.calls(QuantizedLayer):
        walk.model.get_submodule(layer).set_compensation(None, None)


def check_calibration(method: str, ranges: str | None, holdout: float) -> None:
    """Refuse an unknown observer, and a share of held-out batches that is not between 0 and 1."""
    if ranges is not None and ranges not in OBSERVERS:
        raise Qwt2Error(f"{method}: unknown ranges {ranges!r}; use None or one of: {', '.join(OBSERVERS)}")
    if not isinstance(holdout, float) or not 0 < holdout < 1:
        raise Qwt2Error(f"{method}: holdout is {holdout!r}; use a share between 0 and 1")


def held_out_batches(count: int, share: float) -> set[int]:
    """Return the numbers of the held-out batches: spread evenly, at least one and never all."""
    held = min(max(round(count * share), 1), count - 1)
    return {index for index in range(count) if (index + 1) * held // count != index * held // count}
