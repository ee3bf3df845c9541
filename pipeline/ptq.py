"""Stage `ptq`: quantize one model at one precision, for every variant and calibration seed."""

from pipeline.parallel import each
from pipeline.stage import Cell, run_stage


def main(cfg, cell: Cell) -> None:
    from pipeline.models import baseline, calibration_batches, open_cell_dataset, simulate
    from qwt2 import Precision, quantize, save_quantized

    model, dataset = baseline(cfg, cell), open_cell_dataset(cfg, cell)
    precision = Precision(**{k: v for k, v in cfg["precision"].items() if k != "name"})

    def quantize_one(run: tuple[str, int]) -> None:
        variant, seed = run
        qmodel = quantize(
            model,
            calibration_batches(cfg, dataset, seed),
            method=cfg["ptq"]["method"],
            precision=precision,
            variant=variant,
            observer_images=cfg["calibration"]["observer_images"],
        )
        path = cell.quantized(variant, "ptq", seed)
        save_quantized(qmodel, path)
        simulate(qmodel, dataset, path.with_suffix(".npy"))

    runs = [(variant, seed) for variant in cfg["ptq"]["variants"] for seed in cfg["seeds"]]
    each("quantize", quantize_one, runs, cfg["workers"])


if __name__ == "__main__":
    run_stage("ptq", main, runs_networks=True)
