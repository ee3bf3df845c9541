"""The results table in long format, with one row per figure. It is checked when read and has one fixed written form.

There are two CSV formats: figures (:data:`COLUMNS`; an evaluated cell's ``rows.csv`` and the project's
``results/summary.csv``) and the per-module record of a compensation (:data:`LAYER_COLUMNS`; ``layers.csv``).
"""

import csv
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwt2.errors import Qwt2Error
from qwt2.io import write_csv, write_text
from qwt2.report import compensations
from qwt2.report.metrics import METRICS

COLUMNS = ("task", "dataset", "model", "precision", "method", "engine", "metric", "value", "std", "unit", "n")
# JSON has no infinity; this value in dB replaces an infinite SQNR.
EXACT_DB = 200.0
# Suffixes of column names -> quantiles of alpha and beta over a module's channels.
QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
# Figures of a compensated module besides its SQNR; empty where the compensation does not have them.
LAYER_FIGURES = (
    *("gate_before_db", "gate_after_db", "output_rms", "alpha_mean", "alpha_std", "beta_rms"),
    *(f"{name}_{suffix}" for name in ("alpha", "beta") for suffix in QUANTILES),
)
# The columns ``<engine>_steps`` and ``<engine>_fraction`` of every engine follow these.
LAYER_COLUMNS = (
    *("model", "precision", "method", "seed", "module", "kind", "sqnr_before_db", "sqnr_after_db", "kept", "reason"),
    *LAYER_FIGURES,
)
MISMATCH_SUFFIXES = ("_steps", "_fraction")


class Row(NamedTuple):
    """One figure.

    Attributes:
        task, dataset, model, precision, method, engine: what was measured.
        metric: a key of :data:`qwt2.report.metrics.METRICS`.
        value: the mean over the calibration seeds.
        std: the standard deviation over the calibration seeds; ``None`` where nothing varies.
        unit: the unit of the metric.
        n: number of calibration seeds.
    """

    task: str
    dataset: str
    model: str
    precision: str
    method: str
    engine: str
    metric: str
    value: float
    std: float | None
    unit: str
    n: int

    @property
    def key(self) -> tuple[str, ...]:
        """All columns before ``value``. The key is unique in a table, and tables are sorted by it."""
        return self[:7]


class Layer(NamedTuple):
    """One quantized module or compensated block at one calibration seed.

    Values are ``None`` where they were not measured. A product, for example, has no compensation.

    Attributes:
        model, precision, method, seed: what was measured.
        module: name of the module or block.
        kind: "layer", "product" or "block".
        sqnr_before_db, sqnr_after_db: SQNR of the output before and after compensation, in dB.
        kept: whether the gate kept the compensation.
        reason: why the gate rejected the compensation.
        figures: the figures of :data:`LAYER_FIGURES`.
        mismatch: engine -> largest difference from the simulation in output steps, and share of elements that differ;
            measured at the first seed.
    """

    model: str
    precision: str
    method: str
    seed: int
    module: str
    kind: str
    sqnr_before_db: float | None
    sqnr_after_db: float | None
    kept: bool | None
    reason: str
    figures: dict[str, float | None]
    mismatch: dict[str, tuple[float, float]]

    @property
    def record(self) -> dict[str, Any]:
        """The values by column, as in the file."""
        measured = {
            engine + suffix: value
            for engine, values in self.mismatch.items()
            for suffix, value in zip(MISMATCH_SUFFIXES, values)
        }
        return dict(zip(LAYER_COLUMNS, self)) | self.figures | measured


class Method(NamedTuple):
    """The parts of a method's name ``<ptq>[+<compensation>]``; ``compensation`` is empty if there is none."""

    ptq: str
    compensation: str

    @classmethod
    def parse(cls, name: str) -> "Method":
        """Split a method's name into its parts."""
        ptq, _, compensation = name.partition("+")
        return cls(ptq, compensation)

    @property
    def is_plain(self) -> bool:
        """Whether this is an uncompensated PTQ method that engines run."""
        return not self.compensation and not self.is_published

    @property
    def is_published(self) -> bool:
        """Whether the PTQ method follows a paper's own code, which runs in simulation only."""
        return self.ptq.endswith("_published")


class Results:
    """A table of figures with lookups by model, precision, method, engine and metric.

    Attributes:
        rows: the figures, sorted by key.
        models: names of the models.
    """

    def __init__(self, rows: Iterable[Row]):
        self.rows = sorted(rows, key=lambda row: row.key)
        self._by_key = {row.key[2:]: row for row in self.rows}
        self.models = _unique(row.model for row in self.rows)

    def get(self, model: str, precision: str, method: str, engine: str, metric: str) -> Row | None:
        """Return a figure, or ``None`` if it was not measured."""
        return self._by_key.get((model, precision, method, engine, metric))

    def of_task(self, task: str) -> "Results":
        """Return the results of one task."""
        return Results(row for row in self.rows if row.task == task)

    def fp32_top1(self, model: str) -> Row | None:
        """Return the top-1 of the float model, in percent; ``None`` if it was not measured."""
        return self.get(model, "fp32", "fp32", "torch", "top1")

    @property
    def compensations(self) -> list[str]:
        """The compensations with figures in display order; plain PTQ, the empty name, is first."""
        return sorted({"", *(Method.parse(row.method).compensation for row in self.rows)}, key=compensations.order)

    def precisions(self, model: str) -> list[str]:
        """Return the quantized precisions of a model, from many bits to few."""
        return sorted({row.precision for row in self.rows if row.model == model} - {"fp32"}, key=precision_order)

    def methods(self, model: str, precision: str) -> list[str]:
        """Return the methods of a model and precision: PTQ methods by name, each plain before compensated."""
        names = {row.method for row in self.rows if (row.model, row.precision) == (model, precision)}
        return sorted(names, key=method_order)

    def engines(self, model: str | None = None) -> list[str]:
        """Return the engines with figures, of one model or of all; the torch simulation is first."""
        names = {row.engine for row in self.rows if model in (None, row.model)}
        return sorted(names, key=lambda name: (name != "torch", name))


def precision_order(name: str) -> tuple:
    """Return a sort key: fp32, then weight and activation bits in descending order, then other names."""
    bits = re.fullmatch(r"w(\d+)a(\d+)", name)
    if name == "fp32":
        return (0,)
    return (1, -int(bits[1]), -int(bits[2]), name) if bits else (2, name)


def method_order(name: str) -> tuple:
    """Return a sort key: by PTQ method, each plain first, then with the compensations in display order."""
    method = Method.parse(name)
    return (method.ptq, compensations.order(method.compensation))


def read_rows(path: str | os.PathLike) -> list[Row]:
    """Read and check a table of figures.

    Raises:
        Qwt2Error: the file is missing or has other columns; a value is not finite or not a number; a metric is
            unknown or has another unit; or a figure occurs twice. The message names file, line and value.
    """
    rows = _read_csv(path, COLUMNS, _parse_row)
    _refuse_duplicates(rows, path)
    return rows


def write_rows(path: str | os.PathLike, rows: Iterable[Row]) -> None:
    """Write a table of figures atomically, sorted by key. Equal figures give equal bytes.

    Raises:
        Qwt2Error: :func:`read_rows` would not accept the table. Nothing is written then.
    """
    rows = sorted(rows, key=lambda row: row.key)
    for number, row in enumerate(rows, start=1):
        _check_row(row, f"{path}, row {number}")
    _refuse_duplicates(rows, path)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((*row.key, format_number(row.value), format_number(row.std), row.unit, row.n) for row in rows)
    write_text(path, buffer.getvalue())


def read_layers(path: str | os.PathLike) -> list[Layer]:
    """Read and check a per-module record. The order, which is that of execution, is kept.

    Raises:
        Qwt2Error: the file is missing, has other columns, or has a value that is not valid.
    """
    return _read_csv(path, LAYER_COLUMNS, _parse_layer, more=MISMATCH_SUFFIXES)


def write_layers(path: str | os.PathLike, records: Iterable[dict[str, Any]], engines: Sequence[str]) -> None:
    """Write a per-module record atomically.

    Args:
        path: the file.
        records: dictionaries by column. Keys without a column are left out; missing values and ``None`` stay empty.
        engines: the engines whose mismatch the records hold.
    """
    columns = [*LAYER_COLUMNS, *(engine + suffix for engine in engines for suffix in MISMATCH_SUFFIXES)]
    write_csv(path, records, columns)


def format_number(value: float | None) -> str:
    """Format a figure for a file: plain decimals, at most 4 of them, or 4 digits below 1; empty for ``None``."""
    if value is None:
        return ""
    value = float(value) + 0.0  # turns -0.0 into 0.0
    return np.format_float_positional(value, precision=4, fractional=abs(value) >= 1, trim="-")


def _read_csv(
    path: str | os.PathLike,
    columns: Sequence[str],
    parse: Callable[[dict[str, str], str], Any],
    more: Sequence[str] = (),
) -> list:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Qwt2Error(f"{path} does not exist; run the stage that writes it with `dvc repro`.") from error
    except UnicodeDecodeError as error:
        raise Qwt2Error(f"{path} is not UTF-8 text; delete it and run its stage again.") from error
    reader = csv.DictReader(io.StringIO(text), strict=True)
    names = tuple(reader.fieldnames or ())
    known, further = names[: len(columns)], names[len(columns) :]
    if known != tuple(columns) or not all(name.endswith(tuple(more)) for name in further):
        found = ",".join(reader.fieldnames or ()) or "nothing"
        raise Qwt2Error(f"{path} must have the columns {','.join(columns)}, but has {found}; run its stage again.")
    try:
        return [parse(_whole(record, where), where) for record, where in _numbered(reader, path)]
    except csv.Error as error:
        raise Qwt2Error(f"{path}, line {reader.line_num}, is not CSV ({error}); run its stage again.") from error


def _numbered(reader: csv.DictReader, path: str | os.PathLike) -> Iterable[tuple[dict[str, str], str]]:
    for record in reader:
        yield record, f"{path}, line {reader.line_num}"


def _whole(record: dict[str, str], where: str) -> dict[str, str]:
    if None in record or None in record.values():
        raise Qwt2Error(f"{where}: has too many or too few fields; run its stage again.")
    return record


def _parse_row(record: dict[str, str], where: str) -> Row:
    row = Row(
        **{name: record[name] for name in (*COLUMNS[:7], "unit")},
        value=_number(record, "value", where),
        std=_number(record, "std", where, optional=True),
        n=_integer(record, "n", where),
    )
    _check_row(row, where)
    return row


def _check_row(row: Row, where: str) -> None:
    for name, text in zip(COLUMNS, row.key):
        if not text:
            raise Qwt2Error(f"{where}: {name} is empty; every figure says what it is of.")
    if row.metric not in METRICS:
        raise Qwt2Error(f"{where}: unknown metric {row.metric!r}; known: {', '.join(METRICS)}.")
    if row.unit != METRICS[row.metric].unit:
        raise Qwt2Error(f"{where}: {row.metric} is in {row.unit!r}, but must be in {METRICS[row.metric].unit!r}.")
    if not math.isfinite(row.value):
        raise Qwt2Error(f"{where}: {row.metric} is {row.value}; only finite figures are results.")
    if row.std is not None and not (math.isfinite(row.std) and row.std >= 0):
        raise Qwt2Error(f"{where}: std of {row.metric} is {row.std}; leave it empty or give a finite one from 0 up.")
    if row.n < 1:
        raise Qwt2Error(f"{where}: n of {row.metric} is {row.n}; a figure comes from at least one measurement.")


def _refuse_duplicates(rows: Iterable[Row], path: str | os.PathLike) -> None:
    seen = set()
    for row in rows:
        if row.key in seen:
            raise Qwt2Error(f"{path} has the figure {', '.join(row.key)} twice; keep one.")
        seen.add(row.key)


def _parse_layer(record: dict[str, str], where: str) -> Layer:
    if record["kept"].lower() not in ("true", "false", ""):
        raise Qwt2Error(f"{where}: kept is {record['kept']!r}; write True, False or nothing.")
    if record["kind"] not in ("layer", "product", "block"):
        raise Qwt2Error(f"{where}: kind is {record['kind']!r}; write layer, product or block.")
    optional = {name: _number(record, name, where, optional=True) for name in (*LAYER_FIGURES, *LAYER_COLUMNS[6:8])}
    engines = [name.removesuffix(MISMATCH_SUFFIXES[0]) for name in record if name.endswith(MISMATCH_SUFFIXES[0])]
    return Layer(
        **{name: record[name] for name in ("model", "precision", "method", "module", "kind", "reason")},
        seed=_integer(record, "seed", where),
        sqnr_before_db=optional["sqnr_before_db"],
        sqnr_after_db=optional["sqnr_after_db"],
        kept=None if not record["kept"] else record["kept"].lower() == "true",
        figures={name: optional[name] for name in LAYER_FIGURES},
        mismatch={
            engine: (
                _number(record, engine + MISMATCH_SUFFIXES[0], where),
                _number(record, engine + MISMATCH_SUFFIXES[1], where),
            )
            for engine in engines
            if record[engine + MISMATCH_SUFFIXES[0]]
        },
    )


def _number(record: dict[str, str], name: str, where: str, optional: bool = False) -> Any:
    text = record[name]
    if optional and not text:
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise Qwt2Error(f"{where}: {name} is {text!r}, not a number; run its stage again.") from error
    if not math.isfinite(value):
        raise Qwt2Error(f"{where}: {name} is {text}; only finite figures are results.")
    return value


def _integer(record: dict[str, str], name: str, where: str) -> int:
    try:
        return int(record[name])
    except ValueError as error:
        raise Qwt2Error(f"{where}: {name} is {record[name]!r}, not a whole number; run its stage again.") from error


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def fit_record(fit: Any) -> dict[str, Any]:
    """Return the effect of a compensation on a module as a record for JSON.

    JSON has no infinity and no NaN: an exact output gets :data:`EXACT_DB`, an unknown value ``None``. Alpha and beta
    are summarized by their quantiles over channels (:data:`QUANTILES`), mean, deviation and root mean square.

    Args:
        fit: a :class:`qwt2.compensation.report.ModuleReport`.
    """
    decibels = ("sqnr_before_db", "sqnr_after_db", "gate_before_db", "gate_after_db")
    figures = {name: min(max(getattr(fit, name), -EXACT_DB), EXACT_DB) for name in decibels}
    figures |= {"r2": fit.r2, "output_rms": fit.output_rms, "ridge": math.nan if fit.ridge is None else fit.ridge}
    if fit.alpha is not None:
        alpha, beta = (np.asarray(values.cpu(), np.float64) for values in (fit.alpha, fit.beta))
        figures |= {
            "alpha_mean": float(alpha.mean()),
            "alpha_std": float(alpha.std()),
            "beta_rms": float(np.sqrt(np.square(beta).mean())),
            **_quantiles("alpha", alpha),
            **_quantiles("beta", beta),
        }
    known = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return {"module": fit.module, "kept": fit.kept, "reason": fit.reason, **known}


def _quantiles(name: str, values: np.ndarray) -> dict[str, float]:
    return {f"{name}_{suffix}": float(np.quantile(values, share)) for suffix, share in QUANTILES.items()}
