"""Take every full-size detector of ``conf/model`` through the library, with random weights and small random images.

The benchmark shows that each detector is built, quantized, compensated, folded, exported part by part and run on every
engine, and what that takes. Images are small because only the time depends on their size. Random weights say nothing
about accuracy.
"""

import gc
import json
import tempfile
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from benchmarks.architectures import PRECISION, THREADS, figures, timed
from pipeline.build.compose import CONF, compose_cell
from pipeline.common.resources import PeakMemory
from pipeline.tasks.detection import part_exporters
from qwt2 import compensate, fold, quantize
from qwt2.capture.batch import Inputs
from qwt2.detection.models import build_detector
from qwt2.detection.network import Detector, parts, regions
from qwt2.evaluation import machine
from qwt2.evaluation.mismatch import Mismatch, engine_mismatch, fold_mismatch, record_modules
from qwt2.io import write_csv
from qwt2.onnx.file import load_onnx

RESULT = Path("results/benchmarks/detectors.csv")
ENGINES = ("onnxruntime", "openvino")
SIZE, REGIONS, MASK_REGIONS = (128, 160), 4, 2


def main() -> None:
    torch.set_num_threads(THREADS)
    rows = []
    for name in tqdm(full_size_detectors(), desc="detectors"):
        rows.append(measure(name))
        write_csv(RESULT, rows)  # after each detector, because one takes minutes


def full_size_detectors() -> list[str]:
    configurations = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CONF / "model").glob("*.yaml"))}
    return [name for name, cfg in configurations.items() if "mmdet" in cfg and cfg["train"] is None]


def measure(name: str) -> dict:
    cfg = compose_cell([f"model={name}", "data.path=not read"])
    method = cfg["ptq"]["method"]
    network = Detector(build_detector(cfg["model"] | {"checkpoint": None})).eval()
    batches = [calibration_batch(network, seed) for seed in range(2)]
    wanted = parts(network.detector, cfg["model"]["parts"])
    seconds: dict[str, float] = {}
    with PeakMemory() as memory, tempfile.TemporaryDirectory() as folder, torch.no_grad():
        qmodel = timed(
            seconds, "quantize", lambda: quantize(network, batches, method, PRECISION, observer_images=2, parts=wanted)
        )
        timed(seconds, "compensate", lambda: compensate(qmodel, batches, "cwac"))
        folded = timed(seconds, "fold", lambda: fold(qmodel))
        exporters = part_exporters(qmodel, batches[0])
        files = {part: Path(folder) / f"{part}.onnx" for part in exporters}
        timed(seconds, "export", lambda: [exporter.export(folded, files[part]) for part, exporter in exporters.items()])
        row = {
            "model": name, "mmdet": cfg["model"]["mmdet"], "method": f"{method}+cwac",
            "parameters": sum(p.numel() for p in network.parameters()), "files": len(files),
            "file_bytes": sum(path.stat().st_size for path in files.values()),
            "quantized_layers": len(qmodel.quantization.layers), "quantized_products": len(qmodel.quantization.matmuls),
            "float_modules": len(qmodel.quantization.float_modules),
        }  # fmt: skip
        row |= figures("fold", Mismatch.worst(list(fold_mismatch(qmodel, folded, batches[0]).values())))
        records = record_modules(folded, batches[0])
        of_part = {
            part: {key: array for key, array in records.items() if exporter.holds(key)}
            for part, exporter in exporters.items()
        }
        del qmodel, folded, network
        gc.collect()
        for engine in ENGINES:
            found: list[Mismatch] = []
            for part, path in files.items():
                found += engine_mismatch(load_onnx(path), engine, of_part[part], THREADS).values()
            row |= figures(engine, Mismatch.worst(found))
    row |= {f"{step}_seconds": round(value, 2) for step, value in seconds.items()}
    described = machine.describe()
    row |= {"peak_memory_mb": round(memory.megabytes), "threads": THREADS, "cpu": described["cpu"]}
    row["instruction_sets"] = " ".join(described["instruction_sets"])
    row["versions"] = json.dumps(described["versions"])
    return row


def calibration_batch(network: Detector, seed: int) -> Inputs:
    """Return one random image and the regions that the detector chooses in it."""
    from mmdet.structures import DetDataSample

    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    facts = {"img_shape": SIZE, "ori_shape": SIZE, "batch_input_shape": SIZE, "scale_factor": (1.0, 1.0)}
    return regions(network.detector, images, [DetDataSample(metainfo=facts)], REGIONS, MASK_REGIONS)


if __name__ == "__main__":
    main()
