"""Figures of one cell: accuracy, mismatch, costs and latency of every method, in simulation and on the engines."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.parallel import each
from pipeline.common.stage import Cell, ptq_label, ptq_methods
from pipeline.tasks import Figures, open_task
from qwt2.engines import load_engine
from qwt2.engines.operations import count_operations
from qwt2.evaluation.latency import measure_latency
from qwt2.evaluation.mismatch import Mismatch, engine_mismatch
from qwt2.io import load_arrays, read_json
from qwt2.onnx.file import load_onnx
from qwt2.report.compensations import heading
from qwt2.report.metrics import METRICS
from qwt2.report.results import Row

# Metric -> key in the record of a fit.
_COSTS = {"compensate_seconds": "seconds", "peak_memory_mb": "peak_memory_mb", "added_modules": "added_modules"}


@dataclass(frozen=True)
class Measured:
    """Measurements of one method on one engine at one calibration seed.

    Attributes:
        figures: accuracy.
        mismatches: module -> its distance from the simulation; only at the first seed.
        operations: counts of operations in integers and in float; only for plain PTQ at the first seed.
    """

    figures: Figures
    mismatches: dict[str, Mismatch] = field(default_factory=dict)
    operations: dict = field(default_factory=dict)


class Evaluation:
    """Figures of one cell. Methods are named as in the results: ``repq``, ``repq+cwac``, ``repq_published``, ..."""

    def __init__(self, cfg: Any, cell: Cell):
        self.cfg, self.cell = cfg, cell
        self.task = open_task(cfg, cell)
        self.task.load_for_engines()
        self.seeds, self.compensations = cfg["seeds"], cfg["compensations"]
        self.methods = ["ptq", *self.compensations]
        self.exported = list(dict.fromkeys(record["method"] for record in self.folded))

    def label(self, method: str, ptq: str | None = None) -> str:
        """Return a method's name in tables; ``ptq`` is by default the PTQ method that engines run."""
        ptq = ptq_label(self.cfg["ptq"], ptq or self.cfg["ptq"]["method"])
        return ptq if method == "ptq" else f"{ptq}+{method}"

    def row(self, method: str, engine: str, metric: str, values, ptq: str | None = None) -> Row:
        """Make one row of the results: the mean of ``values``, and their deviation if there are several seeds."""
        values = np.atleast_1d(np.asarray(values, dtype=np.float64))
        std = float(values.std(ddof=1)) if len(values) > 1 else None
        cfg = self.cfg
        return Row(
            self.task.NAME, cfg["data"]["name"], cfg["model"]["name"], cfg["precision"]["name"],
            self.label(method, ptq), engine, metric, float(values.mean()), std, METRICS[metric].unit, len(values),
        )  # fmt: skip

    def rows_of(
        self, method: str, engine: str, figures: Mapping[str, list[float]], ptq: str | None = None
    ) -> list[Row]:
        """Make one row per metric of ``figures``: metric -> its values, one per seed."""
        return [self.row(method, engine, metric, values, ptq) for metric, values in figures.items()]

    def simulated(self) -> list[Row]:
        """Return the accuracy of the unfolded simulation, for every PTQ method."""
        return [
            row
            for ptq in ptq_methods(self.cfg)
            for method in self.methods
            for row in self.rows_of(method, "torch", by_metric(self.simulated_figures(method, ptq)), ptq)
        ]

    def simulated_figures(self, method: str, ptq: str) -> list[Figures]:
        """Return the figures of one method in simulation, one entry per seed."""
        return [self.task.figures(self.cell.quantized(ptq, method, seed)) for seed in self.seeds]

    def scores(self) -> dict[str, np.ndarray]:
        """Return the scores of every simulated method, (seeds, images), and of the full-precision model, (1, images).

        An image's score is its part in the task's main figure; see :meth:`pipeline.tasks.Task.scores`.
        """
        found = {"fp32": [self.task.scores(self.cell.predictions)]}
        found |= {
            self.label(method, ptq): [self.task.scores(self.cell.quantized(ptq, method, seed)) for seed in self.seeds]
            for ptq in ptq_methods(self.cfg)
            for method in self.methods
        }
        return {name: np.stack(values) for name, values in found.items()}

    def calibration_costs(self) -> list[Row]:
        """Return the time and memory that calibration took, and the number of modules that compensation added."""
        quantized = read_json(self.cell.folder("quantize") / "quantized.json")
        rows = []
        for ptq in ptq_methods(self.cfg):
            seconds = [record["seconds"] for record in quantized if record["ptq"] == ptq]
            rows.append(self.row("ptq", "torch", "quantize_seconds", seconds, ptq))
            for name in self.compensations:
                records = [r for r in self.fits if (r["ptq"], r["compensation"]) == (ptq, name)]
                for metric, key in _COSTS.items():
                    rows.append(self.row(name, "torch", metric, [r[key] for r in records], ptq))
        return rows

    def folding(self) -> list[Row]:
        """Return how far folding moved modules, and what each exported method stores and computes beyond plain PTQ."""
        by_method = {m: [f for f in self.folded if f["method"] == m] for m in self.exported}
        rows = []
        for method, entries in by_method.items():
            base = by_method["ptq"][0]
            worst = Mismatch.worst([Mismatch(**entry["fold_mismatch"]) for entry in entries])
            rows += self.mismatch_rows(method, "torch", worst)
            for metric, key in (("extra_params", "stored_numbers"), ("extra_macs", "multiply_accumulates")):
                rows.append(self.row(method, "torch", metric, [e[key] - base[key] for e in entries]))
        return rows

    def mismatch_rows(self, method: str, engine: str, worst: Mismatch) -> list[Row]:
        """Make the rows of a method's largest mismatch."""
        return [
            self.row(method, engine, "engine_mismatch_steps", worst.steps),
            self.row(method, engine, "engine_mismatch_fraction", worst.fraction),
        ]

    def on_engine(self, engine: str) -> list[Row]:
        """Return the exported methods' accuracy on an engine, its difference from the simulation, and file sizes."""
        rows = []
        for method in self.exported:
            found = [dict(self.measured[method, engine, seed].figures) for seed in self.seeds]
            for figures, simulated in zip(found, self.simulated_figures(method, self.cfg["ptq"]["method"])):
                figures |= {
                    delta: figures[metric] - simulated[metric]
                    for metric, delta in self.task.DELTAS.items()
                    if metric in figures
                }
            rows += self.rows_of(method, engine, by_metric(found))
            files = [[self.cell.onnx(method, seed, part) for part in self.task.files()] for seed in self.seeds]
            rows.append(
                self.row(method, engine, "file_bytes", [sum(path.stat().st_size for path in paths) for paths in files])
            )
            mismatches = self.measured[method, engine, self.seeds[0]].mismatches
            rows += self.mismatch_rows(method, engine, Mismatch.worst(list(mismatches.values())))
        return rows

    @cached_property
    def measured(self) -> dict[tuple[str, str, int], Measured]:
        """Measurements by method, engine and seed."""
        # Longest jobs first, so that the workers finish together: the first seed also measures mismatches, and later
        # engines compile longer.
        engines = list(reversed(self.cfg["evaluate"]["engines"]))
        runs = [(method, engine, seed) for seed in self.seeds for engine in engines for method in self.exported]
        return dict(zip(runs, each("evaluate on engines", self.measure, runs, self.cfg["workers"])))

    def measure(self, run: tuple[str, str, int]) -> Measured:
        """Measure one (method, engine, seed): accuracy, and at the first seed also mismatches and operations."""
        method, engine, seed = run
        files = {part: self.cell.onnx(method, seed, part) for part in self.task.scored_files(seed)}
        engines = {part: load_engine(path, engine, self.cfg["threads"]) for part, path in files.items()}
        figures = self.task.engine_figures(engines)
        if seed != self.seeds[0]:
            return Measured(figures)
        counted = {}
        if method == "ptq":  # every method's files have the same operations
            counted = count_operations([operation for model in engines.values() for operation in model.operations()])
        return Measured(figures, self.measure_mismatches(list(files.values()), engine), counted)

    def measure_mismatches(self, files: list[Path], engine: str) -> dict[str, Mismatch]:
        """Return each module's distance from the simulation, over all files."""
        found: dict[str, Mismatch] = {}
        for path in files:
            records = load_arrays(path.with_suffix(".records.safetensors"))
            found |= engine_mismatch(load_onnx(path), engine, records, self.cfg["threads"])
        return found

    def latency(self, engine: str) -> list[Row]:
        """Measure the latency of every exported method, all methods interleaved in one run."""
        settings = self.cfg["evaluate"]["latency"]
        inputs = self.task.latency_input(settings["batch_size"])

        def compiled(path: Path) -> Callable:
            model = load_engine(path, engine, settings["threads"])
            model.session(settings["batch_size"])
            return partial(model, inputs)

        # Methods are compiled in turn, forwards and backwards: memory that was allocated earlier may be a few percent
        # faster.
        seeds = islice(cycle(self.seeds), settings["instances"])
        runs = [(method, seed) for turn, seed in enumerate(seeds) for method in self.exported[:: -1 if turn % 2 else 1]]
        with ThreadPoolExecutor(self.cfg["workers"]) as pool:
            models = list(pool.map(compiled, [self.cell.onnx(method, seed, self.task.TIMED) for method, seed in runs]))
        calls = {name: [model for (method, _), model in zip(runs, models) if method == name] for name in self.exported}
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

    def write_pictures(self, path: Path) -> None:
        """Draw the predictions of fp32, plain PTQ and each compensation side by side."""
        headings = {"ptq": heading(""), **{name: heading(name) for name in self.compensations}}
        ptq, seed = self.cfg["ptq"]["method"], self.seeds[0]
        quantized = {text: self.cell.quantized(ptq, name, seed) for name, text in headings.items()}
        self.task.write_pictures(path, {"fp32": self.cell.predictions} | quantized)

    def layers(self) -> list[dict]:
        """Return one record per method, seed and module (or block), with all that was measured of it."""
        kinds: dict[str, str] = self.facts["modules"]
        records: dict[tuple[str, int, str], dict] = {}
        for fit in self.fits:
            label = self.label(fit["compensation"], fit["ptq"])
            for module in fit["modules"]:
                records[label, fit["seed"], module["module"]] = module | {"kind": kinds.get(module["module"], "block")}
        for (method, engine, seed), measured in self.measured.items():
            if seed != self.seeds[0]:
                continue
            for module, kind in kinds.items():
                record = records.setdefault((self.label(method), seed, module), {"kind": kind})
                if module in measured.mismatches:
                    record[f"{engine}_steps"] = measured.mismatches[module].steps
                    record[f"{engine}_fraction"] = measured.mismatches[module].fraction
        model, precision = self.cfg["model"]["name"], self.cfg["precision"]["name"]
        return [
            record | {"model": model, "precision": precision, "method": method, "seed": seed, "module": module}
            for (method, seed, module), record in records.items()
        ]

    def operations(self) -> dict:
        """Return the operations of plain PTQ's files on each engine, and the modules left in float."""
        first = self.seeds[0]
        counts = {engine: self.measured["ptq", engine, first].operations for engine in self.cfg["evaluate"]["engines"]}
        return {"operations": counts, "float_modules": self.facts["float_modules"]}

    @cached_property
    def facts(self) -> dict[str, dict[str, str]]:
        """The kinds of quantized modules, and why others stay in float, as stage ``quantize`` wrote them."""
        return read_json(self.cell.folder("quantize") / "modules.json")

    @cached_property
    def folded(self) -> list[dict]:
        """The records that stage ``quantize`` wrote, one per exported model."""
        return read_json(self.cell.folder("quantize") / "folded.json")

    @cached_property
    def fits(self) -> list[dict]:
        """The records that stage ``quantize`` wrote, one per fit."""
        return read_json(self.cell.folder("quantize") / "fits.json")


def by_metric(records: list[Figures]) -> dict[str, list[float]]:
    """Return metric -> its values, one per seed that has it."""
    return {metric: [record[metric] for record in records if metric in record] for metric in records[0]}
