"""The dashboard's plots: a panel per model, and a colour per compensation in all of them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from qwt2.report import compensations
from qwt2.report.results import Method, method_order, precision_order

Row = Mapping[str, Any]
COLUMNS = 3  # panels side by side
PANEL_HEIGHT, MARGIN = 250, 110  # pixels
FP32, REFERENCE = "fp32", "qwt"
FP32_COLOUR, FRONT_COLOUR = "#64748b", "#94a3b8"
# A model's PTQ methods take these in turn; methods under the papers' own settings are hollow.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


def against_bits(rows: Iterable[Row], title: str) -> go.Figure:
    """Plot simulated accuracy by precision, from many bits to few."""
    rows = _measured(rows, "precision", "accuracy")
    figure, places = _panels(rows, title)
    for model, place in places.items():
        _points(figure, place, [row for row in rows if row["model"] == model], "precision", "accuracy")
    return _by_precision(figure, rows)


def against_latency(rows: Iterable[Row], x: str, y: str, x_title: str, title: str) -> go.Figure:
    """Plot accuracy on an engine against latency; a line joins the runs that no other run beats in both."""
    rows = _measured(rows, x, y)
    figure, places = _panels(rows, title)
    for number, (model, place) in enumerate(places.items()):
        own = [row for row in rows if row["model"] == model]
        front = pareto_front([(row[x], row[y]) for row in own])
        figure.add_scatter(
            x=[point[0] for point in front], y=[point[1] for point in front], mode="lines", name="Pareto front",
            legendgroup="front", showlegend=number == 0, hoverinfo="skip",
            line={"color": FRONT_COLOUR, "dash": "dot", "width": 1.5}, **place,
        )  # fmt: skip
        _points(figure, place, own, x, y)
    figure.update_xaxes(title={"text": x_title, "font": {"size": 11}})
    return figure


def gains_on_qwt(rows: Iterable[Row], title: str) -> go.Figure:
    """Plot every method's accuracy minus that of QwT under the same conditions, by precision; QwT is the zero line."""
    rows = gains(_measured(rows, "precision", "accuracy"))
    figure, places = _panels(rows, title)
    for model, place in places.items():
        _points(figure, place, [row for row in rows if row["model"] == model], "precision", "gain_on_qwt")
    if places:
        figure.add_hline(y=0, line={"color": compensations.colour(REFERENCE), "width": 1})
    return _by_precision(figure, rows)


def gains(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the runs that are not QwT's but have a run of QwT to compare with, each with its ``gain_on_qwt``.

    Compared are runs of the same model, precision, PTQ method, seeds and number of images. If several runs of QwT have
    these, because they differ in other settings, the gain is on their mean.
    """
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        key = (row["model"], row["precision"], Method.parse(row["method"]).ptq, row["seeds"], row["images"])
        groups[key].append(row)
    found = []
    for members in groups.values():
        qwt = [row["accuracy"] for row in members if Method.parse(row["method"]).compensation == REFERENCE]
        others = [row for row in members if Method.parse(row["method"]).compensation != REFERENCE]
        if qwt:
            found += [{**row, "gain_on_qwt": row["accuracy"] - sum(qwt) / len(qwt)} for row in others]
    return found


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (latency, accuracy) points that no other point beats in one without losing in the other, in order."""
    front: list[tuple[float, float]] = []
    for latency, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((latency, accuracy))
    return front


def _measured(rows: Iterable[Row], *fields: str) -> list[Row]:
    return [row for row in rows if all(row[field] is not None for field in fields)]


def _panels(rows: Sequence[Row], title: str) -> tuple[go.Figure, dict[str, dict[str, int]]]:
    """Return an empty figure with a panel per model, and each model's place in it."""
    models = sorted({row["model"] for row in rows})
    columns = min(COLUMNS, len(models)) or 1
    lines = -(-len(models) // columns) or 1
    figure = make_subplots(lines, columns, subplot_titles=models or None, vertical_spacing=0.24 / lines)
    figure.update_layout(
        height=lines * PANEL_HEIGHT + MARGIN, margin={"t": 60, "b": 40, "r": 10},
        legend={"orientation": "h", "y": 1 + 40 / (lines * PANEL_HEIGHT), "yanchor": "bottom"},
    )  # fmt: skip
    figure.update_yaxes(title={"text": title, "font": {"size": 11}}, col=1)
    return figure, {model: {"row": i // columns + 1, "col": i % columns + 1} for i, model in enumerate(models)}


def _points(figure: go.Figure, place: Mapping[str, int], rows: Sequence[Row], x: str, y: str) -> None:
    """Add one model's runs to its panel."""
    methods: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        methods[row["method"]].append(row)
    ptqs = sorted({_base(method) for method in methods} - {FP32})
    for method in sorted(methods, key=method_order):
        members = methods[method]
        name = _title(method)
        first = all(trace.legendgroup != name for trace in figure.data)
        texts = [f"{row['model']} {row['precision']} {method}<br>{row['sweeps']}" for row in members]
        figure.add_scatter(
            x=[row[x] for row in members], y=[row[y] for row in members], mode="markers", name=name, legendgroup=name,
            showlegend=first, text=texts,
            marker={"color": _colour(method), "symbol": _symbol(method, ptqs), "size": 8}, **place,
        )  # fmt: skip


def _base(method: str) -> str:
    return Method.parse(method).ptq.removesuffix("_published")


def _title(method: str) -> str:
    parts = Method.parse(method)
    name = method if method == FP32 else compensations.heading(parts.compensation)
    return f"{name}, papers' settings" if parts.is_published else name


def _colour(method: str) -> str:
    return FP32_COLOUR if method == FP32 else compensations.colour(Method.parse(method).compensation)


def _symbol(method: str, ptqs: Sequence[str]) -> str:
    symbol = SYMBOLS[ptqs.index(_base(method)) % len(SYMBOLS)] if _base(method) in ptqs else "line-ew-open"
    return f"{symbol}-open" if Method.parse(method).is_published else symbol


def _by_precision(figure: go.Figure, rows: Iterable[Row]) -> go.Figure:
    order = sorted({row["precision"] for row in rows}, key=precision_order)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=order)
    return figure
