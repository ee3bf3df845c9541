"""Stage `ptq`: quantize one model at one precision, by every PTQ method and for every calibration seed."""

from pipeline.parallel import each
from pipeline.stage import Cell, ptq_methods, run_stage


def main(cfg, cell: Cell) -> None:
    from pipeline.tasks import open_task
    from qwt2 import Precision, load_quantized, quantize, save_quantized

    task = open_task(cfg, cell)
    network = task.baseline(cell)
    captured = task.captured(network)
    precision = Precision(**{k: v for k, v in cfg["precision"].items() if k != "name"})

    def quantize_one(run: tuple[str, int]) -> None:
        method, seed = run
        qmodel = quantize(
            captured,
            task.calibration(network, seed),
            method=method,
            precision=precision,
            target=cfg["ptq"]["target"] if method == cfg["ptq"]["method"] else "portable",
            observer_images=cfg["calibration"]["observer_images"],
            parts=task.parts(network),
        )
        save_quantized(qmodel, cell.quantized(method, "ptq", seed))

    def predict_one(run: tuple[str, int]) -> None:
        method, seed = run
        path = cell.quantized(method, "ptq", seed)
        task.predict(load_quantized(captured, path), path)

    runs = [(method, seed) for method in ptq_methods(cfg) for seed in cfg["seeds"]]
    each("quantize", quantize_one, runs, cfg["workers"], then=predict_one)


if __name__ == "__main__":
    run_stage("ptq", main, runs_networks=True)
