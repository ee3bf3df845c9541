"""Stage `fold`: fold compensation away and export every model of one cell for integer engines."""

from pipeline.common.parallel import each
from pipeline.common.stage import Cell, run_stage


def main(cfg, cell: Cell) -> None:
    from pipeline.tasks import open_task
    from qwt2 import fold, load_quantized
    from qwt2.capture.batch import first
    from qwt2.evaluation.costs import multiply_accumulates, stored_numbers
    from qwt2.evaluation.mismatch import Mismatch, fold_mismatch, record_modules
    from qwt2.io import save_arrays, write_json

    task = open_task(cfg, cell)
    network = task.baseline()
    captured = task.captured(network)
    inputs = task.mismatch_inputs(network)
    exporters = task.exporters(captured, inputs)
    methods, first_seed = ["ptq", *cfg["exported"]], cfg["seeds"][0]

    def quantized(method: str, seed: int):
        return load_quantized(captured, cell.quantized("default", method, seed))

    def export_new(run: tuple[str, str]) -> None:
        part, method = run
        exporters[part].export(folded_first[method], cell.onnx(method, first_seed, part))

    def fold_one(run: tuple[str, int]) -> dict:
        method, seed = run
        qmodel = quantized(method, seed)
        folded = fold(qmodel)
        for part, exporter in exporters.items():
            if seed != first_seed or (part, method) not in exported:
                exporter.export(folded, cell.onnx(method, seed, part))
        if seed == first_seed:
            records = record_modules(folded, inputs)
            for part, exporter in exporters.items():
                path = cell.onnx(method, seed, part).with_suffix(".records.safetensors")
                save_arrays(path, {name: array for name, array in records.items() if exporter.holds(name)})
        worst = Mismatch.worst(list(fold_mismatch(qmodel, folded, inputs).values()))
        costs = {
            "stored_numbers": stored_numbers(folded),
            "multiply_accumulates": multiply_accumulates(folded, first(inputs, 1)),
        }
        modules = {"modules": qmodel.quantization.modules, "float_modules": qmodel.quantization.float_modules}
        return {"method": method, "seed": seed, "fold_mismatch": vars(worst), **costs, **modules}

    # The first file of a structure takes seconds, and the others, which are written into copies of it, a fraction.
    folded_first = {method: fold(quantized(method, first_seed)) for method in methods}
    exported = _one_of_each_structure(exporters, folded_first)
    each("export", export_new, exported, cfg["workers"])
    for part, method in exported:
        exporters[part].learn(cell.onnx(method, first_seed, part))
    facts = each("fold", fold_one, [(method, seed) for method in methods for seed in cfg["seeds"]], cfg["workers"])
    write_json(cell.folder("fold") / "facts.json", facts)


def _one_of_each_structure(exporters: dict, folded: dict) -> list[tuple[str, str]]:
    """(part, method) of the files that differ in more than stored numbers; ``folded`` is a model of each method."""
    chosen: dict[tuple[str, str], str] = {}
    for part, exporter in exporters.items():
        for method, model in folded.items():
            chosen.setdefault((part, exporter.structure(model)), method)
    return [(part, method) for (part, _), method in chosen.items()]


if __name__ == "__main__":
    run_stage("fold", main, runs_networks=True)
