"""Command: compare two tables of figures, without those of timing and memory."""

import argparse
from pathlib import Path

from qwt2.errors import guarded
from qwt2.report.results import Row, format_number, read_rows

# Metrics that a clock or the operating system measures. All others are arithmetic and must repeat to the last digit.
TIMING = {"latency_ms", "latency_cpu_ms", "latency_ratio_to_ptq", "compensate_seconds", "peak_memory_mb"}


def differences(first: Path, second: Path) -> list[str]:
    """Return one line per figure that differs between two tables or is missing from one of them.

    Raises:
        Qwt2Error: a table cannot be read.
    """
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
    """Print what differs, and exit with code 1 if anything does."""
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
