"""The results as one self-contained HTML page of text, tables and charts, which loads nothing.

:func:`render` makes the page of the benchmark, and :func:`render_model` the page of one quantized model.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwt2.extras import extra
from qwt2.report import charts, compensations, detection, findings, modules, recovery, tables, templates
from qwt2.report.metrics import HEADLINE, METRICS
from qwt2.report.results import LAYER_FIGURES, Layer, Results, precision_order

with extra("report"):
    import altair as alt
    import jinja2
    import vl_convert


@dataclass(frozen=True)
class Conditions:
    """The conditions of the measurements, for the captions.

    Attributes:
        datasets: name of each dataset -> number of validation images; ``None`` for all images.
        calibration_images: the numbers of images per calibration seed that occur over the models.
        latency: settings of the timing: ``batch_size`` and ``threads``.
        latency_repeats: the numbers of timed runs that occur over the models.
        machines: the different records of :func:`qwt2.evaluation.machine.describe` over the evaluated cells.
    """

    datasets: Mapping[str, int | None]
    calibration_images: Sequence[int]
    latency: Mapping[str, int]
    latency_repeats: Sequence[int]
    machines: Sequence[Mapping[str, Any]]


def render(
    results: Results,
    layers: Sequence[Layer],
    conditions: Conditions,
    operations: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
    pictures: Mapping[str, bytes] | None = None,
    scores: Mapping[tuple[str, str], Mapping[str, np.ndarray]] | None = None,
) -> str:
    """Render the page of the benchmark. Equal arguments give equal bytes with the same Altair and vl-convert.

    Args:
        results: the figures.
        layers: the per-module records.
        conditions: the conditions of the measurements.
        operations: (model, precision) -> ``operations``, the counts of
            :func:`qwt2.engines.operations.count_operations` per engine, and ``float_modules``, name -> reason.
        pictures: name of a cell -> PNG file of the detections.
        scores: (model, precision) -> method -> each image's part in the main figure at each seed, (seeds, images).

    Returns:
        The HTML text.
    """
    classifiers, detectors = results.of_task("classification"), results.of_task("detection")
    recovered = recovery.lines(recovery.of_grid(results, scores or {}), _fp32(results))
    specs = _specs(results, classifiers.models)
    if recovered:
        specs["recovery"] = charts.recovery(recovered)
    compared = findings.comparisons(classifiers, compensations.SUBJECT)
    module_table = modules.table(layers)
    return (
        _environment()
        .get_template("page.html")
        .render(
            vega=vega_bundle(),
            specs=specs,
            modules=module_table,
            module_chart=modules.chart(module_table["engines"]),
            operations=_operation_lines(operations or {}),
            headline=recovery.headline(recovered) + findings.headline(classifiers),
            **_recovery_values(recovered),
            model_sentences={model: findings.model_sentence(classifiers, model) for model in classifiers.models},
            compared=len(compared),
            not_improved=findings.not_improved(compared),
            targets=findings.targets(classifiers) if classifiers.rows else [],
            detection=detection.lines(detectors),
            detection_targets=detection.targets(detectors) if detectors.rows else [],
            pictures={cell: base64.b64encode(file).decode() for cell, file in (pictures or {}).items()},
            tables=[tables.build(results, model) for model in results.models],
            precisions=sorted({row.precision for row in results.rows} - {"fp32"}, key=precision_order),
            kinds=list(dict.fromkeys(tables.kind(row.method) for row in results.rows if row.method != "fp32")),
            seeds=sorted(
                {row.n for row in results.rows if row.metric in ("top1", "bbox_ap") and row.engine == "torch"} - {1}
            ),
            explanations=_explanations(results),
            colours=[(compensations.heading(name), compensations.colour(name)) for name in compensations.shown()],
            compensations=detectors.compensations,
            heading=compensations.heading,
            colour=compensations.colour,
            subject=compensations.SUBJECT,
            conditions=conditions,
        )
    )


def render_sweep(sweep: str, measured: Sequence[recovery.Measured], fp32: Mapping[str, float]) -> str:
    """Render the page of a sweep: what its methods recover, and at which cost.

    Args:
        sweep: the name of the sweep.
        measured: the methods of its cells.
        fp32: model -> the main figure of the full-precision network, in percent.

    Returns:
        The HTML text.
    """
    recovered = recovery.lines(measured, fp32)
    shown = compensations.shown({line.measured.compensation for line in recovered})
    return (
        _environment()
        .get_template("sweep.html")
        .render(
            sweep=sweep,
            vega=vega_bundle(),
            specs={"recovery": charts.recovery(recovered)},
            headline=recovery.headline(recovered),
            not_helpful=recovery.not_helpful(recovered),
            colours=[(compensations.heading(name), compensations.colour(name)) for name in shown],
            **_recovery_values(recovered),
        )
    )


def _recovery_values(recovered: Sequence[recovery.Line]) -> dict[str, Any]:
    """Return what the template recovery.html reads."""
    return {
        "recovered": recovered, "recovery_means": recovery.means(recovered), "hard_loss": recovery.hard_loss(recovered),
        "significance": recovery.significance(recovered), "confidence": recovery.CONFIDENCE,
        "references": compensations.REFERENCES, "label": compensations.label,
    }  # fmt: skip


def _fp32(results: Results) -> dict[str, float]:
    """Return the main figure of every full-precision network in percent."""
    figures = HEADLINE.values()
    return {row.model: row.value for row in results.rows if row.precision == "fp32" and row.metric in figures}


def render_model(report: Mapping[str, Any]) -> str:
    """Render the page of one quantized model.

    Args:
        report: the report that ``python -m qwt2`` writes as JSON.

    Returns:
        The HTML text.
    """
    bits = report["precision"]
    precision = f"W{bits['weight_bits']}A{bits['activation_bits']}"
    method = report["method"] + ("" if report["compensation"] == "none" else f"+{report['compensation']}")
    layers = [
        Layer(
            report["model"], precision, method, 0, record["module"], record["kind"], record.get("sqnr_before_db"),
            record.get("sqnr_after_db"), record.get("kept"), record.get("reason", ""),
            {name: record.get(name) for name in LAYER_FIGURES},
            {engine: (m["steps"], m["fraction"]) for engine, m in record["mismatch"].items()},
        )
        for record in report["modules"]
    ]  # fmt: skip
    module_table = modules.table(layers)
    return (
        _environment()
        .get_template("model.html")
        .render(
            vega=vega_bundle(),
            report=report,
            headline=_model_headline(report, precision),
            modules=module_table,
            module_chart=modules.chart(module_table["engines"]),
            engine_names=findings.ENGINE_NAMES,
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(templates.__file__).parent),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":")}
    return environment


def _model_headline(report: Mapping[str, Any], precision: str) -> list[str]:
    """Return a few sentences on the quantization and its result."""
    kinds = [record["kind"] for record in report["modules"]]
    compensated = [record for record in report["modules"] if record.get("kept") is not None]
    rejected = [record["module"] for record in compensated if not record["kept"]]
    gains = [record["sqnr_after_db"] - record["sqnr_before_db"] for record in compensated
             if record["sqnr_before_db"] is not None]  # fmt: skip
    sentences = [
        f"{report['method']} at {precision} on {len(report['calibration_images'])} images: {kinds.count('layer')} "
        f"layers and {kinds.count('product')} products in integers, {len(report['float_modules']) or 'no'} "
        f"module{'s' if len(report['float_modules']) != 1 else ''} left in float, "
        f"a file of {report['file_bytes'] / 1e6:.1f} MB."
    ]
    if gains:
        sentences.append(
            f"{compensations.label(report['compensation'])} raises the SQNR of "
            f"{sum(gain > 0 for gain in gains)} of {len(compensated)} "
            f"{'modules' if 'block' not in kinds else 'blocks'}, by "
            f"{sum(gains) / len(gains):.2f} dB on average and {max(gains):.2f} dB at most; the gate rejected "
            f"{', '.join(rejected[:3]) + (f' and {len(rejected) - 3} more' if len(rejected) > 3 else '') or 'none'}."
        )
    return sentences


def _operation_lines(operations: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one line per model, engine and set of operations, with all precisions that have these operations."""
    lines: dict[tuple, list[str]] = {}
    for (model, precision), facts in operations.items():
        for engine, counts in facts["operations"].items():
            texts = [", ".join(f"{n} {kind}" for kind, n in counts[part].items()) for part in ("integer", "float")]
            left = "; ".join(
                f"{name or 'the model itself'}: {reason}" for name, reason in facts["float_modules"].items()
            )
            lines.setdefault((model, findings.ENGINE_NAMES.get(engine, engine), *texts, left), []).append(precision)
    return [
        {
            "model": model,
            "precisions": ", ".join(precisions),
            "engine": engine,
            "integer": integer,
            "float": rest,
            "left": left,
        }
        for (model, engine, integer, rest, left), precisions in lines.items()
    ]


def _specs(results: Results, classifiers: Sequence[str]) -> dict[str, charts.Spec]:
    """Return charts by element id: ``accuracy-<model>``, ``latency-<engine>-<model>`` and ``size-<model>``."""
    specs = {f"accuracy-{model}": charts.accuracy(results, model) for model in classifiers}
    for model in results.models:
        for engine in results.engines(model):
            if any((row.model, row.engine, row.metric) == (model, engine, "latency_ms") for row in results.rows):
                specs[f"latency-{engine}-{model}"] = charts.latency(results, model, engine)
        if (measured := _engine_of_files(results, model)) is not None:
            specs[f"size-{model}"] = charts.size(results, model, measured)
    return specs


def _engine_of_files(results: Results, model: str) -> str | None:
    """Return the engine whose file size is shown, or ``None``. All engines run the same file, so one is enough."""
    engines = [row.engine for row in results.rows if (row.model, row.metric) == (model, "file_bytes")]
    return min(engines, default=None)


def _explanations(results: Results) -> list[tuple[str, str]]:
    """Return heading and explanation of every metric that the tables show."""
    present = {(row.engine == "torch", row.metric) for row in results.rows}
    return [
        *(
            (facts.heading, facts.explanation)
            for metric, facts in METRICS.items()
            if {(True, metric), (False, metric)} & present
        ),
        *(facts.simulated for metric, facts in METRICS.items() if facts.simulated and (True, metric) in present),
    ]


def vega_bundle() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, in the release that Altair's specifications need."""
    major, minor, *_ = alt.SCHEMA_VERSION.split(".")
    bundle = vl_convert.javascript_bundle(vl_version=f"{major}.{minor}")  # type: ignore[call-arg]
    if "</script" in bundle.lower():
        raise ValueError("the Vega bundle would end its own script element")
    return bundle
