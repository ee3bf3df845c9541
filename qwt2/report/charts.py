"""The page's charts, as Vega-Lite specifications.

Text and rules take the page's own colour (`currentColor`), so one chart serves light, dark and print.
"""

from collections.abc import Iterable
from statistics import fmean
from typing import Any

import altair as alt

from qwt2.report.findings import ENGINE_NAMES
from qwt2.report.tables import COMPENSATION_NAMES, kind
from qwt2.results import Layer, Method, Results, Row, format_number, method_order, precision_order

# Told apart with any colour vision, and on light and dark grounds alike.
COLOURS = {"": "#d97706", "qwt": "#3b82f6", "cwac": "#0f9d76"}
OTHER_COLOUR = "#a855f7"
BEFORE_COLOUR = "#94a3b8"
HEIGHT = 240

Spec = dict[str, Any]


def accuracy(results: Results, model: str) -> Spec:
    """Top-1 of the simulation against bits, a line per method, bars of one standard deviation, fp32 dashed."""
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
    """Median latency of one batch, a bar for each precision and method."""
    title = f"{model}: latency on {ENGINE_NAMES.get(engine, engine)}"
    return _bars(results, model, engine, "latency_ms", title, "ms", 1)


def size(results: Results, model: str, engine: str) -> Spec:
    """Size of the ONNX file that `engine` runs, a bar for each precision and method."""
    return _bars(results, model, engine, "file_bytes", f"{model}: size of the ONNX file", "kB", 1000)


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


def layers(records: Iterable[Layer]) -> Spec:
    """SQNR of every module's output before and after compensation; model, precision and method are chosen."""
    values = _layer_points(records)
    chosen = [
        _choice("model", sorted({point["model"] for point in values}), start=0),
        # Start where there is something to see: at the fewest bits.
        _choice("precision", sorted({point["precision"] for point in values}, key=precision_order), start=-1),
        _choice("method", sorted({point["method"] for point in values}), start=0),
    ]
    base = (
        alt.Chart(alt.Data(values=values))
        .transform_filter(" && ".join(f"datum.{name} == chosen_{name}" for name in ("model", "precision", "method")))
        .encode(y=alt.Y("module:N", sort=None, title=None, axis=alt.Axis(labelLimit=220)))
    )
    tooltip = [
        alt.Tooltip("module:N"),
        *(alt.Tooltip(f"{name}:Q", title=f"SQNR {name}, dB", format=".2f") for name in ("before", "after")),
        alt.Tooltip("kept:N", title="kept by the gate"),
        *(alt.Tooltip(f"{name}:N") for name in ("alpha", "beta")),
    ]
    span = base.mark_rule(strokeWidth=2, opacity=0.5).encode(
        x=alt.X("before:Q", title="SQNR of the module's output, dB", scale=alt.Scale(zero=False)),
        x2="after:Q",
        color=alt.condition("datum.after >= datum.before", alt.value(COLOURS["cwac"]), alt.value("#dc2626")),
        tooltip=tooltip,
    )
    ends = base.transform_fold(["before", "after"], as_=["state", "sqnr"]).mark_point(filled=True, size=60, opacity=1)
    colours = alt.Scale(domain=["before", "after"], range=[BEFORE_COLOUR, COLOURS["cwac"]])
    legend = alt.Legend(title=None, orient="top")
    ends = ends.encode(x="sqnr:Q", color=alt.Color("state:N", scale=colours, legend=legend), tooltip=tooltip)
    chart = alt.layer(span, ends).resolve_scale(color="independent").add_params(*chosen)
    return _spec(chart, "SQNR of each module's output before and after compensation", height=alt.Step(17))


def _spec(chart: alt.LayerChart | alt.Chart, description: str, height: Any) -> Spec:
    return (
        chart.properties(
            width="container",
            height=height,
            description=description,
            background="transparent",
        )
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
            plain = results.get(model, precision, method.quantizer, "torch", "top1")
            points.append(
                {
                    "precision": precision,
                    "method": name,
                    "compensation": method.compensation,
                    "published": bool(method.variant),
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
    plain = results.get(row.model, row.precision, Method.parse(row.method).quantizer, row.engine, row.metric)
    return f"{row.value / plain.value:.3f}" if plain and plain.value else ""


def _precision_axis(results: Results, model: str) -> alt.X:
    return alt.X("precision:N", sort=results.precisions(model), title=None, axis=alt.Axis(labelAngle=0, grid=False))


def _compensation_colour(results: Results) -> alt.Color:
    others = sorted({Method.parse(row.method).compensation for row in results.rows} - set(COMPENSATION_NAMES))
    palette = COLOURS | dict.fromkeys(others, OTHER_COLOUR)
    return alt.Color("compensation:N", scale=alt.Scale(domain=list(palette), range=list(palette.values())), legend=None)


def _choice(name: str, options: list[str], start: int) -> alt.Parameter:
    return alt.param(f"chosen_{name}", bind=alt.binding_select(options=options, name=f"{name} "), value=options[start])


def _layer_points(records: Iterable[Layer]) -> list[dict[str, Any]]:
    """Means over seeds, in the order of the records."""
    groups: dict[tuple[str, ...], list[Layer]] = {}
    for record in records:
        groups.setdefault((record.model, record.precision, record.method, record.module), []).append(record)
    return [
        {
            "model": model,
            "precision": precision,
            "method": kind(method),
            "module": module,
            "before": round(fmean(layer.sqnr_before_db for layer in group), 3),
            "after": round(fmean(layer.sqnr_after_db for layer in group), 3),
            "kept": f"in {sum(layer.kept for layer in group)} of {len(group)} seeds",
            "alpha": _mean_text(layer.alpha_mean for layer in group),
            "beta": _mean_text(layer.beta_rms for layer in group),
        }
        for (model, precision, method, module), group in groups.items()
    ]


def _mean_text(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return format_number(fmean(known)) if known else ""
