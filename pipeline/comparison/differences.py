"""Command: compare two tables of figures, timing apart (`python -m pipeline.comparison.differences A.csv B.csv`)."""

import argparse
from pathlib import Path

from qwt2.errors import guarded
from qwt2.report.results import Row, format_number, read_rows

# What a clock or the operating system measured; everything else is arithmetic, and must repeat to the last digit.
TIMING = {"latency_ms", "latency_cpu_ms", "latency_ratio_to_ptq", "compensate_seconds", "peak_memory_mb"}


def differences(first: Path, second: Path) -> list[str]:
    """One line for each figure that the two tables do not share; Qwt2Error if one cannot be read."""
    tables = [{row.key: row for row in read_rows(path) if row.metric not in TIMING} for path in (first, second)]
    return [
        f"{' '.join(key[2:])}: {_shown(tables[0].get(key))} and {_shown(tables[1].get(key))}"
        for key in sorted(tables[0].keys() | tables[1].keys())
        if tables[0].get(key) != tables[1].get(key)
    ]


def _shown(row: Row | None) -> str:
    if row is None:
        return "nothing"
    return format_number(row.value) + (f" ± {format_number(row.std)}" if row.std is not None else "")


def main(arguments: list[str] | None = None) -> None:
    """Print what differs, and end with code 1 if anything does."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.comparison.differences", description=__doc__.splitlines()[0]
    )
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args(arguments)
    found = differences(options.first, options.second)
    print("\n".join(found) or "the same figures, timing apart")
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    guarded(main)
