"""One table per model: a row for each precision and method, a column for each engine and metric that was measured."""

from collections.abc import Callable
from typing import NamedTuple

from qwt2.report import compensations
from qwt2.report.findings import EASY_LOSS, ENGINE_DELTA, ENGINE_NAMES, HARD_LOSS, LATENCY_RATIO
from qwt2.report.results import UNITS, Method, Results, Row, format_number

NOT_MEASURED = "–"

# Heading and explanation of each metric.
HEADINGS = {
    "top1": ("top-1 %", "share of validation images classified correctly"),
    "top5": ("top-5 %", "share of validation images whose class is among the five best"),
    "bbox_ap": ("box AP", "COCO average precision of boxes"),
    "bbox_ap50": ("box AP50", "average precision of boxes at an overlap of one half"),
    "segm_ap": ("mask AP", "COCO average precision of masks"),
    "agreement": ("agree %", "share of validation images on which the network and its fp32 original agree"),
    "logits_sqnr_db": ("SQNR dB", "signal to quantization noise ratio of the logits, against fp32"),
    "engine_top1_delta": ("Δ sim", "top-1 of the engine minus top-1 of the simulation, points"),
    "engine_bbox_ap_delta": ("Δ sim", "box AP of the engine minus box AP of the simulation, points"),
    "engine_segm_ap_delta": ("Δ sim mask", "mask AP of the engine minus mask AP of the simulation, points"),
    "engine_mismatch_steps": ("steps", "largest difference from the simulation, in output quantization steps"),
    "engine_mismatch_fraction": ("differs", "share of output elements that differ from the simulation"),
    "latency_ms": ("ms", "latency of one batch, median"),
    "latency_ratio_to_ptq": ("× PTQ", "latency relative to plain PTQ, measured interleaved"),
    "latency_cpu_ms": ("CPU ms", "processor time of one batch, median"),
    "file_bytes": ("file kB", "size of the ONNX file that all engines run, in 1000 bytes"),
    "extra_params": ("+ params", "parameters the compensation adds to the deployed network"),
    "extra_macs": ("+ MACs", "multiply-accumulates the compensation adds for one image"),
    "compensate_seconds": ("fit s", "time to fit the compensation"),
    "peak_memory_mb": ("peak MB", "peak memory while fitting the compensation"),
}
# What the simulation says in place of an engine: how far folding moves a module.
FOLDING = {
    "engine_mismatch_steps": ("fold steps", "largest difference of a folded module from the unfolded, in output steps"),
    "engine_mismatch_fraction": ("fold differs", "share of a folded module's outputs that differ from the unfolded"),
}
_SECONDARY = {"top5", "bbox_ap50", "engine_segm_ap_delta", "engine_mismatch_fraction", "latency_cpu_ms", "peak_memory_mb"}
_SECONDARY_IN_SIMULATION = {"engine_mismatch_steps"}
_SECONDARY_ON_ENGINES = {"agreement", "logits_sqnr_db"}


class Column(NamedTuple):
    """A figure's column. `secondary` ones are hidden until asked for; `engine` groups the headings."""

    engine: str
    metric: str
    heading: str
    explanation: str
    secondary: bool


class Cell(NamedTuple):
    """A figure as shown, its exact value for sorting ('' if not measured), what it is, and how it is to be seen."""

    text: str
    value: str
    note: str
    spread: str = ""
    verdict: str = ""  # "", "good", "miss" or "none"


class Line(NamedTuple):
    precision: str
    method: str
    kind: str
    compensation: str
    cells: list[Cell]


class Table(NamedTuple):
    model: str
    groups: list[tuple[str, int, int]]  # heading, columns, of which secondary
    columns: list[Column]
    lines: list[Line]


def build(results: Results, model: str) -> Table:
    """The table of one model, from fp32 down to the fewest bits. Every figure of the model is in it once."""
    columns = _columns(results, model)
    lines = [
        _line(results, model, precision, method, columns)
        for precision in ("fp32", *results.precisions(model))
        for method in results.methods(model, precision)
    ]
    return Table(model, _groups(columns), columns, lines)


def kind(method: str) -> str:
    """What a method is, whichever PTQ it stands on: "PTQ + CWAC", "PTQ (published)", "fp32"."""
    if method == "fp32":
        return method
    parts = Method.parse(method)
    name = compensations.heading(parts.compensation)
    return name.replace("PTQ", f"PTQ ({parts.variant})") if parts.variant else name


def _columns(results: Results, model: str) -> list[Column]:
    present = {(row.engine, row.metric) for row in results.rows if row.model == model}
    columns = []
    for engine in results.engines(model):
        for metric in UNITS:
            if (engine, metric) in present:
                columns.append(_column(engine, metric, first_file=all(c.metric != "file_bytes" for c in columns)))
            if (engine, metric) == ("torch", "top1"):
                columns.append(_GAIN)
    return columns


def _column(engine: str, metric: str, first_file: bool) -> Column:
    simulated = engine == "torch"
    texts = FOLDING.get(metric, HEADINGS[metric]) if simulated else HEADINGS[metric]
    hidden = _SECONDARY | (_SECONDARY_IN_SIMULATION if simulated else _SECONDARY_ON_ENGINES)
    # All engines run one file: its size is shown beside the first.
    return Column(engine, metric, *texts, metric in hidden or (metric == "file_bytes" and not first_file))


# Derived, not a metric of the table: the simulation's top-1 minus that of the plain PTQ it stands on.
_GAIN = Column("torch", "gain", "Δ PTQ", "top-1 minus top-1 of the plain PTQ it stands on, points", False)


def _groups(columns: list[Column]) -> list[tuple[str, int, int]]:
    engines = dict.fromkeys(column.engine for column in columns)
    members = {engine: [column for column in columns if column.engine == engine] for engine in engines}
    return [
        (ENGINE_NAMES.get(engine, engine), len(of_engine), sum(column.secondary for column in of_engine))
        for engine, of_engine in members.items()
    ]


def _line(results: Results, model: str, precision: str, method: str, columns: list[Column]) -> Line:
    cells = [
        _gain_cell(results, model, precision, method)
        if column is _GAIN
        else _cell(results.get(model, precision, method, column.engine, column.metric))
        for column in columns
    ]
    compensation = "fp32" if method == "fp32" else Method.parse(method).compensation or "ptq"
    return Line(precision, method, kind(method), compensation, cells)


def _cell(row: Row | None) -> Cell:
    if row is None:
        return Cell(NOT_MEASURED, "", "not measured", verdict="none")
    value, std = format_number(row.value), format_number(row.std)
    note = f"{row.metric} {value} {row.unit}" + (f", std {std}" if std else "") + f", n = {row.n}"
    return Cell(_FORMATS[row.metric](row.value), value, note, _spread(row), "miss" if _misses(row) else "")


def _spread(row: Row) -> str:
    """The standard deviation for reading; only where seeds can differ."""
    if row.std is None or row.n < 2 or (row.std == 0 and row.unit != "percent"):
        return ""
    return "± " + _FORMATS[row.metric](row.std).lstrip("+")


def _misses(row: Row) -> bool:
    """Whether a figure misses the target set for it, where there is one."""
    method = Method.parse(row.method)
    if row.metric in ("engine_top1_delta", "engine_bbox_ap_delta"):
        return not method.variant and abs(row.value) > ENGINE_DELTA
    if row.metric == "latency_ratio_to_ptq":
        return method.compensation == compensations.SUBJECT and not LATENCY_RATIO[0] <= row.value <= LATENCY_RATIO[1]
    return False


def _gain_cell(results: Results, model: str, precision: str, method: str) -> Cell:
    parts = Method.parse(method)
    fp32 = results.fp32_top1(model)
    row, plain = (results.get(model, precision, name, "torch", "top1") for name in (method, parts.quantizer))
    if not parts.compensation or row is None or plain is None:
        return Cell("", "", "")
    gain = row.value - plain.value
    loss = fp32.value - plain.value if fp32 else 0.0
    verdict = "good" if gain > EASY_LOSS else "miss" if gain <= 0 and loss >= HARD_LOSS else ""
    return Cell(_signed(gain), format_number(gain), f"plain PTQ is {loss:.2f} points under fp32", verdict=verdict)


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # + 0.0: no negative zero


def _significant(value: float) -> str:
    """Three significant digits in plain decimals; whole numbers from 100 up."""
    return f"{value:#.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _compact(value: float) -> str:
    """A count in three digits: 640, 55.9 k, 3.58 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


_FORMATS: dict[str, Callable[[float], str]] = {
    **dict.fromkeys(("top1", "top5", "bbox_ap", "bbox_ap50", "segm_ap", "agreement"), "{:.2f}".format),
    "logits_sqnr_db": "{:.1f}".format,
    **dict.fromkeys(("engine_top1_delta", "engine_bbox_ap_delta", "engine_segm_ap_delta"), _signed),
    "engine_mismatch_steps": "{:.3g}".format,
    "engine_mismatch_fraction": "{:.2g}".format,
    "latency_ms": _significant,
    "latency_ratio_to_ptq": "{:.3f}".format,
    "latency_cpu_ms": _significant,
    "file_bytes": lambda value: f"{value / 1000:,.1f}",
    "extra_params": _compact,
    "extra_macs": _compact,
    "compensate_seconds": "{:.1f}".format,
    "peak_memory_mb": "{:,.0f}".format,
}
