"""The files of benchmarks that depend on the machine; their names hold the CPU and the versions that matter."""

import re
from pathlib import Path
from typing import Any

from qwt2.evaluation import machine

RESULTS = Path("results/benchmarks")


def machine_file(kind: str, **versions: str) -> Path:
    """Return the path ``<kind>-<cpu>[-<short name><version>...].csv``; ``versions`` maps short names to packages."""
    described = machine.describe()
    cpu = re.sub(r"[^a-z0-9]+", "-", described["cpu"].lower()).strip("-")
    return RESULTS / (
        "-".join([kind, cpu, *(f"{short}{described['versions'][name]}" for short, name in versions.items())]) + ".csv"
    )


def versions_text(described: dict[str, Any]) -> str:
    """Return the versions of a described machine as one text."""
    return " ".join(f"{name}={version}" for name, version in described["versions"].items())
