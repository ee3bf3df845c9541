"""Stage ``trial``: run the cell of params.yaml, in the grid or not (``dvc exp run trial -S model=swin_micro``)."""

from pathlib import Path

from omegaconf import OmegaConf

from pipeline.common.folders import CELLS, RESULTS
from pipeline.sweeps.cells import cell_config, figures, run_cell
from qwt2.errors import Qwt2Error, guarded
from qwt2.io import write_json, write_text
from qwt2.report.results import read_layers

PARAMS = Path("params.yaml")
LAYERS = "module,method,sqnr_before_db,sqnr_after_db"


def main() -> None:
    """Run the cell, unless it is finished, and write its figures and modules where DVC compares them.

    Raises:
        Qwt2Error: the cell failed.
    """
    cfg = cell_config(OmegaConf.load(PARAMS))
    record = run_cell(cfg)
    if record["status"] == "failed":
        raise Qwt2Error(f"the cell of {PARAMS} failed: {record['error']}")
    write_json(RESULTS / "trial" / "metrics.json", {name: round(value, 4) for name, value in figures(record).items()})
    write_text(RESULTS / "trial" / "layers.csv", _layers(CELLS / record["id"] / "evaluate" / "layers.csv"))


def _layers(path: Path) -> str:
    """Return the SQNR of every compensated module in dB, as CSV in execution order."""
    fitted = [layer for layer in read_layers(path) if layer.sqnr_after_db is not None]
    rows = [f"{r.module},{r.method},{r.sqnr_before_db:.4f},{r.sqnr_after_db:.4f}" for r in fitted]
    return "\n".join([LAYERS, *rows]) + "\n"


if __name__ == "__main__":
    guarded(main)
