"""Stage `ptq`: quantize one model at one precision, for every variant and calibration seed."""

from pipeline.stage import Cell, run_stage


def main(cfg, cell: Cell) -> None:
    from pipeline.models import baseline, calibration_batches, open_cell_dataset, simulate
    from qwt2 import Precision, quantize, save_quantized

    model, dataset = baseline(cfg, cell), open_cell_dataset(cfg)
    precision = Precision(**{k: v for k, v in cfg["precision"].items() if k != "name"})
    for variant in cfg["ptq"]["variants"]:
        for seed in cfg["seeds"]:
            qmodel = quantize(
                model,
                calibration_batches(cfg, dataset, seed),
                method=cfg["ptq"]["method"],
                precision=precision,
                variant=variant,
                observer_images=cfg["calibration"]["observer_images"],
            )
            save_quantized(qmodel, cell.folder("ptq") / f"{variant}-seed{seed}.safetensors")
            simulate(qmodel, dataset, cell.folder("ptq") / f"{variant}-seed{seed}.npy")


if __name__ == "__main__":
    run_stage("ptq", main)
