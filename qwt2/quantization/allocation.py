"""Mixed precision: which modules get more bits, under a budget or down to a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from qwt2.capture.batch import Inputs, image_count, joined, model_inputs
from qwt2.capture.check import outputs_of
from qwt2.capture.export import capture
from qwt2.capture.graph import GraphModel
from qwt2.errors import Qwt2Error
from qwt2.quantization.precision import Precision
from qwt2.quantization.quantize import quantize
from qwt2.quantization.sensitivity import ModuleCost, sensitivity


@dataclass(frozen=True)
class Allocation:
    """Bit widths per module; ``quantize(model, data, **allocation.settings)`` applies them.

    Attributes:
        precision: bit widths of every module that is not named.
        bits: bit widths of modules of their own.
        exclude: modules that stay in float.
        moves: what was decided, in order: "blocks.0.attn.qkv to W8A8", "head to float".
        weight_bytes: bytes of all weights of the modules that can be quantized.
        bit_operations: multiply-accumulates of one image times weight bits times activation bits, of the same modules.
        sqnr_db, agreement: of the allocated model against the float one on calibration images, in dB of centred outputs
            and in percent of equal largest outputs; ``None`` if they were not asked for.
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
        """Arguments of :func:`qwt2.quantize`."""
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
) -> Allocation:
    """Choose bit widths per module, by what each costs at the network's output (:func:`qwt2.sensitivity`).

    Give exactly one goal. Under a budget, modules get ``high`` in the order of error taken away per byte or
    bit-operation, as long as the budget lasts. Down to a target, the most expensive modules get ``high`` and then stay
    in float, one after the other, until the quantized model reaches it; the number of moves is found by bisection, with
    a quantized model each.

    Args:
        model: a float model.
        calibration: as in :func:`qwt2.quantize`, at least two images for a target.
        method, target: as in :func:`qwt2.quantize`.
        precision: bit widths to start from.
        high: bit widths of what turns out to be expensive.
        weight_bytes: budget for the weights of all modules that can be quantized.
        bit_operations: budget for multiply-accumulates times weight bits times activation bits, for one image.
        sqnr_db: least SQNR of the centred outputs, dB.
        agreement: least percentage of images with the same largest output, for classifiers.

    Raises:
        Qwt2Error: not exactly one goal, a budget below that of the lowest bit widths, or a target that is not reached
            with every module in float.
    """
    goals = {"weight_bytes": weight_bytes, "bit_operations": bit_operations, "sqnr_db": sqnr_db, "agreement": agreement}
    given = [name for name, value in goals.items() if value is not None]
    if len(given) != 1:
        raise Qwt2Error(f"allocate: {len(given)} goals are given; give exactly one of {', '.join(goals)}")
    # The first and the last layer take part like all others.
    precision, high = replace(precision, first_last_bits=None), replace(high, first_last_bits=None)
    batches = list(model_inputs(model, calibration))
    captured = capture(model, batches[0])
    run = {"method": method, "target": target}
    low_costs = sensitivity(captured, batches, precision=precision, **run)
    high_costs = {cost.module: cost for cost in sensitivity(captured, batches, precision=high, **run)}
    if given[0] in ("weight_bytes", "bit_operations"):
        return _under_budget(low_costs, high_costs, precision, high, given[0], goals[given[0]])
    return _down_to_target(captured, batches, low_costs, high_costs, precision, high, run, given[0], goals[given[0]])


def _price(cost: ModuleCost, precision: Precision | None, goal: str) -> float:
    weight_bits = precision.weight_bits if precision else _FLOAT_BITS
    activation_bits = precision.activation_bits if precision else _FLOAT_BITS
    if goal == "weight_bytes":
        return cost.weight_count * weight_bits / 8
    left = weight_bits if cost.kind == "layer" else activation_bits
    return cost.multiply_accumulates * left * activation_bits


def _allocation(
    costs: list[ModuleCost], precision: Precision, high: list[str], to: Precision, floats: list[str]
) -> Allocation:
    """With the first-named modules at ``to``, or in float; every module is named, so that first and last ones are too."""
    chosen = {c.module: None if c.module in floats else to if c.module in high else precision for c in costs}
    high = [name for name in high if name not in floats]
    moves = [f"{name} to W{to.weight_bits}A{to.activation_bits}" for name in high] + [
        f"{name} to float" for name in floats
    ]
    total = {goal: sum(_price(c, chosen[c.module], goal) for c in costs) for goal in ("weight_bytes", "bit_operations")}
    return Allocation(
        precision,
        {name: own for name, own in chosen.items() if own is not None},
        tuple(name for name, own in chosen.items() if own is None),
        tuple(moves),
        round(total["weight_bytes"]),
        round(total["bit_operations"]),
    )


def _under_budget(
    low: list[ModuleCost], high: dict[str, ModuleCost], precision: Precision, to: Precision, goal: str, budget: float
) -> Allocation:
    left = budget - sum(_price(cost, precision, goal) for cost in low)
    if left < 0:
        raise Qwt2Error(
            f"allocate: {goal}={budget:.0f} is less than the {budget - left:.0f} of all modules at "
            f"W{precision.weight_bits}A{precision.activation_bits}; raise it or lower precision"
        )

    def extra(cost: ModuleCost) -> float:
        return _price(cost, to, goal) - _price(cost, precision, goal)

    def gain(cost: ModuleCost) -> float:
        return (cost.error - high[cost.module].error) / max(extra(cost), 1e-9)

    chosen = []
    for cost in sorted(low, key=gain, reverse=True):
        if gain(cost) > 0 and extra(cost) <= left:
            left -= extra(cost)
            chosen.append(cost.module)
    return _allocation(low, precision, chosen, to, [])


def _down_to_target(
    captured: GraphModel, batches: list[Inputs], low: list[ModuleCost], high: dict[str, ModuleCost],
    precision: Precision, to: Precision, run: dict[str, str], goal: str, wanted: float,
) -> Allocation:  # fmt: skip
    images = joined(batches)
    if image_count(images) < 2:
        raise Qwt2Error("allocate: a target needs at least two calibration images to be measured on")
    exact = outputs_of(captured, images)
    by_low = [cost.module for cost in low]
    by_high = sorted(by_low, key=lambda name: -high[name].error)

    def attempt(moves: int) -> Allocation:
        floats = by_high[: max(0, moves - len(by_low))]
        found = _allocation(low, precision, by_low[:moves], to, floats)
        qmodel = quantize(captured, batches, **run, **found.settings)
        outputs = outputs_of(qmodel, images)
        return replace(found, **{goal: _MEASURES[goal](exact, outputs)})

    last = 2 * len(by_low) - 1  # one module has to be left to quantize
    return _smallest(attempt, goal, wanted, last)


def _smallest(attempt: Callable[[int], Allocation], goal: str, wanted: float, last: int) -> Allocation:
    """The attempt of fewest moves that reaches the target, by doubling and then bisection."""
    found = attempt(0)
    if getattr(found, goal) >= wanted:
        return found
    failed, moves = 0, 1
    while getattr(found := attempt(min(moves, last)), goal) < wanted:
        if moves >= last:
            raise Qwt2Error(
                f"allocate: {goal} reaches {getattr(found, goal):.1f} with all but one module in float, not {wanted}; ask for less"
            )
        failed, moves = moves, 2 * moves
    reached = min(moves, last)
    while reached - failed > 1:
        middle = (failed + reached) // 2
        other = attempt(middle)
        if getattr(other, goal) >= wanted:
            reached, found = middle, other
        else:
            failed = middle
    return found


def _sqnr_db(exact: list[Any], found: list[Any]) -> float:
    """Of the outputs' spread about their mean over the images, all outputs together."""
    pairs = [(e.double(), f.double()) for e, f in zip(exact, found) if isinstance(e, Tensor) and e.is_floating_point()]
    signal = sum(float((e - e.mean(0)).square().sum()) for e, _ in pairs)
    noise = sum(float((f - e).square().sum()) for e, f in pairs)
    return math.inf if noise <= 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def _agreement(exact: list[Any], found: list[Any]) -> float:
    """Percentage of images whose largest entry of the first output is the same."""
    return float((exact[0].argmax(-1) == found[0].argmax(-1)).double().mean()) * 100


_MEASURES: dict[str, Callable[[list[Any], list[Any]], float]] = {"sqnr_db": _sqnr_db, "agreement": _agreement}
