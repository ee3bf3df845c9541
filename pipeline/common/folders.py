"""The folders of the stages' and sweeps' outputs."""

from pathlib import Path
from typing import Any

from qwt2.errors import Qwt2Error
from qwt2.io import read_json

OUT = Path("out")
RESULTS = Path("results")
RESOLVED = OUT / "resolved"
# Cells of sweeps and trials, which are outside the grid.
CELLS = OUT / "cells"
SHARED = CELLS / "shared"
LOCKS = CELLS / "locks"
OUTPUTS = "outputs.json"
SCORES = "scores.safetensors"  # in an evaluated cell's folder: method -> each image's score at each seed


def read_record(folder: Path, name: str = "cell.json") -> dict[str, Any] | None:
    """Return the record that is written last into a cell's folder, or None if it is missing or damaged."""
    if not (folder / name).is_file():
        return None
    try:
        return read_json(folder / name)
    except Qwt2Error:
        return None
