"""Stage `compensate`: apply every compensation to every quantized model of one cell."""

from pipeline.parallel import each
from pipeline.stage import Cell, run_stage


def main(cfg, cell: Cell) -> None:
    from pipeline.models import baseline, calibration_batches, open_cell_dataset, simulate
    from pipeline.resources import PeakMemory
    from qwt2 import compensate, load_quantized, save_quantized
    from qwt2.io import write_json

    model, dataset = baseline(cfg, cell), open_cell_dataset(cfg, cell)

    def compensate_one(run: tuple[str, int, str]) -> dict:
        variant, seed, name = run
        options = dict(cfg["compensation"][name])
        qmodel = load_quantized(model, cell.quantized(variant, "ptq", seed))
        batches = calibration_batches(cfg, dataset, seed)
        with PeakMemory() as memory:
            report = compensate(qmodel, batches, options.pop("method"), **options)
        path = cell.quantized(variant, name, seed)
        save_quantized(qmodel, path)
        simulate(qmodel, dataset, path.with_suffix(".npy"))
        run_facts = {"variant": variant, "compensation": name, "seed": seed}
        costs = {"seconds": report.seconds, "peak_memory_mb": memory.megabytes}
        return run_facts | costs | {"modules": [module.to_dict() for module in report.modules]}

    runs = [(v, s, name) for v in cfg["ptq"]["variants"] for s in cfg["seeds"] for name in cfg["compensation"]]
    write_json(cell.folder("compensate") / "report.json", each("compensate", compensate_one, runs, cfg["workers"]))


if __name__ == "__main__":
    run_stage("compensate", main, runs_networks=True)
