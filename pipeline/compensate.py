"""Stage `compensate`: apply every compensation to every quantized model of one cell."""

from pipeline.stage import Cell, run_stage


def main(cfg, cell: Cell) -> None:
    from pipeline.models import baseline, calibration_batches, open_cell_dataset, simulate
    from pipeline.resources import PeakMemory
    from qwt2 import compensate, load_quantized, save_quantized
    from qwt2.io import write_json

    model, dataset = baseline(cfg, cell), open_cell_dataset(cfg)
    records = []
    for variant in cfg["ptq"]["variants"]:
        for seed in cfg["seeds"]:
            batches = calibration_batches(cfg, dataset, seed)
            for name, options in cfg["compensation"].items():
                qmodel = load_quantized(model, cell.folder("ptq") / f"{variant}-seed{seed}.safetensors")
                settings = {k: v for k, v in options.items() if k != "method"}
                with PeakMemory() as memory:
                    report = compensate(qmodel, batches, options["method"], **settings)
                stem = f"{variant}+{name}-seed{seed}"
                save_quantized(qmodel, cell.folder("compensate") / f"{stem}.safetensors")
                simulate(qmodel, dataset, cell.folder("compensate") / f"{stem}.npy")
                records.append(
                    {"variant": variant, "compensation": name, "seed": seed, "seconds": report.seconds,
                     "peak_memory_mb": memory.megabytes, "modules": [_module_record(m) for m in report.modules]}
                )  # fmt: skip
    write_json(cell.folder("compensate") / "report.json", records)


def _module_record(module) -> dict:
    """One module's line of the per-layer table; JSON has no NaN or infinity, so they become null."""
    import math

    figures = {"sqnr_before_db": module.sqnr_before_db, "sqnr_after_db": module.sqnr_after_db, "r2": module.r2}
    if module.alpha is not None:
        figures |= {
            "alpha_mean": float(module.alpha.mean()),
            "alpha_std": float(module.alpha.std(correction=0)),
            "beta_rms": float(module.beta.square().mean().sqrt()),
        }
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return {"module": module.module, "kept": module.kept, "reason": module.reason, **finite}


if __name__ == "__main__":
    run_stage("compensate", main)
