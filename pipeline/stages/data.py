"""Stage ``data``: prepare the datasets of all models."""

from pipeline.common.stage import Cell, run_stage
from qwt2.data import write_dataset


def main(cfg, cell: Cell) -> None:
    """Write one folder per dataset."""
    for name, settings in cfg["datasets"].items():
        write_dataset(settings, cell.data / name)


if __name__ == "__main__":
    run_stage("data", main)
