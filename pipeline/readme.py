"""Command: rewrite the README's result table from results/summary.csv (`python -m pipeline.readme`)."""

from pathlib import Path

from pipeline.report import RESULTS
from qwt2.errors import Qwt2Error, guarded
from qwt2.io import write_text
from qwt2.results import Method, Results, Row, read_rows

BEGIN = "<!-- results:begin (written by `make readme`) -->"
END = "<!-- results:end -->"
ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_MISSING = "–"


def update(readme: Path, summary: Path) -> None:
    """Replace what stands between the markers of `readme` by the table of `summary`; Qwt2Error without markers."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise Qwt2Error(f"{readme} must hold the line {BEGIN} once and {END} once after it; put them where it belongs.")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_text(readme, f"{before}{BEGIN}\n{table(Results(read_rows(summary)))}\n{END}{after}")


def table(results: Results) -> str:
    """Markdown: a row per model, precision and default PTQ; top-1 in percent, mean and deviation over the seeds."""
    headings = ["Model", "Bits", "fp32", "PTQ", "PTQ + QwT", "PTQ + CWAC"]
    headings += [f"CWAC on {name}" for name in ENGINES.values()]
    headings += [f"Latency ÷ PTQ, {name}" for name in ENGINES.values()]
    lines = [headings, ["---", "---", *["---:"] * (len(headings) - 2)]]
    for model in results.models:
        for precision in results.precisions(model):
            for ptq in results.methods(model, precision):
                if Method.parse(ptq)[1:] == ("", ""):
                    lines.append(_line(results, model, precision, ptq))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _line(results: Results, model: str, precision: str, ptq: str) -> list[str]:
    top1 = [results.get(model, precision, f"{ptq}{suffix}", "torch", "top1") for suffix in ("", "+qwt", "+cwac")]
    folded = [results.get(model, precision, f"{ptq}+cwac", engine, "top1") for engine in ENGINES]
    ratios = [results.get(model, precision, f"{ptq}+cwac", engine, "latency_ratio_to_ptq") for engine in ENGINES]
    return [
        *(f"{model} ({ptq})", precision.upper(), _percent(results.fp32_top1(model))),
        *(_percent(row) for row in (*top1, *folded)),
        *(f"{row.value:.2f}" if row else _MISSING for row in ratios),
    ]


def _percent(row: Row | None) -> str:
    if row is None:
        return _MISSING
    return f"{row.value:.1f} ± {row.std:.1f}" if row.std is not None and row.n > 1 else f"{row.value:.1f}"


if __name__ == "__main__":
    guarded(lambda: update(Path("README.md"), RESULTS / "summary.csv"))
