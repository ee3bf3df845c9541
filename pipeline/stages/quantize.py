"""Stage ``quantize``: quantize one model at one precision, compensate it in every way, fold, and export for engines."""

from typing import Any

from pipeline.common.stage import Cell, run_stage


def main(cfg: Any, cell: Cell) -> None:
    """Write the cell's quantized models, the files for engines, and the records of fitting and folding."""
    from pipeline.stages.quantization import Quantization
    from qwt2.io import write_json

    quantization = Quantization(cfg, cell)
    write_json(cell.folder("quantize") / "quantized.json", quantization.quantize())
    write_json(cell.folder("quantize") / "fits.json", quantization.compensate())
    write_json(cell.folder("quantize") / "folded.json", quantization.fold())
    write_json(cell.folder("quantize") / "modules.json", quantization.modules())


if __name__ == "__main__":
    run_stage("quantize", main)
