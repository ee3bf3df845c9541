"""Take every full-size classifier of ``conf/model`` through the library, with random weights and images.

The benchmark shows that each model is quantized, compensated, folded, exported and run on every engine, and what that
takes. Random weights say nothing about accuracy, but comparing engines with the simulation needs no trained ones.
"""

import gc
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm

from pipeline.common.resources import PeakMemory
from qwt2 import compensate, export_onnx, fold, load_engine, quantize
from qwt2.classification.models import build_model
from qwt2.evaluation import machine
from qwt2.evaluation.mismatch import Mismatch, engine_mismatch, fold_mismatch, record_modules
from qwt2.io import write_csv
from qwt2.onnx.file import load_onnx
from qwt2.quantization.precision import Precision

MODELS = Path("conf/model")
RESULT = Path("results/benchmarks/architectures.csv")
ENGINES = ("onnxruntime", "openvino")
CALIBRATION_IMAGES, BATCH, THREADS = 4, 2, 2
PRECISION = Precision(weight_bits=8, activation_bits=8)


def main() -> None:
    torch.set_num_threads(THREADS)
    configurations = [(path, yaml.safe_load(path.read_text())) for path in sorted(MODELS.glob("*.yaml"))]
    full_size = [(path, cfg) for path, cfg in configurations if "timm" in cfg and cfg["train"] is None]
    rows = [measure(cfg, ptq_method(cfg)) for _, cfg in tqdm(full_size, desc="architectures")]
    write_csv(RESULT, rows)


def ptq_method(cfg: dict) -> str:
    """Return the PTQ method that the model's configuration names."""
    return next(value for entry in cfg["defaults"] for key, value in entry.items() if "ptq" in key)


def measure(cfg: dict, method: str) -> dict:
    model = build_model({**cfg, "pretrained": False, "num_classes": 1000})
    images = torch.randn(
        CALIBRATION_IMAGES, 3, *model.pretrained_cfg["input_size"][1:], generator=torch.Generator().manual_seed(0)
    )
    batches = list(images.split(BATCH))
    seconds = {}
    with PeakMemory() as memory, tempfile.TemporaryDirectory() as folder, torch.no_grad():
        qmodel = timed(seconds, "quantize", lambda: quantize(model, batches, method, PRECISION, observer_images=2))
        timed(seconds, "compensate", lambda: compensate(qmodel, batches, "cwac"))
        folded = timed(seconds, "fold", lambda: fold(qmodel))
        path = timed(seconds, "export", lambda: export_onnx(folded, Path(folder) / "model.onnx", images[:1]))
        row = {
            "model": cfg["name"], "timm": cfg["timm"], "method": f"{method}+cwac",
            "parameters": sum(p.numel() for p in model.parameters()), "file_bytes": path.stat().st_size,
            "quantized_layers": len(qmodel.quantization.layers), "quantized_products": len(qmodel.quantization.matmuls),
            "float_modules": len(qmodel.quantization.float_modules),
        }  # fmt: skip
        row |= figures("fold", Mismatch.worst(list(fold_mismatch(qmodel, folded, images[:1]).values())))
        records = record_modules(folded, images[:1])
        simulated = folded(images[:1]).numpy()
        del qmodel, folded, model
        gc.collect()
        for engine in ENGINES:
            logits = load_engine(path, engine, THREADS)(images[:1].numpy())
            row[f"{engine}_logits_relative_error"] = (
                f"{np.linalg.norm(logits - simulated) / np.linalg.norm(simulated):.2e}"
            )
            row |= figures(
                engine, Mismatch.worst(list(engine_mismatch(load_onnx(path), engine, records, THREADS).values()))
            )
    row |= {f"{step}_seconds": round(value, 2) for step, value in seconds.items()}
    row["peak_memory_mb"] = round(memory.megabytes)
    described = machine.describe()
    row |= {"calibration_images": CALIBRATION_IMAGES, "threads": THREADS, "cpu": described["cpu"]}
    row["instruction_sets"] = " ".join(described["instruction_sets"])
    row["versions"] = json.dumps(described["versions"])
    return row


def timed(seconds: dict, step: str, work):
    started = time.perf_counter()
    result = work()
    seconds[step] = time.perf_counter() - started
    return result


def figures(name: str, worst: Mismatch) -> dict:
    return {f"{name}_mismatch_steps": round(worst.steps, 4), f"{name}_mismatch_fraction": f"{worst.fraction:.1e}"}


if __name__ == "__main__":
    main()
