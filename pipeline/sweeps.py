"""Sweeps: which cells one command asked for, how each of them went, and the table of their figures.

    out/sweeps/<name>/jobs/    one record a cell that was asked for
    out/sweeps/<name>/table.csv
"""

import csv
import fcntl
import hashlib
import io
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tabulate import tabulate
from tqdm import tqdm

from pipeline.cells import CELLS, cell_config, cell_folder, read_record, run_cell, sentence
from pipeline.stage import OUT
from qwt2.errors import Qwt2Error
from qwt2.io import read_json, write_json, write_text
from qwt2.results import Results, Row, format_number, read_rows

SWEEPS = OUT / "sweeps"
TABLE = "table.csv"
_POLL_SECONDS = 0.5


def run_job(composed: DictConfig) -> float | None:
    """Run one cell of a sweep, in whatever process the launcher chose, and record how it went.

    Returns:
        The figure named by `objective`, for sweepers that optimize; None if the cell failed.
    """
    started = time.perf_counter()
    record: dict[str, Any] = {"cell": None, "status": "failed", "error": None}
    try:
        cfg = cell_config(composed)
        record["cell"] = cell_folder(cfg).name
        done = run_cell(cfg, keep_models=composed.keep_models)
        record |= {"status": done["status"], "error": done.get("error")}
    except Exception as error:  # noqa: BLE001 - the other cells of the sweep go on
        record["error"] = sentence(error)
    job = HydraConfig.get()
    overrides = dict(text.split("=", 1) for text in job.overrides.task)
    overrides.pop("sweep")
    record |= {"number": job.job.get("num", 0) if job.mode.name == "MULTIRUN" else 0, "overrides": overrides}
    write_json(job_path(composed.sweep, overrides), record | {"seconds": time.perf_counter() - started})
    shown = " ".join(f"{key}={value}" for key, value in overrides.items())
    print(f"{record['status']}: {shown}" + (f": {record['error']}" if record["error"] else ""), flush=True)
    return None if record["status"] == "failed" else objective(CELLS / record["cell"], composed.objective)


def job_path(sweep: str, overrides: dict[str, str]) -> Path:
    digest = hashlib.sha256("\0".join(sorted(f"{k}={v}" for k, v in overrides.items())).encode()).hexdigest()[:16]
    return SWEEPS / sweep / "jobs" / f"{digest}.json"


def objective(cell: Path, metric: str) -> float:
    """The simulated figure of the cell's own method; Qwt2Error if there is no such metric."""
    rows = read_rows(cell / "evaluate" / "rows.csv")
    method = own_method(rows)
    for row in rows:
        if (row.method, row.engine, row.metric) == (method, "torch", metric):
            return row.value
    known = ", ".join(sorted({row.metric for row in rows if row.engine == "torch"}))
    raise Qwt2Error(f"objective {metric!r} is no figure of the simulation; use one of: {known}")


def own_method(rows: Iterable[Row]) -> str:
    """The method a cell is about: its compensated one where it has one, else plain PTQ."""
    return max((row.method for row in rows), key=lambda method: ("+" in method, method))


@contextmanager
def only_runner(sweep: str) -> Iterator[None]:
    """Keep others from running the same sweep at the same time; Qwt2Error if one does."""
    path = SWEEPS / sweep / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Qwt2Error(f"sweep {sweep} is running already; wait for it, or name this one with sweep=NAME") from error
        for record in (SWEEPS / sweep / "jobs").glob("*.json"):
            record.unlink()  # the table tells of this run of the sweep alone; the cells themselves remain
        yield


@contextmanager
def progress(sweep: str) -> Iterator[None]:
    """A bar over a sweep's cells, whoever runs them: it counts their records. None on anything but a terminal."""
    finished = threading.Event()
    with tqdm(desc=sweep, unit="cell", disable=None) as bar:

        def count() -> None:
            while not finished.wait(_POLL_SECONDS):
                bar.update(len(jobs(sweep)) - bar.n)

        watcher = threading.Thread(target=count, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()
            bar.update(len(jobs(sweep)) - bar.n)


def jobs(sweep: str) -> list[dict[str, Any]]:
    """The records of a sweep, in the order in which its cells were asked for."""
    records = [read_json(path) for path in (SWEEPS / sweep / "jobs").glob("*.json")]
    return sorted(records, key=lambda record: (record["number"], sorted(record["overrides"].items())))


def write_table(sweep: str) -> str:
    """Write a sweep's table, one row a cell, and return it as text."""
    rows = [job_row(record) for record in jobs(sweep)]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(SWEEPS / sweep / TABLE, buffer.getvalue())
    shown = [column for column in columns if any(row.get(column) for row in rows) and column != "cell"]
    return tabulate([[row.get(column, "") for column in shown] for row in rows], shown, disable_numparse=True)


def job_row(record: dict[str, Any]) -> dict[str, str]:
    """A row of the table: what was asked for, how it went, and the figures."""
    row = dict(record["overrides"]) | {"cell": record["cell"], "status": record["status"]}
    if record["status"] != "failed":
        row |= {name: format_number(value) for name, value in figures(CELLS / record["cell"]).items()}
    return row | {"seconds": f"{record['seconds']:.1f}", "error": record["error"] or ""}


def figures(cell: Path) -> dict[str, float]:
    """The figures by which cells are compared; percentages, dB and ratios to plain PTQ."""
    rows = read_rows(cell / "evaluate" / "rows.csv")
    results, method = Results(rows), own_method(rows)
    model, precision = rows[0].model, rows[0].precision
    wanted = {"ptq_top1": (method.partition("+")[0], "torch", "top1"), "top1": (method, "torch", "top1")}
    wanted |= {"agreement": (method, "torch", "agreement"), "sqnr_db": (method, "torch", "logits_sqnr_db")}
    for engine in results.engines()[1:]:
        wanted[f"{engine}_top1"] = (method, engine, "top1")
        wanted[f"{engine}_latency_ratio"] = (method, engine, "latency_ratio_to_ptq")
    found = {name: results.get(model, precision, *what) for name, what in wanted.items()}
    fp32 = (read_record(cell) or {}).get("fp32", {}).get("top1")
    return {"fp32_top1": fp32} | {name: row.value for name, row in found.items() if row}


def sweep_name(overrides: Sequence[str]) -> str:
    """A name for what was asked for: the experiment's, and a hash of the other overrides if there are any."""
    asked = [text for text in overrides if not text.startswith("hydra")]
    experiments = [text.partition("=")[2] for text in asked if text.partition("=")[0] == "experiment"]
    others = sorted(text for text in asked if text.partition("=")[0] != "experiment")
    parts = [re.sub(r"\W+", "_", experiments[-1])] if experiments else []
    if others or not parts:
        parts.append(hashlib.sha256("\0".join(others).encode()).hexdigest()[:8])
    return "-".join(parts)
