"""One table per model, with a row per precision and method and a column per measured engine and metric."""

from typing import NamedTuple

from qwt2.report import compensations
from qwt2.report.findings import EASY_LOSS, ENGINE_DELTA, ENGINE_NAMES, HARD_LOSS, LATENCY_RATIO
from qwt2.report.metrics import METRICS, signed
from qwt2.report.results import Method, Results, Row, format_number

NOT_MEASURED = "–"


class Column(NamedTuple):
    """A column of figures.

    Attributes:
        engine: name of the engine; headings are grouped by it.
        metric: name of the metric.
        heading: heading of the column.
        explanation: definition of the metric.
        secondary: whether the column is hidden by default.
    """

    engine: str
    metric: str
    heading: str
    explanation: str
    secondary: bool


class Cell(NamedTuple):
    """A figure in a table.

    Attributes:
        text: the figure as shown.
        value: the exact value for sorting; empty if it was not measured.
        note: metric, exact value, unit and number of measurements, for a tooltip.
        spread: the standard deviation as shown.
        verdict: the style of the cell.
    """

    text: str
    value: str
    note: str
    spread: str = ""
    verdict: str = ""  # "", "good", "miss" or "none"


class Line(NamedTuple):
    """The row of one method at one precision."""

    precision: str
    method: str
    kind: str
    compensation: str
    cells: list[Cell]


class Table(NamedTuple):
    """All figures of one model."""

    model: str
    groups: list[tuple[str, int, int]]  # heading, number of columns, number of secondary columns
    columns: list[Column]
    lines: list[Line]


def build(results: Results, model: str) -> Table:
    """Build the table of one model, from fp32 down to the fewest bits, with every figure of the model once."""
    columns = _columns(results, model)
    lines = [
        _line(results, model, precision, method, columns)
        for precision in ("fp32", *results.precisions(model))
        for method in results.methods(model, precision)
    ]
    return Table(model, _groups(columns), columns, lines)


def kind(method: str) -> str:
    """Return the kind of a method, whatever its PTQ method is: "PTQ + CWAC", "PTQ (published)" or "fp32"."""
    if method == "fp32":
        return method
    parts = Method.parse(method)
    name = compensations.heading(parts.compensation)
    return name.replace("PTQ", "PTQ (published)") if parts.is_published else name


def _columns(results: Results, model: str) -> list[Column]:
    present = {(row.engine, row.metric) for row in results.rows if row.model == model}
    columns: list[Column] = []
    for engine in results.engines(model):
        for metric in METRICS:
            if (engine, metric) in present:
                columns.append(_column(engine, metric, first_file=all(c.metric != "file_bytes" for c in columns)))
            if (engine, metric) == ("torch", "top1"):
                columns.append(_GAIN)
    return columns


def _column(engine: str, metric: str, first_file: bool) -> Column:
    simulated = engine == "torch"
    facts = METRICS[metric]
    # All engines run the same file, so that only the first engine shows its size by default.
    return Column(
        engine,
        metric,
        *facts.texts(simulated),
        facts.is_secondary(simulated) or (metric == "file_bytes" and not first_file),
    )


# A derived column that is not in METRICS: the simulation's top-1 minus the top-1 of the underlying plain PTQ.
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
    return Cell(METRICS[row.metric].shown(row.value), value, note, _spread(row), "miss" if _misses(row) else "")


def _spread(row: Row) -> str:
    """Return the standard deviation as shown; empty where seeds cannot differ."""
    if row.std is None or row.n < 2 or (row.std == 0 and row.unit != "percent"):
        return ""
    return "± " + METRICS[row.metric].shown(row.std).lstrip("+")


def _misses(row: Row) -> bool:
    """Return whether a figure has a target and misses it."""
    method = Method.parse(row.method)
    if row.metric in ("engine_top1_delta", "engine_bbox_ap_delta"):
        return not method.is_published and abs(row.value) > ENGINE_DELTA
    if row.metric == "latency_ratio_to_ptq":
        return method.compensation == compensations.SUBJECT and not LATENCY_RATIO[0] <= row.value <= LATENCY_RATIO[1]
    return False


def _gain_cell(results: Results, model: str, precision: str, method: str) -> Cell:
    parts = Method.parse(method)
    fp32 = results.fp32_top1(model)
    row, plain = (results.get(model, precision, name, "torch", "top1") for name in (method, parts.ptq))
    if not parts.compensation or row is None or plain is None:
        return Cell("", "", "")
    gain = row.value - plain.value
    loss = fp32.value - plain.value if fp32 else 0.0
    verdict = "good" if gain > EASY_LOSS else "miss" if gain <= 0 and loss >= HARD_LOSS else ""
    return Cell(signed(gain), format_number(gain), f"plain PTQ is {loss:.2f} points under fp32", verdict=verdict)
