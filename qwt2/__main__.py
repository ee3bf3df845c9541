"""The command ``qwt2 MODEL --images FOLDER --output model.onnx``, which makes a trained network's integer model."""

import argparse
import atexit
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qwt2
from qwt2.errors import Qwt2Error, guarded
from qwt2.extras import extra

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import nn

    from qwt2.quantization.precision import Precision

CHECKED_IMAGES = 8


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    p = argparse.ArgumentParser(
        prog="qwt2",
        description="Quantize a trained model, compensate it, fold, and write an ONNX file for integer engines, with a "
        "report beside it (same name, .json; to read: .html).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--version", action="version", version=qwt2.__version__)
    p.add_argument("model", help="a timm name, or module:factory for a function that returns the nn.Module")
    p.add_argument("--images", required=True, type=Path, help="folder of calibration images, searched to any depth")
    p.add_argument("--output", required=True, type=Path, help="the ONNX file to write")
    p.add_argument("--checkpoint", type=Path, help="weights: safetensors, or a torch file that holds only weights")
    p.add_argument("--pretrained", action="store_true", help="timm's weights of that name (its cache, or a network)")
    p.add_argument("--num-classes", type=int, default=1000, help="of a timm model")
    p.add_argument("--method", default="repq", help="PTQ method")
    p.add_argument("--weight-bits", type=int, default=8)
    p.add_argument("--activation-bits", type=int, default=8)
    p.add_argument("--rotate", action="store_true", help="rotate the residual stream first (pre-norm transformers)")
    p.add_argument(
        "--compensation", default="cwac", help="cwac, refit (closer, takes longer), cwac_paper, qwt, qwt_global or none"
    )
    p.add_argument("--exclude", nargs="+", default=[], metavar="NAME", help="modules or patterns that stay in float")
    p.add_argument("--sensitivity", action="store_true", help="write what each module costs, .sensitivity.csv and .svg")
    p.add_argument(
        "--target-sqnr", type=float, metavar="DB",
        help="raise the most expensive modules to 8 bits, then leave them in float, until the outputs reach this SQNR",
    )  # fmt: skip
    p.add_argument("--target", default="portable", help="what the file is for: portable (CPU), openvino or tensorrt")
    p.add_argument("--opset", type=int, default=20, help="version of ONNX's operators in the file: 18 to 20")
    p.add_argument("--weight-storage", default="int8", help="int8, or int4 for weights of at most 4 bits")
    p.add_argument("--calibration-images", type=int, default=256)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--seed", type=int, default=0, help="of the choice of images")
    p.add_argument(
        "--image-size", type=_size, help="224, or 224x320 (height x width); default: the model's own, or 224"
    )
    p.add_argument("--channels", type=int, choices=(1, 3), default=3, help="of the images that a factory's model takes")
    p.add_argument(
        "--mean", nargs="+", type=float, help="of each channel, in [0, 1]; default: the model's own, or ImageNet's"
    )
    p.add_argument("--std", nargs="+", type=float, help="of each channel; default as for --mean")
    p.add_argument("--device", default="cpu", help="cpu or cuda: where the model is calibrated")
    p.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    p.add_argument(
        "--engines", nargs="*", default=["onnxruntime", "openvino"], help="to check the file on, also as a,b"
    )  # fmt: skip
    return p


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; problems that a user can repair end it with one sentence and exit code 2."""
    arguments = parser().parse_args(argv)
    arguments.engines = [name for entry in arguments.engines for name in entry.split(",") if name]
    guarded(lambda: run(arguments), silent=_rank() > 0)


def _rank() -> int:
    """Return this process's number among those of torchrun; other launchers set RANK, too."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def run(arguments: argparse.Namespace) -> None:
    """Quantize, compensate, fold and export the model, check the file on engines, and write the report.

    Args:
        arguments: options as parsed by :func:`parser`, with ``engines`` as a list of names.

    Raises:
        Qwt2Error: if an option is unknown or does not fit, or the model or the images cannot be used.
    """
    files = _choose_files(arguments)

    import torch

    from qwt2.compensation.compensate import compensate
    from qwt2.export import export_onnx
    from qwt2.folding.fold import fold
    from qwt2.io import write_json, write_text
    from qwt2.quantization.precision import Precision
    from qwt2.quantization.quantize import quantize
    from qwt2.report.page import render_model

    precision = Precision(arguments.weight_bits, arguments.activation_bits)
    _check_options(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    group = _group(arguments)
    model, settings = _build(arguments)
    model.to(arguments.device)
    batches = [batch.to(arguments.device) for batch in _batches(files, settings, arguments.batch_size)]
    progress = _Progress(3 + len(arguments.engines) + bool(arguments.target_sqnr) + arguments.sensitivity)
    bits, moves = _bits(arguments, model, batches, precision, progress)
    progress.start("quantize")
    qmodel = quantize(
        model, batches, arguments.method, target=arguments.target, rotate=arguments.rotate, progress=progress.inside,
        group=group, **bits,
    )  # fmt: skip
    fits = []
    if arguments.compensation != "none":
        progress.start("compensate")
        fits = compensate(qmodel, batches, arguments.compensation, progress=progress.inside, group=group).modules
    if _rank() > 0:
        return
    progress.start("fold and export")
    folded, model = fold(qmodel).cpu(), model.cpu()
    batches = [batches[0].cpu()]
    export_onnx(folded, arguments.output, batches[0][:1], arguments.weight_storage, arguments.opset)
    engines, mismatches = _check_engines(arguments, model, folded, batches[0][:CHECKED_IMAGES], progress)
    report = {
        "model": arguments.model, "method": arguments.method, "compensation": arguments.compensation,
        "rotate": arguments.rotate, "precision": vars(precision), "allocation": moves,
        "calibration_images": [str(file) for file in files],
        "file_bytes": arguments.output.stat().st_size, "quantized_layers": qmodel.quantization.layers,
        "quantized_products": qmodel.quantization.matmuls, "float_modules": folded.quantization.float_modules,
        "float_macs": qmodel.quantization.float_macs, "total_macs": qmodel.quantization.total_macs,
        "modules": _describe_modules(qmodel.quantization.modules, fits, mismatches), "engines": engines,
    }  # fmt: skip
    progress.close()
    write_json(arguments.output.with_suffix(".json"), report)
    page = arguments.output.with_suffix(".html")
    write_text(page, render_model(report))
    _print_summary(arguments.output, page, report)


def _group(arguments: argparse.Namespace) -> "dist.ProcessGroup | None":
    """Join the other processes of torchrun, if it started this one, and take a GPU for each."""
    import torch
    import torch.distributed as dist

    if not dist.is_torchelastic_launched():
        return None
    if on_gpu := arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    atexit.register(dist.destroy_process_group)
    return dist.group.WORLD


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work, before it costs the work that comes before it."""
    import torch

    from qwt2.compensation.methods import COMPENSATIONS
    from qwt2.engines import check_engine
    from qwt2.onnx.export import check_format

    if arguments.rotate and (arguments.sensitivity or arguments.target_sqnr):
        raise Qwt2Error("--rotate: --sensitivity and --target-sqnr measure the model without rotation; leave it out")
    check_format(arguments.target, arguments.weight_storage, arguments.opset)
    for engine in arguments.engines:
        check_engine(engine)
    if arguments.compensation != "none":
        COMPENSATIONS.get(arguments.compensation)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise Qwt2Error(f"--device {arguments.device}: PyTorch sees no GPU here; leave the option out")


def _bits(
    arguments: argparse.Namespace,
    model: "nn.Module",
    batches: list["torch.Tensor"],
    precision: "Precision",
    progress: "_Progress",
) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `quantize` that say how many bits each module gets, and what was decided for it."""
    from qwt2.quantization.allocation import allocate
    from qwt2.quantization.sensitivity import sensitivity

    how = {"target": arguments.target, "exclude": arguments.exclude}
    if arguments.sensitivity:
        from qwt2.report.sensitivity import write_sensitivity

        progress.start("sensitivity")
        costs = sensitivity(model, batches, arguments.method, precision, **how)
        write_sensitivity(costs, arguments.output.with_suffix(".sensitivity"))
    if not arguments.target_sqnr:
        return {"precision": precision, "exclude": arguments.exclude}, []
    progress.start("allocate")
    found = allocate(model, batches, arguments.method, precision, sqnr_db=arguments.target_sqnr, **how)
    return found.settings, list(found.moves)


def _describe_modules(kinds: dict[str, str], fits: list, mismatches: dict[str, dict]) -> list[dict[str, Any]]:
    """Return one record per quantized module or compensated block: its fit, and its mismatch on each engine."""
    from qwt2.report.results import fit_record

    fitted = {fit.module: fit_record(fit) for fit in fits}
    blocks = dict.fromkeys((name for name in fitted if name not in kinds), "block")
    return [
        {"module": name, "kind": kind, **fitted.get(name, {}),
         "mismatch": {engine: vars(found[name]) for engine, found in mismatches.items() if name in found}}
        for name, kind in (blocks | kinds).items()
    ]  # fmt: skip


class _Progress:
    """A progress bar over named steps; it is not shown if the output is not a terminal."""

    def __init__(self, steps: int):
        from tqdm import tqdm

        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        disable = True if _rank() else None
        self._bar = tqdm(total=steps, disable=disable, leave=False, bar_format=layout)
        self._done, self._started = 0, False

    def start(self, step: str) -> None:
        """Finish the previous step and start this one."""
        self._done += self._started
        self._bar.n = self._done
        self._bar.set_description(step)
        self._started = True

    def inside(self, done: int, modules: int) -> None:
        """Report that ``done`` of the current step's modules are finished."""
        self._bar.n = self._done + done / modules
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def _choose_files(arguments: argparse.Namespace) -> list[Path]:
    import numpy as np

    from qwt2.data.imagefolder import SUFFIXES

    for name in ("calibration_images", "batch_size"):
        if getattr(arguments, name) < 1:
            raise Qwt2Error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; give at least 1")
    if arguments.output.suffix != ".onnx":
        raise Qwt2Error(f"--output {arguments.output} must end with .onnx")
    if not arguments.output.resolve().parent.is_dir():
        raise Qwt2Error(f"{arguments.output.resolve().parent} is no folder; make it first, or correct --output")
    if not arguments.images.is_dir():
        raise Qwt2Error(f"{arguments.images} is no folder; --images must name a folder that holds images")
    files = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < arguments.calibration_images:
        raise Qwt2Error(
            f"{arguments.images} holds {len(files)} images, fewer than --calibration-images "
            f"{arguments.calibration_images}; add images or ask for fewer"
        )
    chosen = np.random.default_rng(arguments.seed).permutation(len(files))[: arguments.calibration_images]
    return [files[index] for index in chosen]


def _build(arguments: argparse.Namespace) -> tuple["nn.Module", dict[str, Any]]:
    """Return the model, and the settings of the transform that its images need."""
    from qwt2.classification.models import build_model, call_factory, load_weights
    from qwt2.data.transforms import IMAGENET, transform_config

    size = {"input_size": (3, *arguments.image_size)} if arguments.image_size else {}
    if ":" in arguments.model:
        if arguments.pretrained:
            raise Qwt2Error("--pretrained is for timm's models; let the factory load its weights, or give --checkpoint")
        model = call_factory(arguments.model)
        if arguments.checkpoint:
            load_weights(model, arguments.checkpoint)
        return model.eval(), _normalized(IMAGENET | size, arguments)
    if not (arguments.checkpoint or arguments.pretrained):
        raise Qwt2Error("a timm model needs weights: give --checkpoint FILE or --pretrained")
    cfg = {
        "name": arguments.model, "timm": arguments.model, "kwargs": {}, "num_classes": arguments.num_classes,
        "pretrained": arguments.pretrained, "checkpoint": arguments.checkpoint,
    }  # fmt: skip
    model = build_model(cfg)
    return model, _normalized(transform_config(cfg) | size, arguments)


def _normalized(settings: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the transform's settings with the requested mean, standard deviation and number of channels."""
    channels = settings["input_size"][0] if ":" not in arguments.model else arguments.channels
    found = {**settings, "input_size": (channels, *settings["input_size"][1:])}
    for name in ("mean", "std"):
        given = getattr(arguments, name) or ([sum(found[name]) / len(found[name])] if channels == 1 else found[name])
        if len(given) not in (1, channels):
            raise Qwt2Error(f"--{name} gives {len(given)} values for {channels} channels; give one for each, or one")
        found[name] = tuple(given) * (channels // len(given))
    return found


def _batches(files: list[Path], settings: dict[str, Any], batch_size: int) -> Iterator["torch.Tensor"]:
    import torch
    from tqdm import tqdm

    with extra("timm"):
        from timm.data import create_transform

    from qwt2.data.imagefolder import read_image

    transform = create_transform(**settings, is_training=False)
    mode = "L" if settings["input_size"][0] == 1 else "RGB"
    images = torch.stack(
        [transform(read_image(file, mode)) for file in tqdm(files, "images", disable=_rank() > 0 or None, leave=False)]
    )
    yield from images.split(batch_size)


def _check_engines(
    arguments, model: "nn.Module", folded: "nn.Module", images: "torch.Tensor", progress
) -> tuple[dict[str, Any], dict[str, dict]]:
    """Compare each engine with the models.

    Returns:
        Per engine, figures on its logits against full precision; and per engine and module, the mismatch with the
        simulation.
    """
    import torch

    from qwt2.engines import load_engine
    from qwt2.engines.operations import count_operations
    from qwt2.evaluation.metrics import agreement_percent, sqnr_db
    from qwt2.evaluation.mismatch import engine_mismatch, record_modules
    from qwt2.onnx.file import load_onnx

    with torch.no_grad():
        exact, simulated = model(images).numpy(), folded(images).numpy()
    records, checked, all_mismatches = record_modules(folded, images[:1]), {}, {}
    for name in arguments.engines:
        progress.start(f"check on {name}")
        engine = load_engine(arguments.output, name)
        logits: Any = engine(images.numpy())
        mismatches = all_mismatches[name] = engine_mismatch(load_onnx(arguments.output), name, records)
        worst = max(mismatches, key=lambda module: mismatches[module].steps)
        checked[name] = {
            "agreement_with_fp32_percent": agreement_percent(logits, exact),
            "logits_sqnr_db": sqnr_db(logits, exact),
            "simulation_logits_sqnr_db": sqnr_db(simulated, exact),
            "images": len(images),
            "worst_module": worst,
            "mismatch_steps": mismatches[worst].steps,
            "mismatch_fraction": max(m.fraction for m in mismatches.values()),
            "operations": count_operations(engine.session(len(images)).operations()),
        }
    return checked, all_mismatches


def _print_summary(output: Path, report_path: Path, report: dict[str, Any]) -> None:
    print(f"{output}: {report['file_bytes'] / 1e6:.1f} MB, {len(report['quantized_layers'])} layers and "
          f"{len(report['quantized_products'])} products in integers")  # fmt: skip
    for name, reason in report["float_modules"].items():
        share = 100 * report["float_macs"].get(name, 0) / report["total_macs"]
        print(f"in float: {name or 'the model itself'} ({reason}), {share:.1f} % of the multiply-accumulates")
    for move in report["allocation"]:
        print(f"allocated: {move}")
    for name, figures in report["engines"].items():
        print(f"{name}: logits SQNR {figures['logits_sqnr_db']:.1f} dB against fp32 on {figures['images']} images; "
              f"modules within {figures['mismatch_steps']:.2f} steps of the simulation")  # fmt: skip
        for kind, counts in figures["operations"].items():
            print(f"  {kind}: {', '.join(f'{count} {operation}' for operation, count in counts.items())}")
    print(f"report: {report_path}")


if __name__ == "__main__":
    main()
