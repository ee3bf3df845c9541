"""Stage `evaluate`: accuracy, mismatch and latency of one cell on the integer engines; imports no torch."""

from functools import partial

import numpy as np

from pipeline.parallel import watched
from pipeline.stage import Cell, run_stage
from qwt2 import machine
from qwt2.data import open_dataset
from qwt2.engines import load_engine
from qwt2.io import load_arrays, read_array, read_json, write_json
from qwt2.latency import measure_latency
from qwt2.metrics import agreement_percent, sqnr_db, topk_percent
from qwt2.mismatch import Mismatch, engine_mismatch
from qwt2.onnx_file import load_onnx
from qwt2.operations import count_operations
from qwt2.results import UNITS, Row, write_layers, write_rows


def main(cfg, cell: Cell) -> None:
    dataset = open_dataset(cfg["data"], cell.data / cfg["data"]["name"], cfg["model"])
    evaluation = Evaluation(cfg, cell, dataset)
    rows = evaluation.simulated() + evaluation.compensation_costs() + evaluation.folding()
    for engine in cfg["evaluate"]["engines"]:
        rows += evaluation.on_engine(engine) + evaluation.latency(engine)
    write_rows(cell.folder("evaluate") / "rows.csv", rows)
    write_layers(cell.folder("evaluate") / "layers.csv", evaluation.layers(), cfg["evaluate"]["engines"])
    write_json(cell.folder("evaluate") / "operations.json", evaluation.operations())
    write_json(cell.folder("evaluate") / "machine.json", machine.describe())


class Evaluation:
    """Figures of one cell. Methods are named as in the results: `repq`, `repq+cwac`, `repq_published`, ..."""

    def __init__(self, cfg, cell: Cell, dataset):
        self.cfg, self.cell, self.dataset = cfg, cell, dataset
        self.labels = dataset.labels("val")
        self.reference = read_array(cell.baseline / "logits.npy")
        self.seeds, self.compensations = cfg["seeds"], cfg["compensations"]
        self.methods, self.exported = ["ptq", *self.compensations], ["ptq", *cfg["exported"]]
        self.mismatches: dict[tuple[str, str], dict[str, Mismatch]] = {}  # of (method, engine), as they are measured

    def label(self, method: str, variant: str = "default") -> str:
        name = self.cfg["ptq"]["method"] + ("" if variant == "default" else f"_{variant}")
        return name if method == "ptq" else f"{name}+{method}"

    def row(self, method: str, engine: str, metric: str, values, variant: str = "default") -> Row:
        """One figure; several values are its seeds."""
        values = np.atleast_1d(np.asarray(values, dtype=np.float64))
        std = float(values.std(ddof=1)) if len(values) > 1 else None
        cfg = self.cfg
        return Row(
            "classification", cfg["data"]["name"], cfg["model"]["name"], cfg["precision"]["name"],
            self.label(method, variant), engine, metric, float(values.mean()), std, UNITS[metric], len(values),
        )  # fmt: skip

    def accuracy(self, method: str, engine: str, logits: list[np.ndarray], variant: str = "default") -> list[Row]:
        figures = {
            "top1": [topk_percent(z, self.labels, 1) for z in logits],
            "top5": [topk_percent(z, self.labels, 5) for z in logits],
            "agreement": [agreement_percent(z, self.reference) for z in logits],
            "logits_sqnr_db": [sqnr_db(z, self.reference) for z in logits],
        }
        return [self.row(method, engine, metric, values, variant) for metric, values in figures.items()]

    def simulated_logits(self, method: str, variant: str = "default") -> list[np.ndarray]:
        return [read_array(self.cell.quantized(variant, method, s).with_suffix(".npy")) for s in self.seeds]

    def simulated(self) -> list[Row]:
        """Accuracy of the unfolded simulation, every variant."""
        return [
            row
            for variant in self.cfg["ptq"]["variants"]
            for method in self.methods
            for row in self.accuracy(method, "torch", self.simulated_logits(method, variant), variant)
        ]

    def compensation_costs(self) -> list[Row]:
        """Time and memory that fitting took."""
        rows = []
        for variant in self.cfg["ptq"]["variants"]:
            for name in self.compensations:
                records = [r for r in self.fits if (r["variant"], r["compensation"]) == (variant, name)]
                for metric, key in (("compensate_seconds", "seconds"), ("peak_memory_mb", "peak_memory_mb")):
                    rows.append(self.row(name, "torch", metric, [r[key] for r in records], variant))
        return rows

    def folding(self) -> list[Row]:
        """Folded against unfolded modules, and what each exported method stores and computes beyond plain PTQ."""
        facts = read_json(self.cell.folder("fold") / "facts.json")
        by_method = {m: [f for f in facts if f["method"] == m] for m in self.exported}
        base = by_method["ptq"][0]
        rows = []
        for method, entries in by_method.items():
            worst = Mismatch.worst([Mismatch(**entry["fold_mismatch"]) for entry in entries])
            rows += self.mismatch_rows(method, "torch", worst)
            for metric, key in (("extra_params", "stored_numbers"), ("extra_macs", "multiply_accumulates")):
                rows.append(self.row(method, "torch", metric, [e[key] - base[key] for e in entries]))
        return rows

    def mismatch_rows(self, method: str, engine: str, worst: Mismatch) -> list[Row]:
        return [
            self.row(method, engine, "engine_mismatch_steps", worst.steps),
            self.row(method, engine, "engine_mismatch_fraction", worst.fraction),
        ]

    def on_engine(self, engine: str) -> list[Row]:
        """Accuracy of the exported methods on an integer engine, its distance from the simulation, and file sizes."""
        rows = []
        for method in watched(f"evaluate on {engine}", self.exported, [[method] for method in self.exported]):
            paths = [self.onnx(method, seed) for seed in self.seeds]
            logits = [self.engine_logits(path, engine) for path in paths]
            rows += self.accuracy(method, engine, logits)
            simulated = [topk_percent(z, self.labels, 1) for z in self.simulated_logits(method)]
            delta = [topk_percent(z, self.labels, 1) - s for z, s in zip(logits, simulated)]
            rows.append(self.row(method, engine, "engine_top1_delta", delta))
            rows.append(self.row(method, engine, "file_bytes", [p.stat().st_size for p in paths]))
            records = load_arrays(paths[0].with_suffix(".records.safetensors"))
            mismatches = engine_mismatch(load_onnx(paths[0]), engine, records, self.cfg["threads"])
            self.mismatches[method, engine] = mismatches
            rows += self.mismatch_rows(method, engine, Mismatch.worst(list(mismatches.values())))
        return rows

    def engine_logits(self, path, engine: str) -> np.ndarray:
        model = load_engine(path, engine, self.cfg["threads"])
        batches = self.dataset.array_batches("val", self.cfg["evaluate"]["batch_size"])
        return np.concatenate([model(images) for images, _ in batches])

    def latency(self, engine: str) -> list[Row]:
        """Latency of every exported method, interleaved in one run."""
        settings = self.cfg["evaluate"]["latency"]
        images, _ = next(self.dataset.array_batches("val", settings["batch_size"]))
        calls = {
            method: [partial(load_engine(self.onnx(method, s), engine, settings["threads"]), images) for s in self.seeds]
            for method in self.exported
        }
        measured = measure_latency(calls, base="ptq", repeats=settings["repeats"])
        return [
            self.row(method, engine, metric, value)
            for method, latency in measured.items()
            for metric, value in (
                ("latency_ms", latency.wall_ms),
                ("latency_cpu_ms", latency.cpu_ms),
                ("latency_ratio_to_ptq", latency.ratio),
            )
        ]

    def onnx(self, method: str, seed: int):
        return self.cell.folder("fold") / f"{method}-seed{seed}.onnx"

    def layers(self) -> list[dict]:
        """What is known of each module: one record a method, seed and module or block."""
        records = {}
        for fit in self.fits:
            label = self.label(fit["compensation"], fit["variant"])
            for module in fit["modules"]:
                kind = self.facts("ptq")["modules"].get(module["module"], "block")
                records[label, fit["seed"], module["module"]] = module | {"kind": kind}
        for (method, engine), mismatches in self.mismatches.items():
            for module, kind in self.facts(method)["modules"].items():
                record = records.setdefault((self.label(method), self.seeds[0], module), {"kind": kind})
                record[f"{engine}_steps"] = mismatches[module].steps
                record[f"{engine}_fraction"] = mismatches[module].fraction
        model, precision = self.cfg["model"]["name"], self.cfg["precision"]["name"]
        return [
            record | {"model": model, "precision": precision, "method": method, "seed": seed, "module": module}
            for (method, seed, module), record in records.items()
        ]

    def operations(self) -> dict:
        """What plain PTQ's file runs in integers and in float on each engine, and the modules left in float."""
        counts = {}
        for engine in self.cfg["evaluate"]["engines"]:
            session = load_engine(self.onnx("ptq", self.seeds[0]), engine, self.cfg["threads"]).session(1)
            counts[engine] = count_operations(session.operations())
        return {"operations": counts, "float_modules": self.facts("ptq")["float_modules"]}

    def facts(self, method: str) -> dict:
        """What stage `fold` knows of a method's model at the first seed."""
        facts = read_json(self.cell.folder("fold") / "facts.json")
        return next(f for f in facts if (f["method"], f["seed"]) == (method, self.seeds[0]))

    @property
    def fits(self) -> list[dict]:
        return read_json(self.cell.folder("compensate") / "report.json")


if __name__ == "__main__":
    run_stage("evaluate", main)
