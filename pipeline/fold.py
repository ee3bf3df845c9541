"""Stage `fold`: fold compensation away and export every model of one cell for integer engines."""

from pipeline.stage import Cell, run_stage


def main(cfg, cell: Cell) -> None:
    from pipeline.models import baseline, open_cell_dataset
    from qwt2 import fold, load_quantized
    from qwt2.io import save_arrays, write_json
    from qwt2.mismatch import Mismatch, fold_mismatch, record_modules

    model, dataset = baseline(cfg, cell), open_cell_dataset(cfg)
    images, _ = next(dataset.batches("val", cfg["evaluate"]["mismatch_images"]))
    exporter, facts = Exporter(images), []
    for method in ["ptq", *cfg["compensations"]]:
        for seed in cfg["seeds"]:
            qmodel = load_quantized(model, cell.quantized("default", method, seed))
            folded = fold(qmodel)
            path = cell.folder("fold") / f"{method}-seed{seed}.onnx"
            exporter.export(folded, path)
            worst = Mismatch.worst(list(fold_mismatch(qmodel, folded, images).values()))
            facts.append({"method": method, "seed": seed, "fold_mismatch": vars(worst), **exporter.costs(folded)})
            if seed == cfg["seeds"][0]:
                save_arrays(path.with_suffix(".records.safetensors"), record_modules(folded, images))
    write_json(cell.folder("fold") / "facts.json", facts)


class Exporter:
    """Exports models; one of a structure that was exported before is written into that file's copy."""

    def __init__(self, images):
        self.images, self.templates = images, {}

    def export(self, folded, path) -> None:
        from qwt2 import export_onnx
        from qwt2.export import rewrite_onnx

        structure = tuple((name, tuple(t.shape)) for name, t in folded.state_dict().items())
        if structure in self.templates:
            rewrite_onnx(self.templates[structure], folded, path)
        else:
            self.templates[structure] = export_onnx(folded, path, self.images)

    def costs(self, folded) -> dict[str, int]:
        from qwt2.costs import multiply_accumulates, stored_numbers

        macs = multiply_accumulates(folded, self.images[:1])
        return {"stored_numbers": stored_numbers(folded), "multiply_accumulates": macs}


if __name__ == "__main__":
    run_stage("fold", main)
