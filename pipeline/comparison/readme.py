"""Command: rewrite the tables of README.md and docs/ from the files in results/ (``make readme``)."""

from pathlib import Path

from pipeline.common.folders import RESULTS
from pipeline.comparison.benchmark_tables import README_PARTS, replace_benchmarks
from pipeline.comparison.free_accuracy import free_accuracy_page
from pipeline.comparison.grid_tables import classifiers_table, detectors_table, means_table
from pipeline.comparison.literature import literature
from pipeline.comparison.markdown import replace
from pipeline.comparison.static_page import static_page
from qwt2.errors import guarded
from qwt2.report.results import Results, read_rows

README, TABLES = Path("README.md"), Path("docs/results.md")
REPORT, FREE, PUBLISHED = (Path("docs") / f"{name}.md" for name in ("report", "free_accuracy", "published"))


def main() -> None:
    """Rewrite every table."""
    results = Results(read_rows(RESULTS / "summary.csv"))
    classifiers, detectors = results.of_task("classification"), results.of_task("detection")
    replace(README, "means", means_table(results))
    replace(REPORT, "report", static_page(classifiers, REPORT))
    replace(FREE, "free-accuracy", free_accuracy_page(FREE))
    replace(PUBLISHED, "published", literature())
    replace(TABLES, "results", classifiers_table(classifiers))
    if detectors.rows:
        replace(TABLES, "detection", detectors_table(detectors))
    replace_benchmarks(README, RESULTS / "benchmarks", README_PARTS)
    replace_benchmarks(TABLES, RESULTS / "benchmarks")


if __name__ == "__main__":
    guarded(main)
