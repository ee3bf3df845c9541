"""The per-module view: SQNR, alpha and beta, gate and engine mismatch of every module, as a chart and a table.

The page draws both (modules.js) from one compact table, for the model, precision and method that the reader chooses.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from qwt2.extras import extra
from qwt2.report import compensations
from qwt2.report.charts import BEFORE_COLOUR, Spec, to_spec
from qwt2.report.findings import ENGINE_NAMES
from qwt2.report.results import QUANTILES, Layer, method_order, precision_order
from qwt2.report.tables import kind

with extra("report"):
    import altair as alt

WORSE_COLOUR = "#dc2626"
ENGINE_COLOURS = ("#3b82f6", "#d97706", "#a855f7", "#0f9d76", "#64748b", "#db2777")
# modules.js replaces this placeholder by the names of the modules.
NAMES = ["MODULES"]


def table(layers: Sequence[Layer]) -> dict[str, Any]:
    """Return the data of the per-module view.

    beta is in percent of the root mean square of the module's output, so that modules are comparable.

    Args:
        layers: the per-module records.

    Returns:
        ``columns``, ``rows`` (means over seeds), ``engines`` and the ``choices`` of every select element.
    """
    engines = list(dict.fromkeys(engine for layer in layers for engine in layer.mismatch))
    groups: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.model, layer.precision, layer.method, layer.module), []).append(layer)
    records = [_record(group, engines) for group in groups.values()]
    columns = list(records[0]) if records else []
    methods = sorted({layer.method for layer in layers}, key=_where_to_start)
    return {
        "columns": columns,
        "rows": [list(record.values()) for record in records],
        "engines": [ENGINE_NAMES.get(engine, engine) for engine in engines],
        "choices": {
            "model": list(dict.fromkeys(layer.model for layer in layers)),
            # Fewest bits first, where the effects are largest.
            "precision": sorted({layer.precision for layer in layers}, key=precision_order, reverse=True),
            "method": list(dict.fromkeys(kind(method) for method in methods)),
        },
    }


def chart(engines: Sequence[str]) -> Spec:
    """Return a chart of panels with a row per module: SQNR, quantiles of alpha and of beta, engine mismatch."""
    panels = {
        "sqnr": _sqnr(),
        "alpha": _quantiles("alpha", "α over channels", reference=1.0),
        "beta": _quantiles("beta", "β over channels, % of output RMS", reference=0.0),
    }
    if engines:
        panels["steps"] = _steps(engines)
    named = [
        panel.properties(name=name, height=alt.Step(step=17, **{"for": "position"})) for name, panel in panels.items()
    ]
    return to_spec(
        alt.hconcat(*named, spacing=14).resolve_scale(color="independent", shape="independent"),
        "What quantization and compensation did to each module",
    )


def _where_to_start(method: str) -> tuple:
    return (compensations.SUBJECT not in method, method_order(method))


def _record(group: list[Layer], engines: Sequence[str]) -> dict[str, Any]:
    """Return one row of the table: means over seeds, and ``None`` for unknown values."""
    first, decided = group[0], [layer.kept for layer in group if layer.kept is not None]
    record: dict[str, Any] = {
        "model": first.model, "precision": first.precision, "method": kind(first.method), "module": first.module,
        "kind": first.kind,
        "before": _mean([layer.sqnr_before_db for layer in group]),
        "after": _mean([layer.sqnr_after_db for layer in group]),
        "kept": None if not decided else sum(decided) / len(decided),
        "gate": _gate(group, decided),
    }  # fmt: skip
    for name in ("alpha", "beta"):
        for suffix in QUANTILES:
            record[f"{name}_{suffix}"] = _mean([_scaled(layer, name, suffix) for layer in group])
    for engine in engines:
        mismatch = next((layer.mismatch[engine] for layer in group if engine in layer.mismatch), (None, None))
        label = ENGINE_NAMES.get(engine, engine)
        record[label], record[f"{label} differs"] = map(_rounded, mismatch)
    return record


def _scaled(layer: Layer, name: str, suffix: str) -> float | None:
    value, rms = layer.figures[f"{name}_{suffix}"], layer.figures["output_rms"]
    if value is None or name == "alpha":
        return value
    return 100 * value / rms if rms else None


def _gate(group: list[Layer], decided: list[bool]) -> str:
    """Return the decision of the gate: "kept", or "rejected" with the reasons."""
    if not decided:
        return ""
    if all(decided):
        return "kept"
    reasons = dict.fromkeys(layer.reason for layer in group if layer.reason)
    seeds = f" in {len(decided) - sum(decided)} of {len(decided)} seeds" if len(decided) > 1 else ""
    return f"rejected{seeds}" + (f" ({'; '.join(reasons)})" if reasons else "")


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _rounded(fmean(known)) if known else None


def _rounded(value: float | None) -> float | None:
    """Round to four significant digits; no figure here is more precise."""
    return None if value is None else float(f"{value:.4g}")


def _base() -> alt.Chart:
    axis = alt.Axis(labelLimit=230, grid=True, gridOpacity=0.08, ticks=False, domain=False)
    scale = alt.Scale(domain=NAMES, type="band", paddingInner=0, paddingOuter=0)  # rows of one height in every panel
    y = alt.Y("module:N", sort=None, title=None, axis=axis, scale=scale)
    return alt.Chart(alt.Data(name="modules")).encode(y=y)


def _sqnr() -> alt.LayerChart:
    tooltip = [
        alt.Tooltip("module:N"),
        *(alt.Tooltip(f"{name}:Q", title=f"SQNR {name}, dB", format=".2f") for name in ("before", "after")),
        alt.Tooltip("gate:N", title="gate"),
    ]
    better = compensations.colour(compensations.SUBJECT)
    x = alt.X("before:Q", title="SQNR of the output, dB", scale=alt.Scale(zero=False))
    span = (
        _base()
        .mark_rule(strokeWidth=2, opacity=0.5)
        .encode(
            x=x,
            x2="after:Q",
            tooltip=tooltip,
            color=alt.condition("datum.after >= datum.before", alt.value(better), alt.value(WORSE_COLOUR)),
        )
    )
    states = ["before", "after", "rejected by the gate"]
    colours = alt.Scale(domain=states, range=[BEFORE_COLOUR, better, WORSE_COLOUR])
    shapes = alt.Scale(domain=states, range=["circle", "circle", "cross"])
    legend = alt.Legend(title=None, orient="top")
    ends = (
        _base()
        .transform_fold(["before", "after"], as_=["end", "sqnr"])
        .transform_calculate(state="datum.end == 'after' && datum.kept === 0 ? 'rejected by the gate' : datum.end")
        .mark_point(filled=True, size=60, opacity=1)
        .encode(
            x="sqnr:Q",
            color=alt.Color("state:N", scale=colours, legend=legend),
            shape=alt.Shape("state:N", scale=shapes, legend=legend),
            tooltip=tooltip,
        )
    )
    return alt.layer(span, ends)


def _quantiles(name: str, title: str, reference: float) -> alt.LayerChart:
    fields = {suffix: f"{name}_{suffix}" for suffix in QUANTILES}
    tooltip = [
        alt.Tooltip("module:N"),
        *(alt.Tooltip(f"{f}:Q", title=f"{name} {s}", format=".4~g") for s, f in fields.items()),
    ]
    colour = compensations.colour(compensations.SUBJECT)
    x = alt.X(f"{fields['p05']}:Q", title=title, scale=alt.Scale(zero=False))
    whisker = _base().mark_rule(strokeWidth=1.5, color=colour).encode(x=x, x2=fields["p95"], tooltip=tooltip)
    box = (
        _base()
        .mark_bar(height=8, color=colour, opacity=0.55)
        .encode(x=fields["p25"] + ":Q", x2=fields["p75"], tooltip=tooltip)
    )
    median = _base().mark_tick(thickness=2.5, height=11, color=colour).encode(x=fields["p50"] + ":Q", tooltip=tooltip)
    return alt.layer(_reference(reference), whisker, box, median)


def _steps(engines: Sequence[str]) -> alt.LayerChart:
    tooltip = [
        alt.Tooltip("module:N"),
        *(alt.Tooltip(f"{name}:Q", title=f"{name}, steps", format=".3~g") for name in engines),
        *(alt.Tooltip(f"{name} differs:Q", title=f"{name}, share of elements", format=".2~g") for name in engines),
    ]
    colours = [ENGINE_COLOURS[number % len(ENGINE_COLOURS)] for number in range(len(engines))]
    scale = alt.Scale(domain=list(engines), range=colours)
    points = (
        _base()
        .transform_fold(list(engines), as_=["engine", "steps"])
        .mark_point(size=45, strokeWidth=2)
        .encode(
            x=alt.X("steps:Q", title="distance of the engine, output steps", scale=alt.Scale(zero=True)),
            yOffset=alt.YOffset("engine:N", scale=alt.Scale(paddingOuter=0.4)),
            color=alt.Color("engine:N", scale=scale, legend=alt.Legend(title=None, orient="top")),
            tooltip=tooltip,
        )
    )
    return alt.layer(_reference(1.0), points)


def _reference(value: float) -> alt.Chart:
    rule = alt.Chart(alt.Data(values=[{"at": value}])).mark_rule(strokeDash=[4, 4], color="currentColor", opacity=0.5)
    return rule.encode(x="at:Q")
