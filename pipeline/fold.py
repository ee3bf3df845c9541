"""Stage `fold`: fold compensation away and export every model of one cell for integer engines."""

from pipeline.parallel import each
from pipeline.stage import Cell, run_stage


def main(cfg, cell: Cell) -> None:
    from pipeline.files import file_exporters
    from pipeline.tasks import open_task
    from qwt2 import fold, load_quantized
    from qwt2.costs import multiply_accumulates, stored_numbers
    from qwt2.inputs import first
    from qwt2.io import save_arrays, write_json
    from qwt2.mismatch import Mismatch, fold_mismatch, record_modules

    task = open_task(cfg, cell)
    network = task.baseline(cell)
    inputs = task.mismatch_inputs(network)
    exporters = file_exporters(network, inputs)

    def fold_one(run: tuple[str, int]) -> dict:
        method, seed = run
        qmodel = load_quantized(network, cell.quantized("default", method, seed))
        folded = fold(qmodel)
        for part, exporter in exporters.items():
            exporter.export(folded, cell.onnx(method, seed, part))
        if seed == cfg["seeds"][0]:
            records = record_modules(folded, inputs)
            for part, exporter in exporters.items():
                path = cell.onnx(method, seed, part).with_suffix(".records.safetensors")
                save_arrays(path, {name: array for name, array in records.items() if exporter.holds(folded, name)})
        worst = Mismatch.worst(list(fold_mismatch(qmodel, folded, inputs).values()))
        costs = {
            "stored_numbers": stored_numbers(folded),
            "multiply_accumulates": multiply_accumulates(folded, first(inputs, 1)),
        }
        modules = {"modules": qmodel.quantization.modules, "float_modules": qmodel.quantization.float_modules}
        return {"method": method, "seed": seed, "fold_mismatch": vars(worst), **costs, **modules}

    runs = [(method, seed) for method in ["ptq", *cfg["exported"]] for seed in cfg["seeds"]]
    facts = each("fold", fold_one, runs, workers=1)  # one exporter: the second file of a structure takes a fraction
    write_json(cell.folder("fold") / "facts.json", facts)


if __name__ == "__main__":
    run_stage("fold", main, runs_networks=True)
