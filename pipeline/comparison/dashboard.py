"""Command: serve a page on this machine that compares the runs of the grid and of all sweeps (make dashboard).

The page is served on loopback only, loads nothing from elsewhere and sends nothing anywhere. Reload it to see new runs.
"""

import argparse
import hashlib
import logging
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dash_ag_grid as dag
import yaml
from dash import Dash, Input, Output, State, dcc, html
from dash.exceptions import PreventUpdate
from flask import Response, abort, request

from pipeline.comparison import plots
from pipeline.comparison.runs import Run, all_runs
from qwt2.errors import Qwt2Error, guarded
from qwt2.report.findings import ENGINES
from qwt2.report.results import format_number

HOST = "127.0.0.1"
# Column -> the figure's name in a run, and the heading. `gain` is the difference to plain PTQ, and {accuracy} stands
# for the task's main metric.
FIGURES = {
    "accuracy": ("torch/{accuracy}", "top-1 or box AP %"),
    "segm_ap": ("torch/segm_ap", "mask AP %"),
    "gain": (None, "gain on PTQ"),
    "agreement": ("torch/agreement", "agree %"),
    "sqnr": ("torch/logits_sqnr_db", "SQNR dB"),
    **{f"{engine}_accuracy": (engine + "/{accuracy}", f"{name} accuracy") for engine, name in ENGINES.items()},
    **{f"{engine}_ms": (f"{engine}/latency_ms", f"{name} ms") for engine, name in ENGINES.items()},
    **{f"{engine}_ratio": (f"{engine}/latency_ratio_to_ptq", f"{name} ÷ PTQ") for engine, name in ENGINES.items()},
    "bytes": ("onnxruntime/file_bytes", "bytes"),
}
GRAPH = {"displayModeBar": False}
# Files that Dash would request only after the layout has arrived, among them its largest. Listing them as scripts lets
# the browser load them earlier.
EARLY = ("plotly/package_data/plotly.min.js", "dash/dcc/async-graph.js", "dash_ag_grid/async-community.js")


def main(arguments: list[str] | None = None) -> None:
    """Serve the dashboard until it is interrupted.

    Raises:
        Qwt2Error: there are no results, or the port cannot be used.
    """
    options = _parser().parse_args(arguments)
    all_runs()  # raises if there are none, before anything is served
    _check_port(options.port)
    app = make_app()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    print(f"http://{HOST}:{options.port}/ (Ctrl-C ends it)", flush=True)
    app.run(host=HOST, port=options.port, debug=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.comparison.dashboard", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--port", type=int, default=8050)
    return parser


def _check_port(port: int) -> None:
    if not 0 < port < 65536:
        raise Qwt2Error(f"--port is {port}; use a number from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise Qwt2Error(f"port {port} cannot be used ({error.strerror}); choose another with --port") from error


def make_app() -> Dash:
    """Make the app. It reads the runs again whenever the page is loaded."""
    app = Dash(
        "qwt2", title="qwt2 runs", assets_folder=str(Path(__file__).parent / "assets"), serve_locally=True,
        update_title=None, enable_mcp=False,
        external_scripts=[{"src": f"/_dash-component-suites/{path}", "defer": "defer"} for path in EARLY],
    )  # fmt: skip
    runs: dict[str, Run] = {}

    def layout() -> html.Div:
        found = all_runs()
        runs.clear()
        runs.update({run.id: run for run in found})
        return page(found)

    # Without this, Dash sends the browser the rows twice, once of them only to check the callbacks.
    app.validation_layout = page([])
    app.layout = layout

    @app.callback(
        Output("bits", "figure"), Output("latency", "figure"), Output("gains", "figure"),
        Output("count", "children"), Output("drawn", "data"),
        Input("runs", "virtualRowData"), Input("engine", "value"), State("drawn", "data"),
        prevent_initial_call=True,
    )  # fmt: skip
    def draw(shown: list[dict[str, Any]] | None, engine: str, drawn: str) -> tuple[Any, ...]:
        rows = shown or []
        if (asked := drawing(rows, engine)) == drawn:  # just loaded, or only sorted
            raise PreventUpdate
        return *figures(rows, engine), f"{len(rows)} runs", asked

    @app.callback(Output("comparison", "children"), Input("runs", "selectedRows"))
    def compare(selected: list[dict[str, Any]] | None) -> Any:
        picked = [runs[row["id"]] for row in selected or [] if row["id"] in runs]
        if len(picked) != 2:
            return html.P(f"Tick two runs to compare them ({len(picked)} ticked).", className="hint")
        return comparison(*picked)

    @app.server.before_request
    def only_here() -> None:
        """Refuse requests under another host name, with which a foreign page could read this one (DNS rebinding)."""
        if urlsplit(request.host_url).hostname not in (HOST, "localhost"):
            abort(403)

    @app.server.route("/config/<run_id>")
    def config(run_id: str) -> Response:
        if run_id not in runs:
            abort(404)
        return Response(config_text(runs[run_id]), mimetype="text/plain")

    return app


def page(runs: Sequence[Run]) -> html.Div:
    """Make the page's layout: the table, three plots, and the comparison of two runs."""
    rows = [table_row(run) for run in runs]
    engines = [{"label": name, "value": engine} for engine, name in ENGINES.items()]
    engine = next(iter(ENGINES))
    bits, latency, gains = (
        dcc.Graph(id=name, figure=figure, config=GRAPH)
        for name, figure in zip(("bits", "latency", "gains"), figures(rows, engine))
    )
    return html.Div([
        dcc.Store(id="drawn", data=drawing(rows, engine)),
        html.H1("qwt2: all runs"),
        html.P(["Filter below a heading, sort by clicking on it, tick two runs to compare them. ",
                html.Span(f"{len(rows)} runs", id="count")], className="hint"),
        table(rows),
        html.H2("Accuracy against bits"), bits,
        html.H2("Accuracy against latency"), dcc.RadioItems(engines, engine, id="engine", inline=True), latency,
        html.H2("Gain on QwT, points"),
        html.P("Accuracy minus that of QwT with the same model, bits, PTQ method, seeds and images.", className="hint"),
        gains,
        html.H2("Two runs side by side"),
        html.Div(id="comparison"),
    ])  # fmt: skip


def figures(rows: Sequence[Mapping[str, Any]], engine: str) -> tuple[Any, Any, Any]:
    """Draw the three plots of these runs."""
    accuracy = FIGURES["accuracy"][1]
    return (
        plots.against_bits(rows, accuracy),
        plots.against_latency(rows, f"{engine}_ms", f"{engine}_accuracy", f"{ENGINES[engine]}, ms", accuracy),
        plots.gains_on_qwt(rows, "points"),
    )


def drawing(rows: Iterable[Mapping[str, Any]], engine: str) -> str:
    """Return a hash that identifies the plots of these runs, in any order, on this engine."""
    return hashlib.sha256("\0".join([engine, *sorted(row["id"] for row in rows)]).encode()).hexdigest()


def table_row(run: Run) -> dict[str, Any]:
    """Return a run as a row of the table."""
    row = {
        "id": run.id, "sweeps": ", ".join(run.sweeps), "model": run.model, "precision": run.precision,
        "method": run.method, "seeds": ", ".join(map(str, run.config.get("seeds", []))),
        "images": run.config.get("calibration", {}).get("images"), "status": run.status, "error": run.error,
        "config": f"[config](/config/{run.id})",
    }  # fmt: skip
    for column, (name, _) in FIGURES.items():
        row[column] = run.figures.get(name.format(accuracy=run.headline)) if name else None
    simulated = f"torch/{run.headline}"
    if simulated in run.figures and simulated in run.ptq:
        row["gain"] = run.figures[simulated] - run.ptq[simulated]
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> dag.AgGrid:
    """Make the table of runs, which the browser sorts and filters."""
    words = {"model": "model", "precision": "bits", "method": "method", "sweeps": "sweeps", "seeds": "seed"}
    number = {"filter": "agNumberColumnFilter"}
    measured = number | {
        "type": "rightAligned",
        "valueFormatter": {"function": "params.value == null ? '' : d3.format('.4~f')(params.value)"},
    }
    link = {"cellRenderer": "markdown", "linkTarget": "_blank", "filter": False, "sortable": False}
    columns = [
        ("config", "config", link),
        *((field, heading, {}) for field, heading in words.items()),
        ("images", "images", number),
        *((field, heading, measured) for field, (_, heading) in FIGURES.items()),
        ("status", "status", {}),
        ("error", "error", {}),
    ]
    return dag.AgGrid(
        id="runs", rowData=list(rows), getRowId="params.data.id",
        columnDefs=[
            {
                "field": field, "headerName": heading,
                "width": _width(heading, [] if options else [row[field] for row in rows]),
            } | options
            for field, heading, options in columns
        ],
        defaultColDef={"sortable": True, "resizable": True, "floatingFilter": True, "filter": "agTextColumnFilter"},
        style={"height": "26rem"},
        dashGridOptions={
            "rowSelection": {"mode": "multiRow", "headerCheckbox": False, "enableClickSelection": False},
            "animateRows": False,
        },
    )  # fmt: skip


def _width(heading: str, texts: Iterable[str]) -> int:
    """Return a column's width in pixels. The grid could measure its cells, but would lay all of them out again."""
    longest = max(map(len, [heading, *texts]))
    return min(max(110, 50 + 8 * longest), 400)  # at least wide enough to type a filter; long errors are cut off


def comparison(first: Run, second: Run) -> html.Div:
    """Show two runs side by side: their figures, the settings that differ, and the SQNR of every module."""
    names = [f"{run.name} ({', '.join(run.sweeps) or 'no sweep'}) {run.id[:6]}" for run in (first, second)]
    figures = [
        [heading, *(table_row(run)[field] for run in (first, second))] for field, (_, heading) in FIGURES.items()
    ]
    flat = [flatten(run.config) for run in (first, second)]
    keys = sorted(key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key))
    differences = [[key, *(str(config.get(key, "–")) for config in flat)] for key in keys]
    return html.Div([
        html.Div([_html_table("figures", ["figure", *names], figures),
                  html.H2("Configuration, where it differs"),
                  _html_table("differences", ["key", *names], differences)]),
        html.Div([html.H2("SQNR of each module's output after compensation, dB"),
                  _layer_chart((first, second), names)]),
    ], className="compare")  # fmt: skip


def _html_table(name: str, headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> html.Table:
    body = [html.Tr([html.Td(_shown(value)) for value in row]) for row in rows]
    return html.Table([html.Thead(html.Tr([html.Th(heading) for heading in headings])), html.Tbody(body)], id=name)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return format_number(value) if isinstance(value, float) else str(value)


def _layer_chart(runs: Sequence[Run], names: Sequence[str]) -> Any:
    figure = plots.go.Figure(
        layout={"xaxis_title": "SQNR, dB", "margin": {"t": 10}, "legend": {"orientation": "h", "y": 1.05}}
    )
    figure.update_yaxes(autorange="reversed", automargin=True, dtick=1)
    longest = 0
    for run, name in zip(runs, names):
        modules: dict[str, list[float]] = {}
        for layer in run.layers():
            if layer.sqnr_after_db is not None:
                modules.setdefault(layer.module, []).append(layer.sqnr_after_db)
        longest = max(longest, len(modules))
        means = [sum(values) / len(values) for values in modules.values()]
        if modules:
            figure.add_scatter(x=means, y=list(modules), mode="lines+markers", name=name)
    if not longest:
        return html.P("Neither run compensates: there is no table of modules.", className="hint")
    figure.update_layout(height=160 + 18 * longest)
    return dcc.Graph(id="layers", figure=figure, config=GRAPH)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def config_text(run: Run) -> str:
    """Return a run's configuration as YAML, with the names of its files as comments above it."""
    files = "".join(f"# {path}\n" for path in run.config_files)
    return f"# {run.name}\n{files}{yaml.safe_dump(run.config, sort_keys=True)}"


if __name__ == "__main__":
    guarded(main)
