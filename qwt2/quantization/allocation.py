"""Mixed precision: choose which modules get more bits, under a budget or to reach a target."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from qwt2.capture.batch import Inputs, image_count, joined, model_inputs
from qwt2.capture.check import outputs_of
from qwt2.capture.export import capture
from qwt2.capture.graph import GraphModel
from qwt2.decibel import decibel
from qwt2.errors import Qwt2Error
from qwt2.quantization.precision import Precision
from qwt2.quantization.quantize import quantize
from qwt2.quantization.sensitivity import ModuleCost, sensitivity


@dataclass(frozen=True)
class Allocation:
    """Bit widths per module; ``quantize(model, data, **allocation.settings)`` applies them.

    Attributes:
        precision: bit widths of every module without an entry in ``bits``.
        bits: bit widths per module.
        exclude: modules that stay in float.
        moves: the decisions, in order: "blocks.0.attn.qkv to W8A8", "head to float".
        weight_bytes: bytes of all weights of the modules that can be quantized.
        bit_operations: multiply-accumulates of these modules for one image, each times weight bits times activation
            bits.
        sqnr_db: SQNR of the allocated model's centred outputs against the float model's on the calibration images, dB;
            ``None`` if it was not the goal.
        agreement: percentage of calibration images whose largest output is the same as the float model's; ``None`` if
            it was not the goal.
    """

    precision: Precision
    bits: dict[str, Precision] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    moves: tuple[str, ...] = ()
    weight_bytes: int = 0
    bit_operations: int = 0
    sqnr_db: float | None = None
    agreement: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of :func:`qwt2.quantize` that apply this allocation."""
        return {"precision": self.precision, "bits": self.bits, "exclude": self.exclude}


_FLOAT_BITS = 32


def allocate(
    model: nn.Module,
    calibration: Iterable[Any],
    method: str = "repq",
    precision: Precision = Precision(4, 8),
    target: str = "portable",
    high: Precision = Precision(8, 8),
    weight_bytes: int | None = None,
    bit_operations: int | None = None,
    sqnr_db: float | None = None,
    agreement: float | None = None,
    exclude: Iterable[str] = (),
) -> Allocation:
    """Choose bit widths per module by their cost at the network's output (:func:`qwt2.sensitivity`).

    Give exactly one goal: a budget (``weight_bytes``, ``bit_operations``) or a target (``sqnr_db``, ``agreement``).
    Under a budget, modules get ``high`` in the order of error removed per byte or bit-operation, as long as the budget
    lasts. For a target, the most expensive modules get ``high``, and after that stay in float, one after another until
    the quantized model reaches the target. The number of these moves is found by bisection; each step quantizes the
    model once.

    Args:
        model: a float model.
        calibration: batches as in :func:`qwt2.quantize`; at least two images for a target.
        method, target: as in :func:`qwt2.quantize`.
        precision: bit widths to start from.
        high: bit widths of the modules that turn out to be expensive.
        weight_bytes: budget for the weights of all modules that can be quantized, bytes.
        bit_operations: budget for multiply-accumulates times weight bits times activation bits, for one image.
        sqnr_db: lowest acceptable SQNR of the centred outputs, dB.
        agreement: lowest acceptable percentage of images with the same largest output, for classifiers.
        exclude: names or patterns of modules that stay in float in any case.

    Returns:
        The allocation; apply it with ``quantize(model, calibration, method, target=target, **allocation.settings)``.

    Raises:
        Qwt2Error: if not exactly one goal is given, the budget is too small for ``precision``, or the target is not
            reached with all but one module in float.
    """
    goals = {"weight_bytes": weight_bytes, "bit_operations": bit_operations, "sqnr_db": sqnr_db, "agreement": agreement}
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        raise Qwt2Error(f"allocate: {len(given)} goals are given; give exactly one of {', '.join(goals)}")
    # The first and last layers are allocated like all others.
    precision, high = replace(precision, first_last_bits=None), replace(high, first_last_bits=None)
    batches = list(model_inputs(model, calibration))
    captured = capture(model, batches[0])
    excluded = tuple(exclude)
    low_costs, high_costs = (
        sensitivity(captured, batches, method, bits, target, exclude=excluded) for bits in (precision, high)
    )
    search = _Search(low_costs, {cost.module: cost for cost in high_costs}, precision, high, excluded)
    [(goal, wanted)] = given.items()
    if goal in _MEASURES:
        return search.down_to_target(captured, batches, method, target, goal, wanted)
    return search.under_budget(goal, wanted)


@dataclass(frozen=True)
class _Search:
    """The search for an allocation.

    Args:
        low: cost of each module at ``precision``, the most expensive one first.
        high: module -> its cost at ``to``.
        precision: bit widths to start from.
        to: bit widths of the modules that turn out to be expensive.
        exclude: names or patterns of modules that stay in float in any case.
    """

    low: list[ModuleCost]
    high: dict[str, ModuleCost]
    precision: Precision
    to: Precision
    exclude: tuple[str, ...]

    def under_budget(self, goal: str, budget: float) -> Allocation:
        """Raise modules in the order of error removed per byte or bit-operation, as long as the budget lasts."""
        left = budget - sum(_price(cost, self.precision, goal) for cost in self.low)
        if left < 0:
            raise Qwt2Error(
                f"allocate: {goal}={budget:.0f} is less than the {budget - left:.0f} of all modules at "
                f"{_name(self.precision)}; raise it or lower precision"
            )

        def extra(cost: ModuleCost) -> float:
            return _price(cost, self.to, goal) - _price(cost, self.precision, goal)

        def gain(cost: ModuleCost) -> float:
            return (cost.error - self.high[cost.module].error) / max(extra(cost), 1e-9)

        chosen = []
        for cost in sorted(self.low, key=gain, reverse=True):
            if gain(cost) > 0 and extra(cost) <= left:
                left -= extra(cost)
                chosen.append(cost.module)
        return self._allocation(chosen, [])

    def down_to_target(
        self, captured: GraphModel, batches: list[Inputs], method: str, target: str, goal: str, wanted: float
    ) -> Allocation:
        """Raise the most expensive modules, then leave them in float, until the quantized model reaches the target."""
        images = joined(batches)
        if image_count(images) < 2:
            raise Qwt2Error("allocate: a target needs at least two calibration images to be measured on")
        exact = outputs_of(captured, images)
        by_low = [cost.module for cost in self.low]
        by_high = sorted(by_low, key=lambda name: -self.high[name].error)

        def attempt(moves: int) -> tuple[float, Allocation]:
            found = self._allocation(by_low[:moves], by_high[: max(0, moves - len(by_low))])
            qmodel = quantize(captured, batches, method, target=target, **found.settings)
            reached = _MEASURES[goal](exact, outputs_of(qmodel, images))
            return reached, replace(found, sqnr_db=reached) if goal == "sqnr_db" else replace(found, agreement=reached)

        most = 2 * len(by_low) - 1  # at least one module must stay quantized
        reached, found = _fewest_moves(attempt, wanted, most)
        if reached < wanted:
            raise Qwt2Error(
                f"allocate: {goal} reaches {reached:.1f} with all but one module in float, not {wanted}; ask for less"
            )
        return found

    def _allocation(self, raised: list[str], floats: list[str]) -> Allocation:
        """Build the allocation; it names every module, because named bits also apply to first and last layers."""
        chosen: dict[str, Precision | None] = {cost.module: self.precision for cost in self.low}
        chosen |= dict.fromkeys(raised, self.to) | dict.fromkeys(floats)
        moves = [f"{name} to {_name(own)}" for name, own in chosen.items() if own is not self.precision]
        bytes_, operations = (
            round(sum(_price(cost, chosen[cost.module], goal) for cost in self.low))
            for goal in ("weight_bytes", "bit_operations")
        )
        bits = {name: own for name, own in chosen.items() if own is not None}
        excluded = (*self.exclude, *(name for name, own in chosen.items() if own is None))
        return Allocation(self.precision, bits, excluded, tuple(moves), bytes_, operations)


def _name(precision: Precision | None) -> str:
    return "float" if precision is None else f"W{precision.weight_bits}A{precision.activation_bits}"


def _price(cost: ModuleCost, precision: Precision | None, goal: str) -> float:
    weight_bits = precision.weight_bits if precision else _FLOAT_BITS
    activation_bits = precision.activation_bits if precision else _FLOAT_BITS
    if goal == "weight_bytes":
        return cost.weight_count * weight_bits / 8
    left = weight_bits if cost.kind == "layer" else activation_bits
    return cost.multiply_accumulates * left * activation_bits


def _fewest_moves(
    attempt: Callable[[int], tuple[float, Allocation]], wanted: float, most: int
) -> tuple[float, Allocation]:
    """Return the attempt with the fewest moves that reaches the target, or the one with ``most`` moves if none does.

    The number of moves is doubled until the target is reached, and then bisected.
    """
    failed, moves, best = -1, 0, attempt(0)
    while best[0] < wanted and moves < most:
        failed, moves = moves, min(max(1, 2 * moves), most)
        best = attempt(moves)
    while best[0] >= wanted and moves - failed > 1:
        middle = (failed + moves) // 2
        other = attempt(middle)
        if other[0] >= wanted:
            moves, best = middle, other
        else:
            failed = middle
    return best


def centred_sqnr_db(exact: list[Any], found: list[Any]) -> float:
    """Return the SQNR over all float outputs, dB; the signal is their spread about the mean over the images."""
    pairs = [(e.double(), f.double()) for e, f in zip(exact, found) if isinstance(e, Tensor) and e.is_floating_point()]
    signal = sum(float((e - e.mean(0)).square().sum()) for e, _ in pairs)
    return decibel(signal, sum(float((f - e).square().sum()) for e, f in pairs))


def _agreement(exact: list[Any], found: list[Any]) -> float:
    """Return the percentage of images for which the first output has the same largest entry."""
    return float((exact[0].argmax(-1) == found[0].argmax(-1)).double().mean()) * 100


_MEASURES: dict[str, Callable[[list[Any], list[Any]], float]] = {"sqnr_db": centred_sqnr_db, "agreement": _agreement}
