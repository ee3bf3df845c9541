"""Made-up stage outputs, shaped like the default grid's, to test the code that reads them. Never publish them."""

import copy
import csv
import io
import json
import random
from pathlib import Path

import numpy as np

from pipeline.common.folders import SCORES
from qwt2.io import save_arrays
from qwt2.report.metrics import METRICS
from qwt2.report.results import LAYER_COLUMNS, QUANTILES, Row, write_rows

MODELS = {"vit_micro": "repq", "swin_micro": "repq", "resnet_micro": "percentile"}
PRECISIONS = ("w8a8", "w4a4", "w3a3", "w2a4")
FP32 = {"vit_micro": 93.4, "swin_micro": 95.2, "resnet_micro": 99.1}
LOSS = {"w8a8": 0.05, "w4a4": 0.9, "w3a3": 8.4, "w2a4": 5.1}
GAIN = {"qwt": {"w8a8": 0.0, "w4a4": 0.2, "w3a3": 2.6, "w2a4": 1.6},
        "cwac": {"w8a8": -0.05, "w4a4": 0.3, "w3a3": 4.0, "w2a4": 3.3}}  # fmt: skip
SEEDS = 3
IMAGES = 200
MACHINE = {
    "cpu": "Imaginary CPU 3000",
    "architecture": "x86_64",
    "cores": 2,
    "instruction_sets": ["avx2", "avx512_vnni"],
    "versions": {"python": "3.11.7", "onnxruntime": "1.32.0", "openvino": "2026.4.1"},
}
OPERATIONS = {
    "operations": {
        "onnxruntime": {"integer": {"QGemm": 25, "QLinearConv": 1}, "float": {"LayerNormalization": 13, "Softmax": 6}},
        "openvino": {"integer": {"FullyConnected": 25}, "float": {"MVN": 13}},
    },
    "float_modules": {"pool": "GRU stays in float"},
}


def _module(name: str, kind: str, **fit) -> dict:
    engines = {"onnxruntime": {"steps": 0.0, "fraction": 0.0}, "openvino": {"steps": 1.0, "fraction": 1e-5}}
    return {"module": name, "kind": kind, **fit, "mismatch": engines}


def _fitted(before: float, after: float, reason: str = "") -> dict:
    quantiles = {f"{n}_{suffix}": q for n in ("alpha", "beta") for suffix, q in QUANTILES.items()}
    fit = {"sqnr_before_db": before, "sqnr_after_db": after, "kept": not reason, "reason": reason, "output_rms": 1.5}
    return fit | quantiles | {"alpha_mean": 0.5, "alpha_std": 0.1, "beta_rms": 0.2}


# A report as `python -m qwt2` writes it.
MODEL_REPORT = {
    "model": "mine:make", "method": "repq", "compensation": "cwac",
    "precision": {"weight_bits": 4, "activation_bits": 4},
    "calibration_images": ["a.png", "b.png"], "file_bytes": 23_000_000,
    "float_modules": {"rnn": "GRU stays in float"},
    "modules": [
        _module("patch_embed", "layer", **_fitted(40.0, 41.0)),
        _module("blocks.0.matmul1", "product"),
        _module("blocks.0.fc1", "layer", **_fitted(15.0, 18.5)),
        _module(
            "blocks.0.fc2", "layer",
            **_fitted(14.0, 14.0, "no gain on held-out images: 9.00 dB without, 8.90 dB with it"),
        ),
    ],
    "engines": {
        "openvino": {
            "logits_sqnr_db": 12.0, "simulation_logits_sqnr_db": 12.2, "agreement_with_fp32_percent": 87.5, "images": 8,
            "worst_module": "blocks.0.fc2", "mismatch_steps": 1.0, "mismatch_fraction": 1e-5,
            "operations": {"integer": {"FullyConnected": 49}, "float": {"MVN": 25}},
        }
    },
}  # fmt: skip

CONFIG = {
    "grid": {"model": list(MODELS), "precision": list(PRECISIONS)},
    "datasets": {"digits": {"name": "digits", "val_images": 2000}},
    "models": {
        model: {"task": "classification", "dataset": "digits", "calibration_images": 256, "latency_repeats": 200}
        for model in MODELS
    },
    "evaluate": {"latency": {"batch_size": 1, "threads": 1}},
}


def figure(model, precision, method, engine, metric, value, std=None, n=1):
    return Row(
        "classification", "digits", model, precision, method, engine, metric, value, std, METRICS[metric].unit, n
    )


def cell_rows(model: str, precision: str) -> list[Row]:
    """Return every figure of one evaluated cell."""
    rng = random.Random(f"{model}-{precision}")
    rows = []
    for compensation in ("", "qwt", "cwac"):
        rows += _accuracy(rng, model, precision, compensation, variant="")
        for engine in ("onnxruntime", "openvino"):
            rows += _engine(rng, model, precision, compensation, engine)
    for compensation in ("", "qwt"):
        rows += _accuracy(rng, model, precision, compensation, variant="_published")
    return rows


def _accuracy(rng, model, precision, compensation, variant):
    method = MODELS[model] + variant + (f"+{compensation}" if compensation else "")
    gain = GAIN[compensation][precision] if compensation else 0.0
    top1 = FP32[model] - LOSS[precision] + gain - (0.4 if variant else 0.0) + rng.uniform(-0.02, 0.02)
    varying = {
        "top1": top1,
        "top5": min(99.9, top1 + 4),
        "agreement": min(99.9, top1 + 1.3),
        "logits_sqnr_db": 32 - 3 * LOSS[precision] + 2 * gain,
    }
    rows = [
        figure(model, precision, method, "torch", metric, value, rng.uniform(0.05, 0.6), SEEDS)
        for metric, value in varying.items()
    ]
    if compensation:
        fit = {"compensate_seconds": rng.uniform(2, 9), "peak_memory_mb": rng.uniform(30, 70)}
        rows += [figure(model, precision, method, "torch", metric, value, 0.2, SEEDS) for metric, value in fit.items()]
    if not variant:
        folded = {
            "extra_params": 55_872 if compensation == "qwt" else 0,
            "extra_macs": 3_575_808 if compensation == "qwt" else 0,
            "engine_mismatch_steps": 1,
            "engine_mismatch_fraction": rng.uniform(1e-6, 1e-3),
        }
        rows += [figure(model, precision, method, "torch", metric, value) for metric, value in folded.items()]
    return rows


def _engine(rng, model, precision, compensation, engine):
    method = MODELS[model] + (f"+{compensation}" if compensation else "")
    latency = {"vit_micro": 0.71, "swin_micro": 1.9, "resnet_micro": 1.1}[model] * (1.2 if engine == "openvino" else 1)
    ratio = {"": 1.0, "qwt": 1.2, "cwac": 1.004}[compensation] + rng.uniform(-0.003, 0.003)
    top1 = FP32[model] - LOSS[precision] + (GAIN[compensation][precision] if compensation else 0)
    varying = {
        "top1": top1,
        "top5": min(99.9, top1 + 4),
        "agreement": min(99.5, top1 + 1.3),
        "logits_sqnr_db": 20.0,
        "engine_top1_delta": rng.uniform(-0.1, 0.1),
    }
    values = {
        "engine_mismatch_steps": rng.choice([1, 1, 2]),
        "engine_mismatch_fraction": rng.uniform(1e-6, 1e-3),
        "latency_ms": latency * ratio,
        "latency_cpu_ms": latency * ratio * 1.01,
        "latency_ratio_to_ptq": ratio if compensation else 1.0,
        "file_bytes": 1_310_000 + 220_000 * (compensation == "qwt") + 512 * (compensation == "cwac"),
    }
    rows = [figure(model, precision, method, engine, metric, value, 0.04, SEEDS) for metric, value in varying.items()]
    return rows + [figure(model, precision, method, engine, metric, value) for metric, value in values.items()]


def layers_csv(model: str, precision: str) -> str:
    """Return one cell's records of modules: one got worse, one was rejected by the gate; also products, plain PTQ."""
    rng = random.Random(f"layers-{model}-{precision}")
    engines = ("onnxruntime", "openvino")
    buffer = io.StringIO()
    columns = [*LAYER_COLUMNS, *(f"{engine}_{part}" for engine in engines for part in ("steps", "fraction"))]
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for seed in range(SEEDS):
        for compensation, names in (("", module_names()), ("qwt", _blocks()), ("cwac", module_names())):
            for number, module in enumerate(names):
                product = "matmul" in module
                kind = "block" if compensation == "qwt" else "product" if product else "layer"
                method = MODELS[model] + (f"+{compensation}" if compensation else "")
                record = {
                    "model": model,
                    "precision": precision,
                    "method": method,
                    "seed": seed,
                    "module": module,
                    "kind": kind,
                }
                if compensation and not product:
                    record |= _fit(rng, 22 - LOSS[precision] - 0.4 * number, number, compensation)
                if seed == 0 and kind != "block":
                    for engine in engines:
                        record |= {f"{engine}_steps": round(rng.random(), 4), f"{engine}_fraction": 1e-4}
                if len(record) > 6:
                    writer.writerow(record)
    return buffer.getvalue()


def _fit(rng, level: float, number: int, compensation: str) -> dict:
    before = level + rng.uniform(-1, 1)
    rise = -0.7 if number == 4 else 0.0 if number == 1 else rng.uniform(0.3, 6)
    fit = {"sqnr_before_db": f"{before:.4f}", "sqnr_after_db": f"{before + rise:.4f}", "kept": number != 1}
    fit["reason"] = "" if number != 1 else "no gain on held-out images: 9.00 dB without, 8.90 dB with it"
    if compensation == "cwac":
        for name, middle in (("alpha", 1.0), ("beta", 0.0)):
            spread = sorted(rng.gauss(0, 0.05) for _ in QUANTILES)
            fit |= {f"{name}_{suffix}": round(middle + value, 5) for suffix, value in zip(QUANTILES, spread)}
        fit |= {"output_rms": 2.0, "alpha_mean": 1.0, "alpha_std": 0.05, "beta_rms": 0.03}
    return fit


def _blocks():
    return [f"blocks.{number}" for number in range(6)]


def module_names():
    parts = ("attn.qkv", "attn.matmul1", "attn.matmul2", "attn.proj", "mlp.fc1", "mlp.fc2")
    return ["patch_embed.proj", *(f"{block}.{part}" for block in _blocks() for part in parts), "head"]


def write_cell(out: Path, model: str, precision: str) -> Path:
    """Write one evaluated cell under ``out/evaluate`` and return its folder."""
    folder = out / "evaluate" / f"{model}-{precision}"
    write_rows(folder / "rows.csv", cell_rows(model, precision))
    (folder / "layers.csv").write_text(layers_csv(model, precision))
    (folder / "machine.json").write_text(json.dumps(MACHINE))
    (folder / "operations.json").write_text(json.dumps(OPERATIONS))
    save_arrays(folder / SCORES, scores(model, precision))
    return folder


def scores(model: str, precision: str) -> dict[str, np.ndarray]:
    """Return made-up scores of every method at every seed, whose means are about those of the figures."""
    rng = np.random.default_rng(len(model) + len(precision))
    top1 = [row for row in cell_rows(model, precision) if (row.engine, row.metric) == ("torch", "top1")]
    luck = 100 * rng.random((SEEDS, IMAGES))
    return {row.method: np.where(luck < row.value, 100, 0).astype(np.float32) for row in top1}


def write_out(out: Path, models=tuple(MODELS), precisions=PRECISIONS) -> None:
    """Write the outputs of ``baseline`` and ``evaluate`` for a whole grid."""
    for model in models:
        baseline = out / "baseline" / model
        baseline.mkdir(parents=True)
        metrics = {"top1": FP32[model], "top5": 99.8, "seconds": 61.0}
        (baseline / "metrics.json").write_text(json.dumps(metrics))
        for precision in precisions:
            write_cell(out, model, precision)


def write_cells(count: int, tables: int = 3) -> None:
    """Write cells of sweeps in the current folder: all finished but the last, which failed.

    The first ``tables`` cells also have tables of modules.
    """
    from hydra import compose, initialize_config_dir

    from pipeline.sweeps.cells import by_method, cell_config

    configs = {}
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        for model in MODELS:
            for precision in PRECISIONS:
                for name in ("qwt", "cwac"):
                    overrides = [f"model={model}", f"precision={precision}", f"compensation={name}", "sweep=s"]
                    configs[model, precision, name] = cell_config(compose("cell", overrides))
    for number in range(count):
        (model, precision, name), config = list(configs.items())[number % len(configs)]
        config, folder = copy.deepcopy(config) | {"seeds": [number]}, Path(f"out/cells/{number:016x}")
        method = f"{MODELS[model]}+{name}"
        rows = [r for r in cell_rows(model, precision) if r.method in (method, MODELS[model])]
        rows = [
            row._replace(value=min(99.9, row.value + number / 1e3)) if row.metric == "top1" else row for row in rows
        ]
        (folder / "evaluate").mkdir(parents=True)
        (folder / "config.yaml").write_text("")
        record = {"status": "finished", "config": config, "method": method, "figures": by_method(rows), "artifacts": {},
                  "fp32": {"top1": FP32[model], "top5": 99.0}}  # fmt: skip
        if number == count - 1:
            record = {"status": "failed", "config": config, "error": "out of luck", "fp32": {"top1": 1.0}}
        (folder / "cell.json").write_text(json.dumps(record))
        if number < tables:
            write_rows(folder / "evaluate/rows.csv", rows)
            (folder / "evaluate/layers.csv").write_text(layers_csv(model, precision))
        job = Path(f"out/sweeps/{('bits', 'sizes', 'ablation')[number % 3]}/jobs/{number}.json")
        job.parent.mkdir(parents=True, exist_ok=True)
        job.write_text(json.dumps({"cell": folder.name, "number": number, "overrides": {}, "status": "finished"}))
