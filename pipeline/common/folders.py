"""Where the outputs of stages and sweeps lie."""

from pathlib import Path
from typing import Any

from qwt2.errors import Qwt2Error
from qwt2.io import read_json

OUT = Path("out")
RESULTS = Path("results")
RESOLVED = OUT / "resolved"
# Cells outside the grid.
CELLS = OUT / "cells"
SHARED = CELLS / "shared"
LOCKS = CELLS / "locks"
OUTPUTS = "outputs.json"


def read_record(folder: Path, name: str = "cell.json") -> dict[str, Any] | None:
    """The record that is written last into a cell's folder; None if it is missing or damaged."""
    if not (folder / name).is_file():
        return None
    try:
        return read_json(folder / name)
    except Qwt2Error:
        return None
