"""Stage `compensate`: apply every compensation to every quantized model of one cell."""

from pipeline.common.parallel import each
from pipeline.common.stage import Cell, run_stage


def main(cfg, cell: Cell) -> None:
    from pipeline.common.resources import PeakMemory
    from pipeline.tasks import open_task
    from qwt2 import compensate, load_quantized, save_quantized
    from qwt2.io import write_json
    from qwt2.report.results import fit_record

    task = open_task(cfg, cell)
    network = task.baseline()
    captured = task.captured(network)

    def compensate_one(run: tuple[str, int, str]) -> dict:
        variant, seed, name = run
        options = dict(cfg["compensation"][name])
        qmodel = load_quantized(captured, cell.quantized(variant, "ptq", seed))
        batches = list(task.calibration(network, seed))
        with PeakMemory() as memory:
            report = compensate(qmodel, batches, options.pop("method"), **options)
        save_quantized(qmodel, cell.quantized(variant, name, seed))
        run_facts = {"variant": variant, "compensation": name, "seed": seed}
        costs = {"seconds": report.seconds, "peak_memory_mb": memory.megabytes}
        return run_facts | costs | {"modules": [fit_record(module) for module in report.modules]}

    def predict_one(run: tuple[str, int, str]) -> None:
        variant, seed, name = run
        path = cell.quantized(variant, name, seed)
        task.predict(load_quantized(captured, path), path)

    # Equally long pieces side by side: the last ones then end about together.
    runs = [(v, s, name) for name in cfg["compensation"] for v in cfg["ptq"]["variants"] for s in cfg["seeds"]]
    facts = each("compensate", compensate_one, runs, cfg["workers"], then=predict_one)
    write_json(cell.folder("compensate") / "report.json", facts)


if __name__ == "__main__":
    run_stage("compensate", main, runs_networks=True)
