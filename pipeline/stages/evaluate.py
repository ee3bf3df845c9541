"""Stage ``evaluate``: accuracy, mismatch and latency of one cell on the integer engines."""

from pipeline.common.folders import SCORES
from pipeline.common.stage import Cell, run_stage
from qwt2.evaluation import machine
from qwt2.io import save_arrays, write_json
from qwt2.report.results import write_layers, write_rows


def main(cfg, cell: Cell) -> None:
    """Write the cell's figures and scores, records of modules and operations, pictures, and what the machine is."""
    from pipeline.stages.evaluation import Evaluation

    evaluation = Evaluation(cfg, cell)
    rows = evaluation.simulated() + evaluation.calibration_costs() + evaluation.folding()
    for engine in cfg["evaluate"]["engines"]:
        rows += evaluation.on_engine(engine) + evaluation.latency(engine)
    write_rows(cell.folder("evaluate") / "rows.csv", rows)
    save_arrays(cell.folder("evaluate") / SCORES, evaluation.scores())
    write_layers(cell.folder("evaluate") / "layers.csv", evaluation.layers(), cfg["evaluate"]["engines"])
    write_json(cell.folder("evaluate") / "operations.json", evaluation.operations())
    evaluation.write_pictures(cell.folder("evaluate") / "pictures.png")
    write_json(cell.folder("evaluate") / "machine.json", machine.describe())


if __name__ == "__main__":
    run_stage("evaluate", main)
