"""Take models from outside through the library: timm's smallest per family, some of torchvision and transformers.

Weights are random. A row tells whether a model comes through quantization, CWAC, folding and export to files that run
on both engines, what stays in float, how close the outputs are, and what it takes. Each model runs in its own process.

SQNR is measured on images that were not calibrated on. The outputs' mean over the images is subtracted first, because
networks with random weights give almost the same outputs for all images. The cost of a compensation is its
multiply-accumulates divided by those of one float forward pass of the calibration set.

`python -m benchmarks.zoo [NAME ...]` continues what this machine has, small models first. With `--capture`, models
are only captured and compared with their graphs, which takes seconds each.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.table import machine_file, versions_text
from pipeline.common.resources import PeakMemory
from pipeline.comparison.readme import read_dicts
from qwt2 import compensate, export_onnx, fold, load_engine, quantize
from qwt2.capture import wiring
from qwt2.capture.batch import call, first
from qwt2.capture.blocks import find_blocks
from qwt2.capture.check import outputs_of
from qwt2.capture.export import capture
from qwt2.capture.graph import GraphModel, Product
from qwt2.errors import Qwt2Error
from qwt2.evaluation import machine
from qwt2.evaluation.metrics import sqnr_db
from qwt2.io import write_csv
from qwt2.quantization.allocation import centred_sqnr_db

LIMIT_SECONDS = 600
CAPTURED = "captured"
CALIBRATION, TEST, BATCH = 16, 8, 4
ENGINES = ("onnxruntime", "openvino")
FIGURES = (
    "source", "family", "model", "parameters", "outcome", "reason", "same_db", "layers", "products", "blocks",
    "integer_macs_percent", "float_modules", "ptq_db", "cwac_db", "qwt_db", "onnxruntime_db", "openvino_db",
    "cwac_passes", "qwt_passes", "seconds", "float_passes", "peak_memory_mb",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; default: all that have no row yet")
    parser.add_argument("--largest", type=float, default=60, help="million parameters of the largest that is taken")
    parser.add_argument("--capture", action="store_true", help="compare graphs with models, and no more")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a child process measures
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.one, arguments.capture)))
        return
    described = machine.describe()
    facts = {"cpu": described["cpu"], "versions": versions_text(described)}
    output = machine_file("zoo")
    rows: dict[str, dict[str, Any]] = {row["model"]: row for row in read_dicts(output)} if output.is_file() else {}
    for source, family, name, parameters in tqdm(sorted(members(), key=lambda member: member[3]), desc="models"):
        left = name not in rows or (rows[name]["outcome"] == CAPTURED and not arguments.capture)
        if name in arguments.names or (not arguments.names and left):
            row = {"source": source, "family": family, "model": name, "parameters": parameters}
            small = parameters <= arguments.largest * 1e6
            options = ["--capture"] if arguments.capture else []
            row |= in_a_process(name, options) if small else {"outcome": "not taken", "reason": "too large"}
            rows[name] = {**dict.fromkeys(FIGURES, ""), **row, **facts}
            write_csv(output, list(rows.values()))


def in_a_process(name: str, options: list[str]) -> dict[str, Any]:
    """What a model's own process measured, or how that ended."""
    command = [sys.executable, "-m", "benchmarks.zoo", "--one", name, *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"outcome": "not done", "reason": f"not done in {LIMIT_SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        errors = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"outcome": "crashed", "reason": errors[-1][:200]}
    return json.loads(lines[-1])


def measured(name: str, only_capture: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, images = BUILDERS[name]() if name in BUILDERS else _timm(name)
    model = normalized(with_signal(model.eval()), _slice(images, 0, CALIBRATION))
    parts = [_slice(images, start, start + BATCH) for start in range(0, CALIBRATION, BATCH)]
    test = _slice(images, CALIBRATION, CALIBRATION + TEST)
    started = time.process_time()
    try:
        with PeakMemory() as memory:
            captured = capture(model, first(parts[0], 2))
            found = captured_like(model, captured, test)
            found |= {} if only_capture else through(model, captured, parts, test)
    except Qwt2Error as error:
        return {"outcome": "refused", "reason": str(error)[:300]}
    seconds = time.process_time() - started
    return found | {
        "outcome": CAPTURED if only_capture else "through",
        "seconds": round(seconds, 1),
        "peak_memory_mb": round(memory.megabytes),
        "float_passes": round(seconds / _seconds(lambda: [outputs_of(model, part) for part in parts]), 1),
    }  # fmt: skip


def captured_like(model: nn.Module, captured: GraphModel, test: Any) -> dict[str, Any]:
    """What a model's graph holds, and how close it is to the model."""
    same = min(map(_error_db, _floats(outputs_of(model, test)), _floats(outputs_of(captured, test))))
    return {
        "same_db": "exact" if math.isinf(same) else round(same), "layers": len(wiring.layers(captured)),
        "products": len(captured.calls(Product)), "blocks": len(find_blocks(captured)),
    }  # fmt: skip


def through(model: nn.Module, captured: GraphModel, parts: list[Any], test: Any) -> dict[str, Any]:
    """Take one model the whole way and return its figures.

    Args:
        model: in evaluation mode.
        captured: its graph.
        parts: batches of the calibration set.
        test: inputs that were not calibrated on.
    """
    exact = outputs_of(model, test)
    one_pass = _work(lambda: [outputs_of(captured, part) for part in parts])
    figures: dict[str, Any] = {}
    for method in ("ptq", "qwt", "cwac"):
        qmodel = quantize(captured, parts, "percentile")
        if method == "qwt" and not qmodel.quantization.blocks:
            continue
        if method != "ptq":
            work = _work(lambda qmodel=qmodel, method=method: compensate(qmodel, parts, method))
            figures[f"{method}_passes"] = round(work / one_pass, 2)
        figures[f"{method}_db"] = round(centred_sqnr_db(exact, outputs_of(qmodel, test)), 2)
    folded = fold(qmodel)
    simulated = _floats(outputs_of(folded, test))
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(folded, Path(folder) / "model.onnx", first(test, 2))
        for engine in ENGINES:
            figures[f"{engine}_db"] = round(min(map(_error_db, simulated, _on(path, engine, test))), 1)
    info = qmodel.quantization
    return figures | {
        "integer_macs_percent": round(100 * (1 - sum(info.float_macs.values()) / (info.total_macs or 1)), 2),
        "float_modules": "; ".join(f"{name}: {reason}" for name, reason in info.float_modules.items())[:500],
    }


def _on(path: Path, engine: str, inputs: Any) -> list[np.ndarray]:
    feeds = {n: t.numpy() for n, t in inputs.items()} if isinstance(inputs, dict) else inputs.numpy()
    outputs = load_engine(path, engine)(feeds)
    arrays = outputs.values() if isinstance(outputs, dict) else [outputs]
    return [np.asarray(array) for array in arrays if array.dtype.kind == "f"]


def _floats(outputs: list[Any]) -> list[np.ndarray]:
    return [y.numpy() for y in outputs if isinstance(y, Tensor) and y.is_floating_point()]


def _error_db(exact: np.ndarray, found: np.ndarray) -> float:
    return sqnr_db(found, exact)


def _work(action: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def _seconds(action: Callable[[], Any]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def _slice(inputs: Any, start: int, stop: int) -> Any:
    return {n: t[start:stop] for n, t in inputs.items()} if isinstance(inputs, dict) else inputs[start:stop]


def smooth(channels: int, height: int, width: int) -> Tensor:
    """Return images of a few large blobs with some noise, (N, channels, height, width)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(CALIBRATION + TEST, channels, 7, 7, generator=generator)
    noise = torch.randn(CALIBRATION + TEST, channels, height, width, generator=generator)
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic") + 0.1 * noise


def with_signal(model: nn.Module) -> nn.Module:
    """Draw the parameters that are all zero at random, in place, because zero norms and heads pass nothing on."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.detach().any():
            parameter.data.normal_(0, 0.02 if parameter.dim() > 1 else 0.1, generator=generator)
    return model


def normalized(model: nn.Module, images: Any) -> nn.Module:
    """The model with the statistics of these images in its BatchNorms.

    Without them, the outputs of a network of random weights differ hardly at all from image to image.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        call(model, images)
    return model.eval()


def members() -> Iterator[tuple[str, str, str, int]]:
    """Yield (source, family, name, number of parameters) of every model."""
    for family, name, parameters in smallest():
        yield "timm", family, name, parameters
    for name, build in BUILDERS.items():
        source = "torchvision" if name in TORCHVISION else "transformers"
        yield source, name, name, sum(p.numel() for p in build()[0].parameters())


def smallest() -> Iterator[tuple[str, str, int]]:
    """Yield (family, name, number of parameters) of the smallest model of each timm family that can be built."""
    import timm
    from timm.models._registry import _module_to_models

    for family, names in sorted(_module_to_models.items()):
        sizes = {}
        for name in names:
            try:
                with torch.device("meta"):
                    sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
            except Exception:  # it needs weights or another package
                continue
        if sizes:
            yield family, *min(sizes.items(), key=lambda item: (item[1], item[0]))


def _timm(name: str) -> tuple[nn.Module, Tensor]:
    import timm

    model = timm.create_model(name)
    return model, smooth(*model.default_cfg["input_size"])


# Name -> size of the images.
TORCHVISION = {
    "alexnet": 224, "convnext_tiny": 224, "densenet121": 224, "efficientnet_b0": 224, "googlenet": 224,
    "inception_v3": 299, "maxvit_t": 224, "mnasnet0_5": 224, "mobilenet_v2": 224, "mobilenet_v3_small": 224,
    "regnet_y_400mf": 224, "resnet18": 224, "shufflenet_v2_x0_5": 224, "squeezenet1_1": 224, "swin_v2_t": 256,
    "vit_b_16": 224,
}  # fmt: skip


def _torchvision(name: str) -> Callable[[], tuple[nn.Module, Tensor]]:
    def build() -> tuple[nn.Module, Tensor]:
        from torchvision import models

        extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return getattr(models, name)(weights=None, **extra), smooth(3, TORCHVISION[name], TORCHVISION[name])

    return build


# Name -> class of the configuration, class of the model, and the settings that are smaller than the defaults.
_VISION = {"num_hidden_layers": 4, "image_size": 224}
_TEXT = {"num_hidden_layers": 4, "vocab_size": 4000}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hf_vit": ("ViTConfig", "ViTForImageClassification", {**_VISION, "num_labels": 10}),
    "hf_dinov2": ("Dinov2Config", "Dinov2ForImageClassification", {**_VISION, "patch_size": 16, "num_labels": 10}),
    "hf_swin": ("SwinConfig", "SwinForImageClassification", {"depths": [2, 2, 2, 2], "num_labels": 10}),
    "hf_clip_vision": ("CLIPVisionConfig", "CLIPVisionModel", _VISION),
    "hf_clip_text": ("CLIPTextConfig", "CLIPTextModel", {**_TEXT, "eos_token_id": 3999}),
    "hf_siglip_vision": ("SiglipVisionConfig", "SiglipVisionModel", _VISION),
    "hf_segformer": ("SegformerConfig", "SegformerForSemanticSegmentation", {}),
    "hf_bert": ("BertConfig", "BertForSequenceClassification", {**_TEXT, "num_labels": 4}),
    "hf_gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_layer": 4, "vocab_size": 4000, "use_cache": False}),
    "hf_rt_detr": ("RTDetrConfig", "RTDetrForObjectDetection", {"use_timm_backbone": False, "decoder_layers": 2}),
}


def _transformers(name: str) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        import transformers

        config, kind, smaller = TRANSFORMERS[name]
        model = getattr(transformers, kind)(getattr(transformers, config)(**smaller))
        if "vocab_size" not in smaller:
            return model, {"pixel_values": smooth(3, 224, 224)}
        ids = torch.randint(smaller["vocab_size"], (CALIBRATION + TEST, 32), generator=torch.Generator().manual_seed(0))
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return build


BUILDERS = {name: _torchvision(name) for name in TORCHVISION} | {name: _transformers(name) for name in TRANSFORMERS}


if __name__ == "__main__":
    main()
