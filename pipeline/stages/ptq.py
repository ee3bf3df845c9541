"""Stage `ptq`: quantize one model at one precision, for every variant and calibration seed."""

from pipeline.common.parallel import each
from pipeline.common.stage import Cell, run_stage


def main(cfg, cell: Cell) -> None:
    from pipeline.tasks import open_task
    from qwt2 import Precision, load_quantized, quantize, save_quantized

    task = open_task(cfg, cell)
    network = task.baseline()
    captured = task.captured(network)
    precision = Precision(**{k: v for k, v in cfg["precision"].items() if k != "name"})

    def quantize_one(run: tuple[str, int]) -> None:
        variant, seed = run
        qmodel = quantize(
            captured,
            task.calibration(network, seed),
            method=cfg["ptq"]["method"],
            precision=precision,
            variant=variant,
            observer_images=cfg["calibration"]["observer_images"],
            parts=task.quantized_parts(network),
        )
        save_quantized(qmodel, cell.quantized(variant, "ptq", seed))

    def predict_one(run: tuple[str, int]) -> None:
        variant, seed = run
        path = cell.quantized(variant, "ptq", seed)
        task.predict(load_quantized(captured, path), path)

    runs = [(variant, seed) for variant in cfg["ptq"]["variants"] for seed in cfg["seeds"]]
    each("quantize", quantize_one, runs, cfg["workers"], then=predict_one)


if __name__ == "__main__":
    run_stage("ptq", main, runs_networks=True)
