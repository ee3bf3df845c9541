"""Stage `data`: prepare the dataset."""

from pipeline.stage import Cell, run_stage
from qwt2.data import write_dataset


def main(cfg, cell: Cell) -> None:
    write_dataset(cfg["data"], cell.data / cfg["data"]["name"])


if __name__ == "__main__":
    run_stage("data", main)
