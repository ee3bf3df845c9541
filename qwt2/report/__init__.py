"""The results as one self-contained HTML page: words, tables and charts, nothing loaded from anywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert

from qwt2.report import charts, findings, tables
from qwt2.results import Layer, Results, precision_order


@dataclass(frozen=True)
class Conditions:
    """What the figures were measured on and under, for the captions.

    Args:
        dataset: name of the dataset.
        val_images: number of validation images, None for all there are.
        calibration_images: number of images of one calibration seed.
        latency: settings of the timing: ``batch_size``, ``repeats``, ``threads``.
        machines: the different `qwt2.machine.describe` records of the evaluated cells.
    """

    dataset: str
    val_images: int | None
    calibration_images: int
    latency: Mapping[str, int]
    machines: Sequence[Mapping[str, Any]]


def render(results: Results, layers: Sequence[Layer], conditions: Conditions) -> str:
    """The page. Equal arguments give equal bytes (of one Altair and vl-convert release)."""
    specs = _specs(results, layers)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    compared = findings.comparisons(results, "cwac")
    return environment.get_template("page.html").render(
        vega=vega_bundle(),
        specs=specs,
        headline=findings.headline(results),
        model_sentences={model: findings.model_sentence(results, model) for model in results.models},
        compared=len(compared),
        not_improved=findings.not_improved(compared),
        targets=findings.targets(results),
        tables=[tables.build(results, model) for model in results.models],
        precisions=sorted({row.precision for row in results.rows} - {"fp32"}, key=precision_order),
        kinds=list(dict.fromkeys(tables.kind(row.method) for row in results.rows if row.method != "fp32")),
        seeds=sorted({row.n for row in results.rows if (row.metric, row.engine) == ("top1", "torch")} - {1}),
        explanations=_explanations(results),
        colours=[(tables.COMPENSATION_NAMES[name], colour) for name, colour in charts.COLOURS.items()],
        conditions=conditions,
    )


def _specs(results: Results, layers: Sequence[Layer]) -> dict[str, charts.Spec]:
    """Every chart by the id of its element: ``accuracy-<model>``, ``latency-<engine>-<model>``, ``size-<model>``."""
    specs = {f"accuracy-{model}": charts.accuracy(results, model) for model in results.models}
    for model in results.models:
        for engine in results.engines(model):
            if any((row.model, row.engine, row.metric) == (model, engine, "latency_ms") for row in results.rows):
                specs[f"latency-{engine}-{model}"] = charts.latency(results, model, engine)
        engine = _engine_of_files(results, model)
        if engine is not None:
            specs[f"size-{model}"] = charts.size(results, model, engine)
    if layers:
        specs["layers"] = charts.layers(layers)
    return specs


def _engine_of_files(results: Results, model: str) -> str | None:
    """All engines run the same file: its size is shown once."""
    engines = [row.engine for row in results.rows if (row.model, row.metric) == (model, "file_bytes")]
    return min(engines, default=None)


def _explanations(results: Results) -> list[tuple[str, str]]:
    """Heading and meaning of every metric that the tables show."""
    present = {(row.engine == "torch", row.metric) for row in results.rows}
    return [
        *(texts for metric, texts in tables.HEADINGS.items() if {(True, metric), (False, metric)} & present),
        *(texts for metric, texts in tables.FOLDING.items() if (True, metric) in present),
    ]


def vega_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, in the release that Altair's specifications are written for."""
    major, minor, *_ = alt.SCHEMA_VERSION.split(".")
    bundle = vl_convert.javascript_bundle(vl_version=f"{major}.{minor}")
    if "</script" in bundle.lower():
        raise ValueError("the Vega bundle would end its own script element")
    return bundle
