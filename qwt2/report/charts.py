"""The page's charts as Vega-Lite specifications.

Text and rules take the page's colour (``currentColor``), so that one chart fits light, dark and print styles.
"""

from collections.abc import Sequence
from typing import Any

from qwt2.extras import extra
from qwt2.report import compensations
from qwt2.report.findings import ENGINE_NAMES
from qwt2.report.recovery import Line
from qwt2.report.results import Method, Results, Row, method_order

with extra("report"):
    import altair as alt

BEFORE_COLOUR = "#94a3b8"
HEIGHT = 240

Spec = dict[str, Any]


def accuracy(results: Results, model: str) -> Spec:
    """Plot top-1 of the simulation against bits: a line per method, bars of one standard deviation, fp32 dashed."""
    base = alt.Chart(alt.Data(values=_accuracy_points(results, model))).encode(
        x=_precision_axis(results, model),
        color=_compensation_colour(results),
        detail="method:N",
    )
    top1 = alt.Y("top1:Q", title="top-1 %", scale=alt.Scale(zero=False))
    tooltip = [alt.Tooltip(f"{name}:N") for name in ("precision", "method", "shown", "gain")]
    dash = alt.StrokeDash("published:N", legend=None, scale=alt.Scale(domain=[False, True], range=[[1, 0], [3, 3]]))
    lines = base.mark_line(strokeWidth=2).encode(y=top1, strokeDash=dash)
    bars = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", title="top-1 %"), y2="high:Q")
    points = base.mark_point(filled=True, size=55, opacity=1).encode(y=top1, tooltip=tooltip)
    chart = alt.layer(*_fp32_rule(results, model), lines, bars, points)
    return _spec(chart, f"Top-1 of {model} against precision, a line per method", height=HEIGHT)


def latency(results: Results, model: str, engine: str) -> Spec:
    """Plot the median latency of one batch in milliseconds, with a bar per precision and method."""
    title = f"{model}: latency on {ENGINE_NAMES.get(engine, engine)}"
    return _bars(results, model, engine, "latency_ms", title, "ms", 1)


def size(results: Results, model: str, engine: str) -> Spec:
    """Plot the size in kB of the ONNX file that ``engine`` runs, with a bar per precision and method."""
    return _bars(results, model, engine, "file_bytes", f"{model}: size of the ONNX file", "kB", 1000)


def recovery(found: Sequence[Line]) -> Spec:
    """Plot the recovered share of plain PTQ's loss against seconds of calibration; free methods are circles."""
    hard = [line for line in found if line.recovered is not None]
    values = [
        {
            "cell": f"{line.place} {line.measured.group}".strip(), "method": line.measured.name,
            "compensation": line.measured.compensation, "seconds": line.measured.seconds,
            "recovered": 100 * line.recovered, "latency": "free" if line.measured.free else "adds latency",
            "gain": str(line.gain),
        }
        for line in hard
        if line.recovered is not None
    ]  # fmt: skip
    names = compensations.shown({line.measured.compensation for line in hard})
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_point(size=70, strokeWidth=2, opacity=0.9)
        .encode(
            x=alt.X("seconds:Q", title="seconds of calibration", scale=alt.Scale(type="log")),
            y=alt.Y("recovered:Q", title="recovered, %"),
            color=alt.Color(
                "compensation:N", legend=None, scale=alt.Scale(domain=names, range=[*map(compensations.colour, names)])
            ),
            shape=alt.Shape(
                "latency:N", title=None, scale=alt.Scale(domain=["free", "adds latency"], range=["circle", "cross"])
            ),
            tooltip=[
                *(alt.Tooltip(f"{name}:N") for name in ("cell", "method", "gain", "latency")),
                *(alt.Tooltip(f"{name}:Q", format=".3~g") for name in ("recovered", "seconds")),
            ],
        )
    )
    return _spec(chart, "Share of plain PTQ's loss that is recovered, against seconds of calibration", height=320)


def _bars(results: Results, model: str, engine: str, metric: str, title: str, unit: str, per_unit: float) -> Spec:
    rows = [row for row in results.rows if (row.model, row.engine, row.metric) == (model, engine, metric)]
    values = [
        {
            "precision": row.precision,
            "method": row.method,
            "compensation": Method.parse(row.method).compensation,
            "value": row.value / per_unit,
            "ratio": _ratio_to_ptq(results, row),
        }
        for row in rows
    ]
    methods = sorted({row.method for row in rows}, key=method_order)
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_bar()
        .encode(
            x=_precision_axis(results, model),
            xOffset=alt.XOffset("method:N", sort=methods),
            y=alt.Y("value:Q", title=unit),
            color=_compensation_colour(results),
            tooltip=[
                *(alt.Tooltip(f"{name}:N") for name in ("precision", "method")),
                alt.Tooltip("value:Q", title=unit, format=",.4~g"),
                alt.Tooltip("ratio:N", title="× PTQ"),
            ],
        )
    )
    return _spec(chart, title, height=180)


def _spec(chart: alt.LayerChart | alt.Chart, description: str, height: Any) -> Spec:
    return to_spec(chart.properties(width="container", height=height), description)


def to_spec(chart: alt.TopLevelMixin, description: str) -> Spec:
    """Return the specification of a chart in the page's style."""
    return (
        chart.properties(description=description, background="transparent")
        .configure(font="system-ui, sans-serif")
        .configure_view(stroke=None)
        .configure_axis(
            **dict.fromkeys(("labelColor", "titleColor", "gridColor", "domainColor", "tickColor"), "currentColor"),
            **dict.fromkeys(("domainOpacity", "tickOpacity"), 0.4),
            gridOpacity=0.12,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
        )
        .configure_legend(labelColor="currentColor", labelFontSize=12)
        .to_dict()
    )


def _accuracy_points(results: Results, model: str) -> list[dict[str, Any]]:
    points = []
    for precision in results.precisions(model):
        for name in results.methods(model, precision):
            row = results.get(model, precision, name, "torch", "top1")
            if row is None:
                continue
            method = Method.parse(name)
            std = row.std or 0.0
            plain = results.get(model, precision, method.ptq, "torch", "top1")
            points.append(
                {
                    "precision": precision,
                    "method": name,
                    "compensation": method.compensation,
                    "published": method.is_published,
                    "top1": row.value,
                    "low": row.value - std,
                    "high": row.value + std,
                    "shown": f"{row.value:.2f} ± {std:.2f} % (n = {row.n})",
                    "gain": f"{row.value - plain.value:+.2f} over PTQ" if plain and method.compensation else "",
                }
            )
    return points


def _fp32_rule(results: Results, model: str) -> list[alt.Chart]:
    fp32 = results.fp32_top1(model)
    if fp32 is None:
        return []
    data = alt.Data(values=[{"fp32": fp32.value, "shown": f"fp32 {fp32.value:.2f} %"}])
    rule = alt.Chart(data).mark_rule(strokeDash=[6, 4], color="currentColor", opacity=0.7)
    return [rule.encode(y=alt.Y("fp32:Q", title="top-1 %"), tooltip=alt.Tooltip("shown:N"))]


def _ratio_to_ptq(results: Results, row: Row) -> str:
    plain = results.get(row.model, row.precision, Method.parse(row.method).ptq, row.engine, row.metric)
    return f"{row.value / plain.value:.3f}" if plain and plain.value else ""


def _precision_axis(results: Results, model: str) -> alt.X:
    return alt.X("precision:N", sort=results.precisions(model), title=None, axis=alt.Axis(labelAngle=0, grid=False))


def _compensation_colour(results: Results) -> alt.Color:
    names = compensations.shown(results.compensations)
    colours = [compensations.colour(name) for name in names]
    return alt.Color("compensation:N", scale=alt.Scale(domain=names, range=colours), legend=None)
