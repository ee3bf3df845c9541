"""Findings from the table of figures: the comparison with plain PTQ, the targets and the headline."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from qwt2.report import metrics
from qwt2.report.compensations import SUBJECT, label
from qwt2.report.results import Method, Results, Row

ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
ENGINE_NAMES = {"torch": "Simulation", **ENGINES}
FP32_TOP1 = 90.0  # percent that a default model must reach before it is quantized
HARD_LOSS = metrics.HARD_LOSS["classification"]
EASY_LOSS = 0.5  # points of top-1 that plain PTQ may lose at 8 bits
ENGINE_DELTA = 0.3  # points of top-1 by which an engine may differ from the simulation
FOLD_STEPS, FOLD_FRACTION = 1, 1e-3  # by which folded and unfolded modules may differ: output steps, share of elements
LATENCY_RATIO = (0.98, 1.02)  # lowest and highest latency of folded models over plain PTQ
FILE_GROWTH = 0.01  # of the file's size; folding may only add biases to modules that had none


class Comparison(NamedTuple):
    """A compensated method beside the plain PTQ under it, at one model and precision.

    Attributes:
        model, precision, method: names of the cell and of the compensated method.
        fp32, ptq, compensated: top-1 in the simulation, in percent.
        ptq_sqnr_db, compensated_sqnr_db: SQNR of the logits, in dB.
    """

    model: str
    precision: str
    method: str
    fp32: Row
    ptq: Row
    compensated: Row
    ptq_sqnr_db: Row | None
    compensated_sqnr_db: Row | None

    @property
    def gain(self) -> float:
        """The points of top-1 gained over plain PTQ; negative if the compensation made it worse."""
        return self.compensated.value - self.ptq.value

    @property
    def ptq_loss(self) -> float:
        """The points of top-1 that plain PTQ loses against fp32."""
        return self.fp32.value - self.ptq.value

    @property
    def is_hard(self) -> bool:
        """Whether plain PTQ loses so much that compensation must help."""
        return self.ptq_loss >= HARD_LOSS

    @property
    def within_noise(self) -> bool:
        """Whether the difference is no larger than the larger standard deviation of the two figures."""
        return abs(self.gain) <= max(self.ptq.std or 0.0, self.compensated.std or 0.0)


class Target(NamedTuple):
    """A target for the figures.

    Attributes:
        statement: the target in words.
        met: whether the target is met; ``None`` if nothing was measured.
        evidence: the share of figures that meet it, or the precisions at which it is met.
        misses: the figures or cells that miss it.
    """

    statement: str
    met: bool | None
    evidence: str
    misses: list[str]


def comparisons(results: Results, compensation: str) -> list[Comparison]:
    """Return every cell in which a compensated method and the plain PTQ under it were both measured.

    Published PTQ methods, which run in simulation only, are left out.
    """
    return [
        found
        for model, precision, method in _cells(results)
        if Method.parse(method).compensation == compensation and not Method.parse(method).is_published
        if (found := _compare(results, model, precision, method)) is not None
    ]


def not_improved(compared: list[Comparison]) -> list[str]:
    """Return one text per cell whose mean top-1 the compensation did not raise, with the known reasons."""
    return [f"{_cell(item)}: {_top1_change(item)}. {_why(item)}" for item in compared if item.gain <= 0]


def headline(results: Results) -> list[str]:
    """Return the outcome in a few sentences, for the head of the page."""
    compared = comparisons(results, SUBJECT)
    sentences = [_gain_sentence(compared)] if compared else []
    sentences += [_cost_sentence(results)] if _folded(results, "latency_ratio_to_ptq") else []
    sentences += [_engine_sentence(results)] if _engine_deltas(results) else []
    return sentences


def model_sentence(results: Results, model: str) -> str:
    """Return a sentence on one model at the precision where plain PTQ loses most; empty if nothing was compared."""
    fp32 = results.fp32_top1(model)
    compared = [item for item in comparisons(results, SUBJECT) if item.model == model]
    if fp32 is None or not compared:
        return ""
    worst = max(compared, key=lambda item: item.ptq_loss)
    methods = [
        f"{worst.ptq.value:.1f} with {worst.ptq.method}",
        *(
            f"{item.compensated.value:.1f} with {label(name)}"
            for name in results.compensations
            if name not in ("", SUBJECT)
            for item in _same_cell(results, worst, name)
        ),
        f"{worst.compensated.value:.1f} with {label(SUBJECT)}",
    ]
    return f"fp32 reaches {fp32.value:.1f} % top-1. Hardest precision is {worst.precision}: {', '.join(methods)}."


def targets(results: Results) -> list[Target]:
    """Return the targets of the default benchmark, each with the cells that miss it."""
    return [check(results) for check in _TARGETS]


def _fp32_target(results: Results) -> Target:
    rows = [row for model in results.models if (row := results.fp32_top1(model))]
    return target(
        f"Every model reaches {FP32_TOP1:.0f} % top-1 before quantization",
        rows,
        lambda row: row.value >= FP32_TOP1,
        lambda row: f"{row.model} {row.value:.1f} %",
    )


def _hard_target(results: Results) -> Target:
    statement = f"At one precision at least, plain PTQ loses {HARD_LOSS:.0f} points or more on every model"
    return _some_precision(results, statement, lambda item: item.ptq_loss >= HARD_LOSS)


def _easy_target(results: Results) -> Target:
    statement = f"At one precision at least, plain PTQ loses under {EASY_LOSS} points on every model"
    return _some_precision(results, statement, lambda item: item.ptq_loss < EASY_LOSS)


def _gain_target(results: Results) -> Target:
    return target(
        f"{label(SUBJECT)} raises mean top-1 wherever plain PTQ loses {HARD_LOSS:.0f} points or more",
        [item for item in comparisons(results, SUBJECT) if item.is_hard],
        lambda item: item.gain > 0,
        lambda item: f"{_cell(item)} {_top1_change(item)}",
    )


def _engine_target(results: Results) -> Target:
    return target(
        f"Engine top-1 is within {ENGINE_DELTA} points of the simulation",
        _engine_deltas(results),
        lambda row: abs(row.value) <= ENGINE_DELTA,
        lambda row: f"{row.model}-{row.precision} {row.method} on {row.engine} {row.value:+.2f}",
    )


def _fold_target(results: Results) -> Target:
    limits = {"engine_mismatch_steps": FOLD_STEPS, "engine_mismatch_fraction": FOLD_FRACTION}
    return target(
        f"Folding moves a module's output by at most {FOLD_STEPS} step, on at most {FOLD_FRACTION:g} of its elements",
        [row for metric in limits for row in _folding(results, metric)],
        lambda row: row.value <= limits[row.metric],
        lambda row: f"{row.model}-{row.precision} {row.value:.2g} {'steps' if row.unit == 'steps' else 'of elements'}",
    )


def _latency_target(results: Results) -> Target:
    low, high = LATENCY_RATIO
    return target(
        f"Latency of folded {label(SUBJECT)} over plain PTQ is {low}-{high}",
        _folded(results, "latency_ratio_to_ptq"),
        lambda row: low <= row.value <= high,
        lambda row: f"{row.model}-{row.precision} on {row.engine} {row.value:.3f}",
    )


def _size_target(results: Results) -> Target:
    return target(
        f"Folding changes the file by stored biases only (under {FILE_GROWTH:.0%})",
        _file_growth(results),
        lambda pair: abs(pair[1]) < FILE_GROWTH,
        lambda pair: f"{pair[0].model}-{pair[0].precision} {pair[1]:+.2%}",
    )


_TARGETS = (
    *(_fp32_target, _hard_target, _easy_target, _gain_target),
    *(_fold_target, _engine_target, _latency_target, _size_target),
)


def target(statement: str, items: list, meets: Callable, describe: Callable) -> Target:
    """Return the target that every item meets.

    Args:
        statement: the target in words.
        items: the measured items.
        meets: whether an item meets the target.
        describe: the name of an item that misses it.
    """
    if not items:
        return Target(statement, None, "not measured", [])
    misses = [describe(item) for item in items if not meets(item)]
    return Target(statement, not misses, f"{len(items) - len(misses)} of {len(items)} figures", misses)


def _some_precision(results: Results, statement: str, meets: Callable[[Comparison], bool]) -> Target:
    compared = comparisons(results, SUBJECT)
    if not compared:
        return Target(statement, None, "not measured", [])
    models: dict[str, set[str]] = {item.precision: set() for item in compared}
    for item in compared:
        if meets(item):
            models[item.precision].add(item.model)
    found = [precision for precision, names in models.items() if names >= set(results.models)]
    misses = [f"{precision} only on {', '.join(sorted(names)) or 'none'}" for precision, names in models.items()]
    return Target(statement, bool(found), ", ".join(found) or "none", [] if found else misses)


def _gain_sentence(compared: list[Comparison]) -> str:
    hard = [item for item in compared if item.is_hard]
    if not hard:
        return (
            f"Plain PTQ loses {HARD_LOSS:.0f} points of top-1 nowhere, "
            f"so there is little for {label(SUBJECT)} to recover."
        )
    gained = [item for item in hard if item.gain > 0]
    mean = sum(item.gain for item in hard) / len(hard)
    best = max(hard, key=lambda item: item.gain)
    return (
        f"{label(SUBJECT)} raises top-1 in {len(gained)} of the {len(hard)} cells where plain PTQ loses "
        f"{HARD_LOSS:.0f} points or more, by {mean:.1f} points on average; "
        f"most on {_cell(best)}: {_top1_change(best)}."
    )


def _cost_sentence(results: Results) -> str:
    ratios = [row.value for row in _folded(results, "latency_ratio_to_ptq")]
    growth = [change for _, change in _file_growth(results)]
    size = f" and changes the file's size by {_range(growth, '{:+.2%}')}" if growth else ""
    return f"Folded into the integer model it takes {_range(ratios, '{:.3f}')} times plain PTQ's latency{size}."


def _engine_sentence(results: Results) -> str:
    deltas = _engine_deltas(results)
    largest = max(deltas, key=lambda row: abs(row.value))
    return (
        f"On the integer engines ({_engine_names(deltas)}) top-1 differs from the simulation by at most "
        f"{abs(largest.value):.2f} points, over {len(deltas)} cells."
    )


def _engine_names(rows: list[Row]) -> str:
    return " and ".join(ENGINE_NAMES.get(name, name) for name in sorted({row.engine for row in rows}))


def _range(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _compare(results: Results, model: str, precision: str, method: str) -> Comparison | None:
    plain = Method.parse(method).ptq
    fp32 = results.fp32_top1(model)
    ptq, compensated = (results.get(model, precision, name, "torch", "top1") for name in (plain, method))
    if fp32 is None or ptq is None or compensated is None:
        return None
    sqnr = (results.get(model, precision, name, "torch", "logits_sqnr_db") for name in (plain, method))
    return Comparison(model, precision, method, fp32, ptq, compensated, *sqnr)


def _same_cell(results: Results, other: Comparison, compensation: str) -> list[Comparison]:
    return [
        item
        for item in comparisons(results, compensation)
        if (item.model, item.precision, item.ptq.method) == (other.model, other.precision, other.ptq.method)
    ]


def _cells(results: Results) -> Iterator[tuple[str, str, str]]:
    """Yield every quantized (model, precision, method) of the table, in display order."""
    for model in results.models:
        for precision in results.precisions(model):
            for method in results.methods(model, precision):
                yield model, precision, method


def _engine_deltas(results: Results) -> list[Row]:
    """Return the differences of engines from the simulation, for the methods that are meant to be exported."""
    deltas = [row for row in results.rows if row.metric == "engine_top1_delta"]
    return [row for row in deltas if not Method.parse(row.method).is_published]


def _folded(results: Results, metric: str) -> list[Row]:
    """Return the figures of the benchmark's subject on the integer engines, where it is folded."""
    return [row for row in _of_subject(results, metric) if row.engine != "torch"]


def _folding(results: Results, metric: str) -> list[Row]:
    """Return the differences of the subject's folded from its unfolded modules, which the simulation's rows hold."""
    return [row for row in _of_subject(results, metric) if row.engine == "torch"]


def _of_subject(results: Results, metric: str) -> list[Row]:
    return [row for row in results.rows if row.metric == metric and Method.parse(row.method).compensation == SUBJECT]


def _file_growth(results: Results) -> list[tuple[Row, float]]:
    """Return each folded file with its relative growth over plain PTQ's file."""
    pairs = []
    for row in (row for row in results.rows if row.metric == "file_bytes"):
        method = Method.parse(row.method)
        plain = results.get(row.model, row.precision, method.ptq, row.engine, "file_bytes")
        if method.compensation == SUBJECT and plain is not None:
            pairs.append((row, row.value / plain.value - 1))
    return pairs


def _cell(item: Comparison) -> str:
    return f"{item.model}-{item.precision}"


def _top1_change(item: Comparison) -> str:
    return f"{item.ptq.value:.2f} to {item.compensated.value:.2f} % ({item.gain:+.2f})"


def _why(item: Comparison) -> str:
    reasons = []
    if item.ptq_loss < EASY_LOSS:
        lost = f"only {item.ptq_loss:.2f} points" if item.ptq_loss > 0 else "nothing"
        reasons.append(f"plain PTQ loses {lost} here, so there is nothing to recover")
    if item.within_noise:
        reasons.append("the difference is within one standard deviation over the calibration seeds")
    if item.ptq_sqnr_db is not None and item.compensated_sqnr_db is not None:
        before, after = item.ptq_sqnr_db.value, item.compensated_sqnr_db.value
        reasons.append(f"the logits' SQNR goes from {before:.1f} to {after:.1f} dB")
    sentence = "; ".join(reasons)
    return sentence[:1].upper() + sentence[1:] + "." if sentence else ""
