"""The default run as a page of the documentation, with plots as SVG files: to be seen without running anything."""

import json
from pathlib import Path
from typing import Any

from pipeline.comparison.markdown import table
from qwt2.extras import extra
from qwt2.io import write_text
from qwt2.report import charts, findings
from qwt2.report.compensations import heading
from qwt2.report.results import Results

PLOTS = "report"  # folder of the plots, beside the page
INK = "#6e7781"  # text and rules; legible on light and on dark pages
WIDTH = 420  # pixels
_ENGINE = next(iter(findings.ENGINES))


def static_page(results: Results, page: Path) -> str:
    """Write the plots of a table of figures beside a page and return the page's generated part.

    Args:
        results: the figures of classifiers.
        page: the page, which need not exist yet.
    """
    parts = ["\n".join(f"- {sentence}" for sentence in findings.headline(results)), _targets(results)]
    for model in results.models:
        plots = {
            "top-1 against bits": charts.accuracy(results, model),
            f"latency on {findings.ENGINES[_ENGINE]}": charts.latency(results, model, _ENGINE),
        }
        parts += [f"## {model}", findings.model_sentence(results, model)]
        parts.append(
            "\n".join(_picture(page, model, title, spec, results.compensations) for title, spec in plots.items())
        )
    return "\n\n".join(part for part in parts if part)


def _targets(results: Results) -> str:
    headings = ["Target", "Met", "Evidence"]
    lines = []
    for target in findings.targets(results):
        met = {True: "yes", False: "no", None: "not measured"}[target.met]
        lines.append([target.statement, met, target.evidence])
    return table(headings, lines, words=headings)


def _picture(page: Path, model: str, title: str, spec: dict[str, Any], compensations: list[str]) -> str:
    name = f"{PLOTS}/{model}-{title.split()[0]}.svg"
    write_text(page.parent / name, svg(_with_legend(spec, compensations)))
    return f"![{model}: {title}]({name})"


def _with_legend(spec: Any, names: list[str]) -> Any:
    """Return a chart with a legend of the compensations ``names``; the report has one legend for all of its charts."""
    if isinstance(spec, list):
        return [_with_legend(part, names) for part in spec]
    if not isinstance(spec, dict):
        return spec
    found = {key: _with_legend(value, names) for key, value in spec.items()}
    if found.get("field") == "compensation" and "legend" in found:
        labels = json.dumps({name: heading(name) for name in names})
        found["legend"] = {"title": None, "orient": "top", "values": names, "labelExpr": f"{labels}[datum.label]"}
    return found


def svg(spec: dict[str, Any]) -> str:
    """Draw a chart of the report, which takes its colour and width from the page around it, as a picture of its own."""
    with extra("report"):
        import vl_convert

    drawn = vl_convert.vegalite_to_svg(spec | {"width": WIDTH})
    return drawn.replace("currentColor", INK) + "\n"
