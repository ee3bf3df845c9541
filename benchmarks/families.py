"""Capture and calibration of timm's model families, the smallest member of each, with random weights.

A row tells whether the captured graph gives what the model gives (`same_db`; -log of the relative squared error,
"exact" for no difference at all), what of it can be quantized, and what CWAC and QwT cost: multiply-accumulates of the
whole compensation, and CPU seconds, in float forward passes of the calibration set.
"""

import argparse
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._registry import _module_to_models
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.table import RESULTS, versions_text
from qwt2 import compensate, quantize
from qwt2.capture import wiring
from qwt2.capture.blocks import find_blocks
from qwt2.capture.export import capture
from qwt2.capture.graph import Product
from qwt2.evaluation import machine
from qwt2.io import write_csv

OUTPUT = RESULTS / "families.csv"
# Where nothing but one value is ever alive, where many are, and where a module runs often.
COSTS = (
    "coat",
    "convnext",
    "densenet",
    "ghostnet",
    "hrnet",
    "mobilenetv3",
    "regnet",
    "resnet",
    "swin_transformer",
    "vision_transformer",
)
LIMIT_SECONDS = 600
IMAGES, BATCH = 16, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="timm's modules; default: all")
    parser.add_argument(
        "--largest", type=float, default=60, help="million parameters of the largest model that is taken"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    described, rows = machine.describe(), []
    facts = {"cpu": described["cpu"], "versions": versions_text(described)}
    for family, name, parameters in tqdm(list(smallest(arguments.families)), desc="families"):
        row = {"family": family, "model": name, "parameters": parameters}
        row |= measured(family, name) if parameters <= arguments.largest * 1e6 else {"outcome": "not taken: too large"}
        rows.append({**dict.fromkeys(FIGURES, ""), **row, **facts})
        write_csv(arguments.output, rows)


FIGURES = (
    "family", "model", "parameters", "outcome", "capture_seconds", "same_db", "layers", "products", "blocks",
    "float_macs_percent", "float_modules", "cwac_macs_passes", "cwac_cpu_passes", "qwt_macs_passes", "qwt_cpu_passes",
)  # fmt: skip


def smallest(families: list[str]) -> Iterator[tuple[str, str, int]]:
    """(family, model, parameters) of the smallest member of each family that can be built."""
    for family, names in sorted(_module_to_models.items()):
        if families and family not in families:
            continue
        sizes = {}
        for name in names:
            try:
                with torch.device("meta"):
                    sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
            except Exception:  # what needs weights or another package
                continue
        if sizes:
            yield family, *min(sizes.items(), key=lambda item: (item[1], item[0]))


def measured(family: str, name: str) -> dict[str, Any]:
    try:
        with limited(LIMIT_SECONDS):
            torch.manual_seed(0)
            model = with_signal(timm.create_model(name).eval())
            images = torch.randn(IMAGES, *model.default_cfg["input_size"], generator=torch.Generator().manual_seed(0))
            return captured(model, images) | (costs(model, images) if family in COSTS else {})
    except Exception as error:  # a row tells it, and the next family follows
        return {"outcome": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}


def captured(model: nn.Module, images: Tensor) -> dict[str, Any]:
    started = time.perf_counter()
    graph = capture(model, images[:2])
    seconds = time.perf_counter() - started
    with torch.no_grad():
        pairs = zip(*(tree_flatten(network(images[:BATCH]))[0] for network in (model, graph)))
        same = min(decibel(exact, found) for exact, found in pairs)
    macs = wiring.multiply_accumulates(graph, images[:1])
    left = sum(count for node, count in macs.items() if node.op != "call_module")
    return {
        "outcome": "captured", "capture_seconds": round(seconds, 1),
        "same_db": "exact" if math.isinf(same) else round(same),
        "layers": len(wiring.layers(graph)), "products": len(graph.calls(Product)), "blocks": len(find_blocks(graph)),
        "float_macs_percent": round(100 * left / sum(macs.values()), 2),
        "float_modules": len(wiring.float_operations(graph)),
    }  # fmt: skip


def costs(model: nn.Module, images: Tensor) -> dict[str, Any]:
    batches = list(images.split(BATCH))
    one_pass = work_of(lambda: [model(batch) for batch in batches])
    found = {}
    for method in ("cwac", "qwt"):
        qmodel = quantize(model, batches, "percentile")
        work = work_of(lambda qmodel=qmodel, method=method: compensate(qmodel, batches, method))
        for kind, mine, whole in zip(("macs", "cpu"), work, one_pass):
            found[f"{method}_{kind}_passes"] = round(mine / whole, 2)
    return found


def work_of(action: Callable[[], Any]) -> tuple[float, float]:
    """Multiply-accumulates and CPU seconds of an action, each from a run of its own."""
    with torch.no_grad():
        started = time.process_time()
        action()
        seconds = time.process_time() - started
        with FlopCounterMode(display=False) as counter:
            action()
    return counter.get_total_flops() / 2, seconds


def decibel(exact: Tensor, found: Tensor) -> float:
    error = (exact.double() - found.double()).square().sum()
    return math.inf if not error else float(10 * torch.log10(exact.double().square().sum() / error))


def with_signal(model: nn.Module) -> nn.Module:
    """The model with norms and heads that pass something on: timm starts many of them at zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.detach().any():
            parameter.data.normal_(0, 0.02 if parameter.dim() > 1 else 0.1, generator=generator)
    return model


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    main()
