"""Sweeps: the cells that one command asked for, the outcome of each, and the table of their figures.

* out/sweeps/<name>/jobs/: one record per requested cell;
* out/sweeps/<name>/table.csv: the figures.
"""

import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tabulate import tabulate
from tqdm import tqdm

from pipeline.common.folders import CELLS, OUT, read_record
from pipeline.sweeps.cells import cell_config, cell_folder, figures, run_cell, sentence
from qwt2.errors import Qwt2Error
from qwt2.io import read_json, write_csv, write_json
from qwt2.report.metrics import METRICS
from qwt2.report.results import format_number

SWEEPS = OUT / "sweeps"
TABLE = "table.csv"
PRINTED = ("table", "regained", "published")  # texts that the command may print at its end
_POLL_SECONDS = 0.5


def run_job(composed: DictConfig) -> float | None:
    """Run one cell of a sweep, in the process that the launcher chose, and record the outcome.

    Returns:
        The figure named by ``objective``, for sweepers that optimize; None without one, or if the cell failed.
    """
    started = time.perf_counter()
    os.chdir(HydraConfig.get().runtime.cwd)  # a launcher may start processes elsewhere
    record: dict[str, Any] = {"cell": None, "status": "failed", "error": None}
    record |= {"model": composed.model.name, "precision": composed.precision.name, "printed": composed.printed}
    value = None
    try:
        _check(composed)
        cfg = cell_config(composed)
        record["cell"] = cell_folder(cfg).name
        done = run_cell(cfg, keep_models=composed.keep_models)
        record |= {"status": done["status"], "error": done.get("error")}
        value = None if record["error"] or composed.objective is None else objective(done, composed.objective)
    except Exception as error:  # the other cells of the sweep go on
        record |= {"status": "failed", "error": sentence(error)}
    job = HydraConfig.get()
    overrides = dict(text.split("=", 1) for text in job.overrides.task)
    overrides.pop("sweep")
    record |= {"number": job.job.get("num", 0) if job.mode.name == "MULTIRUN" else 0, "overrides": overrides}
    write_json(job_path(composed.sweep, overrides), record | {"seconds": time.perf_counter() - started})
    shown = " ".join(f"{key}={value}" for key, value in overrides.items())
    print(f"{record['status']}: {shown}" + (f": {record['error']}" if record["error"] else ""), flush=True)
    return value


def _check(composed: DictConfig) -> None:
    """Refuse settings that are not part of a cell's configuration."""
    if composed.objective is not None and composed.objective not in METRICS:
        raise Qwt2Error(f"objective {composed.objective!r} is no figure; use one of: {', '.join(METRICS)}")
    if composed.printed not in PRINTED:
        raise Qwt2Error(f"printed {composed.printed!r} is unknown; use one of: {', '.join(PRINTED)}")


def job_path(sweep: str, overrides: dict[str, str]) -> Path:
    """Return the file of the record of one requested cell."""
    digest = hashlib.sha256("\0".join(sorted(f"{k}={v}" for k, v in overrides.items())).encode()).hexdigest()[:16]
    return SWEEPS / sweep / "jobs" / f"{digest}.json"


def objective(record: dict[str, Any], metric: str) -> float:
    """Return a simulated figure of the method that a cell was run for.

    Raises:
        Qwt2Error: the simulation has no figure of this name.
    """
    own = record["figures"][record["method"]]
    if f"torch/{metric}" not in own:
        known = ", ".join(sorted(name.removeprefix("torch/") for name in own if name.startswith("torch/")))
        raise Qwt2Error(f"objective {metric!r} is no figure of the simulation; use one of: {known}")
    return own[f"torch/{metric}"]


@contextmanager
def only_runner(sweep: str) -> Iterator[None]:
    """Keep other processes from running the same sweep at the same time, and delete its old records.

    Raises:
        Qwt2Error: another process is running it.
    """
    path = SWEEPS / sweep / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Qwt2Error(
                f"sweep {sweep} is running already; wait for it, or name this one with sweep=NAME"
            ) from error
        for record in (SWEEPS / sweep / "jobs").glob("*.json"):
            record.unlink()  # the table covers only this run of the sweep; the cells themselves remain
        yield


@contextmanager
def progress(sweep: str) -> Iterator[None]:
    """Show a progress bar over a sweep's cells on a terminal; it counts their records, so any process may run them."""
    finished = threading.Event()
    with tqdm(desc=sweep, unit="cell", disable=None) as bar:

        def count() -> None:
            while not finished.wait(_POLL_SECONDS):
                bar.update(len(job_paths(sweep)) - bar.n)

        watcher = threading.Thread(target=count, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()
            bar.update(len(job_paths(sweep)) - bar.n)


def job_paths(sweep: str) -> list[Path]:
    """Return the files of a sweep's records. A file that is still being written begins with a dot and is left out."""
    return sorted((SWEEPS / sweep / "jobs").glob("[!.]*.json"))


def jobs(sweep: str) -> list[dict[str, Any]]:
    """Read the records of a sweep, in the order in which its cells were requested; several experiments by name."""

    def place(record: dict[str, Any]) -> tuple:
        overrides = record["overrides"]
        return overrides.get("experiment", ""), record["number"], sorted(overrides.items())

    return sorted((read_json(path) for path in job_paths(sweep)), key=place)


def write_table(sweep: str) -> None:
    """Write a sweep's table, one row per cell."""
    rows, columns = _table(sweep)
    write_csv(SWEEPS / sweep / TABLE, rows, columns)


def table_text(sweep: str) -> str:
    """Return a sweep's table as text, without columns that are empty."""
    rows, columns = _table(sweep)
    shown = [column for column in columns if any(row.get(column) for row in rows) and column != "cell"]
    return tabulate([[row.get(column, "") for column in shown] for row in rows], shown, disable_numparse=True)


def _table(sweep: str) -> tuple[list[dict[str, str]], list[str]]:
    rows = [job_row(record) for record in jobs(sweep)]
    return rows, list(dict.fromkeys(column for row in rows for column in row))


def job_row(record: dict[str, Any]) -> dict[str, str]:
    """Return a row of the table: the overrides, the outcome, and the figures."""
    row = dict(record["overrides"]) | {"cell": record["cell"], "status": record["status"]}
    cell = read_record(CELLS / str(record["cell"]))
    if cell and cell["status"] == "finished":
        row |= {name: format_number(value) for name, value in figures(cell).items()}
    return row | {"seconds": f"{record['seconds']:.1f}", "error": record["error"] or ""}


def sweep_name(overrides: Sequence[str]) -> str:
    """Name a sweep after its experiment, with a hash of the other overrides if there are any."""
    asked = [text for text in overrides if not text.startswith("hydra")]
    experiments = [text.partition("=")[2] for text in asked if text.partition("=")[0] == "experiment"]
    others = sorted(text for text in asked if text.partition("=")[0] != "experiment")
    parts = [re.sub(r"\W+", "_", experiments[-1])] if experiments else []
    if others or not parts:
        parts.append(hashlib.sha256("\0".join(others).encode()).hexdigest()[:8])
    return "-".join(parts)
