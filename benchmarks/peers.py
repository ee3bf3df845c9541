"""Compare this library's int8 files with those of ONNX Runtime's quantize_static and of NNCF, interleaved in one run.

Files for OpenVINO are quantized with target="openvino". Weights are random, and calibration takes crops of two real
photographs. Neither latency nor the distance from the float model's logits needs trained weights, and no accuracy is
claimed here. Latency is measured with one thread, on batches of 1 and 8.

``python -m benchmarks.peers MODEL ...`` measures only these models and keeps the other rows of this machine's file.
"""

import argparse
import copy
import gc
import logging
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

from benchmarks.table import machine_file, versions_text
from pipeline.common.resources import PeakMemory
from pipeline.comparison.readme import read_dicts
from qwt2 import Precision, compensate, export_onnx, fold, quantize
from qwt2.evaluation import machine
from qwt2.evaluation.latency import measure_latency
from qwt2.evaluation.metrics import agreement_percent, sqnr_db
from qwt2.io import write_csv
from qwt2.onnx.file import with_batch_size

# timm name -> this library's PTQ method, as in conf/model
MODELS = {
    "deit_small_patch16_224": "repq",
    "resnet50": "percentile",
    "swin_tiny_patch4_window7_224": "repq",
    "vit_small_patch16_224": "repq",
    "mobilenetv3_large_100": "percentile",
}
TARGETS = {"onnxruntime": "portable", "openvino": "openvino"}  # engine -> target of its files
CALIBRATION_IMAGES, TEST_IMAGES = 32, 32
ROUNDS = {1: 42, 8: 12}  # batch size -> rounds
THREADS = 1
BASE = "ptq"
# Variants that may differ by only 1 % run as several instances in turn, because an instance's place in memory matters
# more than that.
INSTANCES = {"fp32": 3, "ptq": 3, "cwac": 3, "quantize_static": 3, "nncf": 3}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(MODELS)}; default: all")
    chosen = parser.parse_args().models or list(MODELS)
    if unknown := set(chosen) - set(MODELS):
        parser.error(f"no model {sorted(unknown)[0]!r}; choose of {', '.join(MODELS)}")
    torch.set_num_threads(THREADS)
    logging.disable(logging.WARNING)
    os.environ["OPENVINO_TELEMETRY"] = "0"
    described = machine.describe()
    with tempfile.TemporaryDirectory() as folder:
        comparisons = []
        for name in tqdm(chosen, desc="files"):
            own = Path(folder) / name
            own.mkdir()
            comparisons.append(Comparison(name, MODELS[name], own))
            gc.collect()
        for comparison in tqdm(comparisons, desc="latencies"):
            write(comparison.rows(), described)
            gc.collect()


class Comparison:
    """One model: files made by every tool, and their measurements."""

    def __init__(self, name: str, method: str, folder: Path):
        self.name, self.method, self.folder = name, method, folder
        torch.manual_seed(0)
        self.model = random_model(name)
        crops = photo_crops(self.model, CALIBRATION_IMAGES + TEST_IMAGES)
        self.calibration, self.test = crops[:CALIBRATION_IMAGES], crops[CALIBRATION_IMAGES:]
        with torch.no_grad():
            self.exact = self.model(self.test).numpy()
        self.costs: dict[tuple[str, str], dict] = {}
        self.make_files()

    def make_files(self) -> None:
        """Make a file per engine and variant, and record what each took to make."""
        export_onnx(self.model, self.path("onnxruntime", "fp32"), self.test[:1])
        for engine in TARGETS:
            self.make_own_files(engine)
        self.measured("onnxruntime", "quantize_static", self.quantize_static)
        self.measured("openvino", "nncf", self.nncf)

    def make_own_files(self, engine: str) -> None:
        batches, how = list(self.calibration.split(16)), (self.method, Precision(8, 8), TARGETS[engine])
        ptq = self.measured(engine, "ptq", lambda: quantize(self.model, batches, *how))
        qmodels = {"ptq": ptq}
        for compensation in ("cwac", "qwt"):
            qmodels[compensation] = copy.deepcopy(ptq)
            self.measured(
                engine,
                compensation,
                lambda: compensate(qmodels[compensation], batches, compensation),  # noqa: B023 - called at once
            )
            costs = self.costs[engine, compensation]
            for key, base in self.costs[engine, "ptq"].items():  # compensation comes on top of plain PTQ
                costs[key] = costs[key] + base if key == "seconds" else max(costs[key], base)
        for variant, qmodel in qmodels.items():
            export_onnx(fold(qmodel), self.path(engine, variant), self.test[:1])
        export_onnx(unfolded(ptq, qmodels["cwac"]), self.path(engine, "cwac_unfolded"), self.test[:1])

    def path(self, engine: str, variant: str) -> Path:
        if variant == "fp32":
            return self.folder / "fp32.onnx"  # all engines share it
        return self.folder / f"{engine}-{variant}.{'xml' if variant == 'nncf' else 'onnx'}"

    def measured(self, engine: str, variant: str, work: Callable):
        started = time.perf_counter()
        with PeakMemory() as memory:
            result = work()
        self.costs[engine, variant] = {"seconds": time.perf_counter() - started, "peak_memory_mb": memory.megabytes}
        return result

    def quantize_static(self) -> None:
        """Run ONNX Runtime's tool as its documentation recommends for CPUs: QDQ, per channel, after preprocessing."""
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            def __init__(self, images: torch.Tensor):
                self.images = iter(images.split(1))

            def get_next(self):
                image = next(self.images, None)
                return None if image is None else {"images": image.numpy()}

        prepared = self.folder / "prepared.onnx"
        quant_pre_process(self.path("onnxruntime", "fp32"), prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, self.path("onnxruntime", "quantize_static"), Reader(self.calibration),
            quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip

    def nncf(self) -> None:
        """Run NNCF's post-training quantization of OpenVINO models; it is told which models are transformers."""
        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        kind = nncf.ModelType.TRANSFORMER if self.method == "repq" else None
        dataset = nncf.Dataset([image.numpy() for image in self.calibration.split(1)])
        # OpenVINO converts the PyTorch model itself, because from our ONNX file NNCF makes layers that run in float.
        model = openvino.convert_model(self.model, example_input=self.test[:1])
        quantized = nncf.quantize(model, dataset, subset_size=CALIBRATION_IMAGES, model_type=kind)
        openvino.save_model(quantized, self.path("openvino", "nncf"), compress_to_fp16=False)

    def rows(self) -> list[dict]:
        rows = []
        for batch, rounds in ROUNDS.items():
            sessions = self.sessions(batch)
            image_batches = [images.numpy() for images in self.test.split(batch)]
            calls = {key: [partial(session, image_batches[0]) for session in own] for key, own in sessions.items()}
            for engine in TARGETS:
                own = {variant: call for (e, variant), call in calls.items() if e == engine}
                measured = measure_latency(own, BASE, rounds, warmup=1)
                for variant, latency in measured.items():
                    logits = np.concatenate([sessions[engine, variant][0](images) for images in image_batches])
                    rows.append(self.row(engine, variant, batch, rounds, latency, logits))
        return rows

    def row(self, engine: str, variant: str, batch: int, rounds: int, latency, logits: np.ndarray) -> dict:
        path = self.path(engine, {"bf16": "fp32"}.get(variant, variant))
        files = [path, path.with_suffix(".bin")]
        costs = self.costs.get((engine, variant), {})
        return {
            "model": self.name, "engine": engine, "variant": variant, "batch": batch,
            "latency_ms": round(latency.wall_ms, 3), "latency_cpu_ms": round(latency.cpu_ms, 3),
            "latency_ratio_to_ptq": round(latency.ratio, 4), "rounds": rounds, "threads": THREADS,
            "file_bytes": sum(file.stat().st_size for file in files if file.is_file()),
            "logits_sqnr_db": round(sqnr_db(logits, self.exact), 2),
            "agreement_percent": round(agreement_percent(logits, self.exact), 1), "images": TEST_IMAGES,
            "quantize_seconds": round(costs["seconds"], 1) if costs else "",
            "quantize_peak_memory_mb": round(costs["peak_memory_mb"]) if costs else "",
            "calibration_images": CALIBRATION_IMAGES if costs else "",
        }  # fmt: skip

    def sessions(self, batch: int) -> dict[tuple[str, str], list[Callable[[np.ndarray], np.ndarray]]]:
        """Return (engine, variant) -> its instances, compiled models that are equal.

        Variants are compiled in turn, because memory that a process allocates late may be 10 % slower.
        """
        compilers = self.compilers(batch)
        sessions = {key: [] for key in compilers}
        for turn in range(max(INSTANCES.values())):
            for (engine, variant), compiled in compilers.items():
                if turn < INSTANCES.get(variant, 1):
                    sessions[engine, variant].append(compiled())
        return sessions

    def compilers(self, batch: int) -> dict[tuple[str, str], Callable[[], Callable[[np.ndarray], np.ndarray]]]:
        """Return (engine, variant) -> the function that compiles it."""
        from qwt2.engines.onnxruntime import OnnxRuntimeSession
        from qwt2.engines.openvino import OpenVinoSession

        def compiled(session, engine, variant):
            model = session(with_batch_size(onnx.load(self.path(engine, variant)), batch), THREADS)
            return lambda images: next(iter(model({"images": images}).values()))

        own = ["fp32", "ptq", "cwac_unfolded", "cwac", "qwt"]
        runs = [("onnxruntime", variant) for variant in [*own, "quantize_static"]] + [
            ("openvino", variant) for variant in own
        ]
        kinds = {"onnxruntime": OnnxRuntimeSession, "openvino": OpenVinoSession}
        compilers = {(engine, variant): partial(compiled, kinds[engine], engine, variant) for engine, variant in runs}
        fixed = with_batch_size(onnx.load(self.path("openvino", "fp32")), batch).SerializeToString()
        shape = [batch, *self.test.shape[1:]]
        compilers["openvino", "bf16"] = partial(openvino_default, fixed, shape, {})
        # As with our files, operations that stay in float run in float32.
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        compilers["openvino", "nncf"] = partial(openvino_default, self.path("openvino", "nncf"), shape, exact)
        return compilers


def openvino_default(source: bytes | Path, shape: list[int], options: dict) -> Callable[[np.ndarray], np.ndarray]:
    """Compile a model on OpenVINO with its default settings, except for threads and ``options``."""
    import openvino

    core = openvino.Core()
    model = core.read_model(source)
    model.reshape(shape)
    compiled = core.compile_model(
        model, "CPU", {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY", **options}
    )
    return lambda images: next(iter(compiled(images).values()))


class Affine(nn.Module):
    """CWAC as a separate operation: alpha * y + beta per channel, then the layer's own output quantizer."""

    def __init__(self, alpha: torch.Tensor, beta: torch.Tensor, dims: int, output: nn.Module):
        super().__init__()
        shape = (-1, 1, 1) if dims == 4 else (-1,)
        self.register_buffer("alpha", alpha.reshape(shape))
        self.register_buffer("beta", beta.reshape(shape))
        self.output = output

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.output(y * self.alpha + self.beta)


def unfolded(ptq: nn.Module, compensated: nn.Module) -> nn.Module:
    """Return the integer model of plain PTQ with CWAC's scale and offset as operations behind every layer."""
    integer = fold(ptq)
    for name in ptq.quantization.layers:
        layer, target = compensated.get_submodule(name), integer.get_submodule(name)
        if layer.alpha is not None:
            target.output = Affine(layer.alpha, layer.beta, layer.weight.dim(), target.output)
    return integer


def random_model(name: str) -> nn.Module:
    """Return a timm model with random weights and, unlike timm's initialization, random biases and norm scales.

    timm initializes some of these to zero, which no trained model has. Zeros would mislead: NNCF's conversion drops
    additions of zero, and resnet50's residual branches would end in layers whose weights are all zero.
    """
    model = timm.create_model(name, pretrained=False).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def photo_crops(model: nn.Module, count: int) -> torch.Tensor:
    """Return random crops of scikit-learn's two photographs, (count, 3, H, W), normalized as the model expects."""
    config = resolve_model_data_config(model)
    normalize = create_transform(**config, is_training=False).transforms[-1]
    crop = v2.RandomResizedCrop(config["input_size"][1:], scale=(0.1, 0.6), antialias=True)
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in load_sample_images().images]
    return torch.stack([normalize(crop(photos[i % len(photos)]).float() / 255) for i in range(count)])


def write(rows: list[dict], described: dict) -> None:
    """Replace one model's rows in this machine's file, whose name holds the CPU and the engines' versions."""
    facts = {
        "cpu": described["cpu"], "instruction_sets": " ".join(described["instruction_sets"]),
        "versions": versions_text(described),
    }  # fmt: skip
    path = machine_file("peers", ort="onnxruntime", ov="openvino")
    others = [row for row in read_dicts(path) if row["model"] != rows[0]["model"]] if path.is_file() else []
    order = list(MODELS)
    write_csv(path, sorted([*others, *(row | facts for row in rows)], key=lambda row: order.index(row["model"])))


if __name__ == "__main__":
    main()
