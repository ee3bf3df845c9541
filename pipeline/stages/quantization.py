"""The quantized models of one cell: plain PTQ, every compensation of it, and the files that integer engines run."""

import time
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.common.parallel import each
from pipeline.common.resources import PeakMemory
from pipeline.common.stage import Cell, ptq_methods
from pipeline.tasks import open_task
from qwt2 import Precision, compensate, fold, load_quantized, quantize, save_quantized
from qwt2.capture.batch import Inputs, first
from qwt2.capture.graph import GraphModel
from qwt2.compensation.blocks import compensated_blocks
from qwt2.compensation.methods import COMPENSATIONS
from qwt2.evaluation.costs import multiply_accumulates, stored_numbers
from qwt2.evaluation.mismatch import Mismatch, fold_mismatch, record_modules
from qwt2.io import save_arrays
from qwt2.report.results import fit_record

PTQ = "ptq"  # the method without compensation, in file names and records


class Quantization:
    """The work of stage ``quantize``. Each step stores its models in the cell's folder; the next step reads them."""

    def __init__(self, cfg: Any, cell: Cell):
        self.cfg, self.cell = cfg, cell
        self.task = open_task(cfg, cell)
        self.network = self.task.baseline()
        self.captured = self.task.captured(self.network)
        self.seeds, self.methods, self.workers = cfg["seeds"], ptq_methods(cfg), cfg["workers"]
        self.deployed = cfg["ptq"]["method"]  # the PTQ method that engines run

    def quantize(self) -> list[dict[str, Any]]:
        """Quantize by every PTQ method at every calibration seed, without compensation, and store the predictions.

        Returns:
            One record per model: the time in seconds.
        """
        runs = [(ptq, PTQ, seed) for ptq in self.methods for seed in self.seeds]
        return each("quantize", self._quantize_one, runs, self.workers, then=self._predict)

    def compensate(self) -> list[dict[str, Any]]:
        """Compensate each of these models in every configured way, and store the predictions.

        Returns:
            One record per model: what was fitted, the time in seconds, and the memory in MB.
        """
        # Neighbouring jobs take about equally long, so that the workers finish together.
        runs = [(ptq, name, seed) for name in self.cfg["compensation"] for ptq in self.methods for seed in self.seeds]
        return each("compensate", self._compensate_one, runs, self.workers, then=self._predict)

    def fold(self) -> list[dict[str, Any]]:
        """Fold compensation away and export, for every method that engines run.

        The first file of each structure takes seconds to export. The others are written into copies of it, which takes
        a fraction of that.

        Returns:
            One record per method and seed: how far folding moved the modules, and what the model stores and computes.
        """
        first_of_structure = self._one_of_each_structure()
        each("export", self._export_new, first_of_structure, self.workers)
        for file, method in first_of_structure:
            self.exporters[file].learn(self.cell.onnx(method, self.seeds[0], file))
        self.exported = set(first_of_structure)
        runs = [(method, seed) for method in self.first_folded for seed in self.seeds]
        return each("fold", self._fold_one, runs, self.workers)

    def modules(self) -> dict[str, Any]:
        """Return the kinds of all quantized modules, and why others stay in float, by the modules' names."""
        info = self._quantized(self.deployed, PTQ, self.seeds[0]).quantization
        return {"modules": info.modules, "float_modules": info.float_modules}

    def _is_exportable(self, name: str) -> bool:
        """Return whether engines can run a compensation's models; others stay in simulation."""
        if name == PTQ:
            return True
        options = dict(self.cfg["compensation"][name])
        return COMPENSATIONS.get(options.pop("method"))(**options).exportable

    def _quantize_one(self, run: tuple[str, str, int]) -> dict[str, Any]:
        method, _, seed = run
        started = time.perf_counter()
        qmodel = quantize(
            self.captured,
            self.task.calibration(self.network, seed),
            method=method,
            precision=Precision(**{key: value for key, value in self.cfg["precision"].items() if key != "name"}),
            target=self.cfg["ptq"]["target"] if method == self.deployed else "portable",
            observer_images=self.cfg["calibration"]["observer_images"],
            parts=self.task.quantized_parts(self.network),
            rotate=self.cfg["ptq"]["rotate"] and method == self.deployed,
        )
        seconds = time.perf_counter() - started
        save_quantized(qmodel, self.cell.quantized(*run))
        return {"ptq": method, "seed": seed, "seconds": seconds}

    def _compensate_one(self, run: tuple[str, str, int]) -> dict[str, Any]:
        ptq, name, seed = run
        options = dict(self.cfg["compensation"][name])
        qmodel = self._quantized(ptq, PTQ, seed)
        batches = list(self.task.calibration(self.network, seed))
        with PeakMemory() as memory:
            report = compensate(qmodel, batches, options.pop("method"), **options)
        save_quantized(qmodel, self.cell.quantized(*run))
        return {
            "ptq": ptq, "compensation": name, "seed": seed, "seconds": report.seconds,
            "peak_memory_mb": memory.megabytes, "added_modules": len(compensated_blocks(qmodel)),
            "modules": [fit_record(module) for module in report.modules],
        }  # fmt: skip

    def _predict(self, run: tuple[str, str, int]) -> None:
        self.task.predict(self._quantized(*run), self.cell.quantized(*run))

    def _quantized(self, ptq: str, method: str, seed: int) -> GraphModel:
        return load_quantized(self.captured, self.cell.quantized(ptq, method, seed))

    @cached_property
    def inputs(self) -> Inputs:
        """The inputs that files are exported with and modules are compared on."""
        return self.task.mismatch_inputs(self.network)

    @cached_property
    def exporters(self) -> dict[str, Any]:
        """One exporter per file of a model, by the file's name."""
        return self.task.exporters(self.captured, self.inputs)

    @cached_property
    def first_folded(self) -> dict[str, GraphModel]:
        """Every method that engines run -> its folded model at the first seed; the workers share them."""
        methods = [name for name in self.cfg["exported"] if self._is_exportable(name)]
        return {method: fold(self._quantized(self.deployed, method, self.seeds[0])) for method in methods}

    def _one_of_each_structure(self) -> list[tuple[str, str]]:
        """Return one (file, method) per structure, among the files of the first seed."""
        chosen: dict[tuple[str, str], str] = {}
        for method, folded in self.first_folded.items():
            for file, exporter in self.exporters.items():
                chosen.setdefault((file, exporter.structure(folded)), method)
        return [(file, method) for (file, _), method in chosen.items()]

    def _export_new(self, run: tuple[str, str]) -> None:
        file, method = run
        self.exporters[file].export(self.first_folded[method], self.cell.onnx(method, self.seeds[0], file))

    def _fold_one(self, run: tuple[str, int]) -> dict[str, Any]:
        method, seed = run
        qmodel = self._quantized(self.deployed, method, seed)
        folded = self.first_folded[method] if seed == self.seeds[0] else fold(qmodel)
        for file, exporter in self.exporters.items():
            if seed != self.seeds[0] or (file, method) not in self.exported:
                exporter.export(folded, self.cell.onnx(method, seed, file))
        if seed == self.seeds[0]:
            self._record(folded, method)
        worst = Mismatch.worst(list(fold_mismatch(qmodel, folded, self.inputs).values()))
        return {
            "method": method, "seed": seed, "fold_mismatch": vars(worst), "stored_numbers": stored_numbers(folded),
            "multiply_accumulates": multiply_accumulates(folded, first(self.inputs, 1)),
        }  # fmt: skip

    def _record(self, folded: GraphModel, method: str) -> None:
        """Store the inputs and outputs of every module of a file; engines are compared with them."""
        records = record_modules(folded, self.inputs)
        for file, exporter in self.exporters.items():
            path: Path = self.cell.onnx(method, self.seeds[0], file).with_suffix(".records.safetensors")
            save_arrays(path, {name: array for name, array in records.items() if exporter.holds(name)})
