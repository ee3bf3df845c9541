"""Stage `fold`: fold compensation away and export every model of one cell for integer engines."""

from pipeline.parallel import each
from pipeline.stage import Cell, run_stage


def main(cfg, cell: Cell) -> None:
    from pipeline.models import baseline, open_cell_dataset
    from qwt2 import fold, load_quantized
    from qwt2.costs import multiply_accumulates, stored_numbers
    from qwt2.export import Exporter
    from qwt2.io import save_arrays, write_json
    from qwt2.mismatch import Mismatch, fold_mismatch, record_modules

    model, dataset = baseline(cfg, cell), open_cell_dataset(cfg, cell)
    images, _ = next(dataset.batches("val", cfg["evaluate"]["mismatch_images"]))

    exporter = Exporter(images)

    def fold_one(run: tuple[str, int]) -> dict:
        method, seed = run
        qmodel = load_quantized(model, cell.quantized("default", method, seed))
        folded = fold(qmodel)
        path = cell.folder("fold") / f"{method}-seed{seed}.onnx"
        exporter.export(folded, path)
        if seed == cfg["seeds"][0]:
            save_arrays(path.with_suffix(".records.safetensors"), record_modules(folded, images))
        worst = Mismatch.worst(list(fold_mismatch(qmodel, folded, images).values()))
        costs = {"stored_numbers": stored_numbers(folded), "multiply_accumulates": multiply_accumulates(folded, images[:1])}
        modules = {"modules": qmodel.quantization.modules, "float_modules": qmodel.quantization.float_modules}
        return {"method": method, "seed": seed, "fold_mismatch": vars(worst), **costs, **modules}

    runs = [(method, seed) for method in ["ptq", *cfg["exported"]] for seed in cfg["seeds"]]
    facts = each("fold", fold_one, runs, workers=1)  # one exporter: the second file of a structure takes a fraction
    write_json(cell.folder("fold") / "facts.json", facts)


if __name__ == "__main__":
    run_stage("fold", main, runs_networks=True)
