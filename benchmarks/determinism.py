"""Command: run the whole chain twice, each in a fresh clone of the last commit, and compare (make determinism).

The two summary.csv must be equal except for timing and memory. ``--tiny`` takes a small grid and hardly trained models.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks import tiny_chain
from pipeline.comparison.differences import differences
from qwt2.errors import guarded
from qwt2.report.results import read_rows

SUMMARY = "results/summary.csv"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.determinism", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small grid: a minute instead of half an hour")
    tiny = parser.parse_args(arguments).tiny
    with tempfile.TemporaryDirectory(prefix="qwt2-") as parent:
        folders = [Path(parent) / name for name in ("first", "second")]
        for folder in folders:
            _fresh(folder, tiny)
            tiny_chain.run(folder, "dvc", "repro", capture_output=False)
        found = differences(*(folder / SUMMARY for folder in folders))
        print("\n".join(found) or f"twice the same {len(read_rows(folders[0] / SUMMARY))} figures, timing apart")
    if found:
        raise SystemExit(1)


def _fresh(folder: Path, tiny: bool) -> None:
    if tiny:
        tiny_chain.make(folder)
    else:
        tiny_chain.run(tiny_chain.ROOT, "git", "clone", "--quiet", str(tiny_chain.ROOT), str(folder))


if __name__ == "__main__":
    guarded(main)
