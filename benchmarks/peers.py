"""Compare this library's int8 models with those of quantize_static, NNCF and torchao, interleaved in one run.

Of each tool, several settings are tried (``benchmarks.peer_tools``), and the one whose logits come closest to the float
model's is compared. A second file has the figures of every setting. Files for OpenVINO are quantized with
target="openvino"; Inductor runs the portable ones. Weights are random, and calibration takes crops of two real
photographs. Neither latency nor the distance from the float model's logits needs trained weights, and no accuracy is
claimed here. Latency is measured with one thread, on batches of 1 and 8.

``python -m benchmarks.peers MODEL ...`` measures only these models and keeps the other rows of this machine's file.
"""

import argparse
import copy
import gc
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
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

from benchmarks.peer_tools import (
    Model,
    Setting,
    nncf_settings,
    on_inductor,
    quantize_static_settings,
    single_feeds,
    torchao_graph,
    write_float,
)
from benchmarks.table import machine_file, versions_text
from pipeline.common.resources import PeakMemory
from pipeline.comparison.benchmark_tables import read_dicts
from qwt2 import Precision, compensate, export_onnx, fold, quantize
from qwt2.engines import ENGINES as SESSIONS
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
ENGINES = (*TARGETS, "inductor")
CALIBRATION_IMAGES, TEST_IMAGES = 32, 32
ROUNDS = {1: 42, 8: 12}  # batch size -> rounds
THREADS = 1
BASE = "ptq"
# Variants that may differ by only 1 % run as several instances in turn, because an instance's place in memory matters
# more than that. On Inductor there is one of each, because it compiles for half a minute.
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
            write("peers", comparison.rows(), described)
            write("peer-settings", comparison.tried, described)
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
        self.settings: dict[tuple[str, str], str] = {("inductor", "torchao"): "x86 Inductor quantizer"}
        self.tried: list[dict] = []
        self.make_files()

    def make_files(self) -> None:
        """Make a file per engine and variant, and record what each took to make."""
        fp32 = write_float(self.model, self.path("onnxruntime", "fp32"), self.test[:1])
        for engine in TARGETS:
            self.make_own_files(engine)
        is_transformer, feeds = self.method == "repq", single_feeds([self.calibration])
        self.keep_best("onnxruntime", "quantize_static", quantize_static_settings(fp32, feeds))
        self.keep_best("openvino", "nncf", nncf_settings(self.model, self.test[:1], feeds, is_transformer))

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
        engine = "onnxruntime" if engine == "inductor" else engine  # both run portable files
        return self.folder / f"{engine}-{variant}.{'xml' if variant == 'nncf' else 'onnx'}"

    def measured(self, engine: str, variant: str, work: Callable):
        started = time.perf_counter()
        with PeakMemory() as memory:
            result = work()
        self.costs[engine, variant] = {"seconds": time.perf_counter() - started, "peak_memory_mb": memory.megabytes}
        return result

    def keep_best(self, engine: str, tool: str, settings: Iterable[Setting]) -> None:
        """Run a tool with every setting, and keep the file whose logits are closest to the float model's.

        A setting that fails is recorded with its error.

        Raises:
            RuntimeError: every setting failed.
        """
        best, costs_of_best, path = -np.inf, {}, self.path(engine, tool)
        for number, setting in enumerate(settings):
            attempt = path.with_stem(f"{path.stem}-{number}")
            try:
                self.measured(engine, tool, partial(setting.write, attempt))
                figures = self.distances(self.compiled(engine, attempt, 1), 1)
            except Exception as error:  # of any kind: the other settings go on
                self.tried.append(self.attempt(engine, tool, setting, {"error": str(error).splitlines()[0][:200]}))
                continue
            costs = self.costs.pop((engine, tool))
            self.tried.append(self.attempt(engine, tool, setting, figures | {"seconds": round(costs["seconds"], 1)}))
            if figures["logits_sqnr_db"] > best:
                best, costs_of_best = figures["logits_sqnr_db"], costs
                self.settings[engine, tool] = setting.name
                for suffix in (path.suffix, ".bin"):  # OpenVINO's weights are in a file of their own
                    if attempt.with_suffix(suffix).is_file():
                        shutil.copy(attempt.with_suffix(suffix), path.with_suffix(suffix))
        if (engine, tool) not in self.settings:
            raise RuntimeError(f"{tool} failed on {self.name} with every setting: {self.tried[-1]['error']}")
        self.costs[engine, tool] = costs_of_best

    def attempt(self, engine: str, tool: str, setting: Setting, figures: dict) -> dict:
        """Return the row of one setting."""
        empty = dict.fromkeys(("logits_sqnr_db", "agreement_percent", "seconds", "error"), "")
        return {"model": self.name, "engine": engine, "tool": tool, "setting": setting.name, **empty, **figures}

    def distances(self, model: Model, batch: int) -> dict[str, float]:
        """Return how far a compiled model's outputs on the test images are from the float model's."""
        logits = np.concatenate([model(images.numpy()) for images in self.test.split(batch)])
        return {
            "logits_sqnr_db": round(sqnr_db(logits, self.exact), 2),
            "agreement_percent": round(agreement_percent(logits, self.exact), 1),
        }

    def rows(self) -> list[dict]:
        rows = []
        for batch, rounds in ROUNDS.items():
            sessions = self.sessions(batch)
            images = self.test[:batch].numpy()
            calls = {key: [partial(session, images) for session in own] for key, own in sessions.items()}
            for engine in ENGINES:
                own = {variant: call for (e, variant), call in calls.items() if e == engine}
                measured = measure_latency(own, BASE, rounds, warmup=1)
                for variant, latency in measured.items():
                    figures = self.distances(sessions[engine, variant][0], batch)
                    rows.append(self.row(engine, variant, batch, rounds, latency, figures))
        return rows

    def row(self, engine: str, variant: str, batch: int, rounds: int, latency, figures: dict) -> dict:
        path = self.path(engine, {"bf16": "fp32"}.get(variant, variant))
        files = [path, path.with_suffix(".bin")]
        costs = self.costs.get((engine, variant), {})
        return {
            "model": self.name, "engine": engine, "variant": variant,
            "setting": self.settings.get((engine, variant), ""), "batch": batch,
            "latency_ms": round(latency.wall_ms, 3), "latency_cpu_ms": round(latency.cpu_ms, 3),
            "latency_ratio_to_ptq": round(latency.ratio, 4), "rounds": rounds, "threads": THREADS,
            "file_bytes": sum(file.stat().st_size for file in files if file.is_file()) or "", **figures,
            "images": TEST_IMAGES,
            "quantize_seconds": round(costs["seconds"], 1) if costs else "",
            "quantize_peak_memory_mb": round(costs["peak_memory_mb"]) if costs else "",
            "calibration_images": CALIBRATION_IMAGES if costs else "",
        }  # fmt: skip

    def sessions(self, batch: int) -> dict[tuple[str, str], list[Model]]:
        """Return (engine, variant) -> its instances, compiled models that are equal.

        Variants are compiled in turn, because memory that a process allocates late may be 10 % slower.
        """
        compilers = self.compilers(batch)
        sessions = {key: [] for key in compilers}
        for turn in range(max(INSTANCES.values())):
            for (engine, variant), compiled in compilers.items():
                if turn < (1 if engine == "inductor" else INSTANCES.get(variant, 1)):
                    sessions[engine, variant].append(compiled())
        return sessions

    def compilers(self, batch: int) -> dict[tuple[str, str], Callable[[], Model]]:
        """Return (engine, variant) -> the function that compiles it."""
        own = ["fp32", "ptq", "cwac_unfolded", "cwac", "qwt"]
        runs = [("onnxruntime", variant) for variant in [*own, "quantize_static"]]
        runs += [("openvino", variant) for variant in [*own, "nncf"]]
        runs += [("inductor", variant) for variant in ("ptq", "cwac")]
        compilers = {key: partial(self.compiled, key[0], self.path(*key), batch) for key in runs}
        fixed = with_batch_size(onnx.load(self.path("openvino", "fp32")), batch).SerializeToString()
        compilers["openvino", "bf16"] = partial(openvino_default, fixed, [batch, *self.test.shape[1:]], {})
        compilers["inductor", "fp32"] = partial(on_inductor, self.model, self.test[:batch])
        compilers["inductor", "torchao"] = partial(self.torchao, batch)
        return compilers

    def compiled(self, engine: str, path: Path, batch: int) -> Model:
        """Compile a file for a batch size, so that operations which stay in float run in float32."""
        if path.suffix == ".xml":
            shape = [batch, *self.test.shape[1:]]
            return openvino_default(path, shape, {"INFERENCE_PRECISION_HINT": "f32"})
        session = SESSIONS.get(engine)(with_batch_size(onnx.load(path), batch), THREADS)
        return lambda images: next(iter(session({"images": images}).values()))

    def torchao(self, batch: int) -> Model:
        """Quantize by torchao for a batch size, and compile on Inductor."""
        graph = self.measured("inductor", "torchao", partial(torchao_graph, self.model, self.calibration, batch))
        return on_inductor(graph, self.test[:batch])


def openvino_default(source: bytes | Path, shape: list[int], options: dict) -> Model:
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


def write(kind: str, rows: list[dict], described: dict) -> None:
    """Replace one model's rows in this machine's file, whose name holds the CPU and the engines' versions."""
    facts = {
        "cpu": described["cpu"], "instruction_sets": " ".join(described["instruction_sets"]),
        "versions": versions_text(described),
    }  # fmt: skip
    path = machine_file(kind, ort="onnxruntime", ov="openvino")
    others = [row for row in read_dicts(path) if row["model"] != rows[0]["model"]] if path.is_file() else []
    order = list(MODELS)
    write_csv(path, sorted([*others, *(row | facts for row in rows)], key=lambda row: order.index(row["model"])))


if __name__ == "__main__":
    main()
