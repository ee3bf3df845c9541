"""Tasks of the pipeline, opened on a small dataset in a folder."""

from pathlib import Path

from pipeline.build.compose import compose_cell
from pipeline.common.stage import Cell
from pipeline.tasks import Task, open_task
from qwt2.data import write_dataset


def opened(overrides: list[str], folder: Path) -> Task:
    """Write the dataset of a cell's configuration below a folder, and return the cell's task there."""
    cfg = compose_cell(overrides)
    write_dataset(cfg["data"], folder / "data" / cfg["data"]["name"])
    return open_task(cfg, Cell("", folder / "data", folder / "baseline", folder / "out"))
