"""Measure the time that sweeps, publishing and the dashboard take on this machine.

* 24 cells of micro models, with Hydra's basic launcher and with processes (``hydra/launcher=local``), from the same
  baselines;
* publishing 100 runs to W&B offline;
* the dashboard with 1,000 runs, from the browser's request until table and plots are drawn (needs Chromium).
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import tiny_chain
from benchmarks.browser import CHROMIUM, MISSING, chromium
from benchmarks.synthetic import write_cells
from benchmarks.table import machine_file, versions_text
from qwt2.errors import Qwt2Error, guarded
from qwt2.evaluation import machine
from qwt2.io import write_csv

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ("model=vit_micro,swin_micro", "precision=w3a3,w4a4", "compensation=qwt,cwac", "seed=0,1,2")
CELLS = 24
PUBLISHED, SHOWN = 100, 1000
WINDOW = {"width": 1600, "height": 1400}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="qwt2-") as parent:
        rows = [*sweeps(Path(parent)), publishing(Path(parent) / "published"), page(Path(parent) / "shown")]
    write([row for row in rows if row])


def sweeps(parent: Path) -> list[dict]:
    """Time the same cells with both launchers, in separate folders because a finished cell is not run twice."""
    if not Path("out/baseline/swin_micro").is_dir() or not Path("out/baseline/vit_micro").is_dir():
        raise Qwt2Error(
            "out/baseline lacks vit_micro or swin_micro; run `make repro` first, whose baselines the sweeps use"
        )
    seconds = {}
    for launcher in ("basic", "local"):
        folder = parent / launcher
        for source in (*tiny_chain.SOURCES, "dvc.lock", "out/data", "out/baseline"):
            target = folder / source
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, target)
        command = (sys.executable, "-m", "pipeline.sweeps.experiment", "-m", *SWEEP, f"hydra/launcher={launcher}")
        seconds[launcher], done = timed(folder, *command)
        if f"{CELLS} finished" not in done.stdout:
            raise Qwt2Error(f"the sweep with launcher {launcher} did not finish {CELLS} cells: {done.stdout[-500:]}")
    ratio = seconds["basic"] / seconds["local"]
    return [
        {"what": f"sweep of {CELLS} cells", "variant": "basic", "seconds": seconds["basic"], "ratio": 1.0},
        {"what": f"sweep of {CELLS} cells", "variant": "local", "seconds": seconds["local"], "ratio": ratio},
    ]


def publishing(folder: Path) -> dict:
    made_up_runs(folder, PUBLISHED + 1)  # the last one has status "failed" and is not published
    os.environ["WANDB_MODE"] = "offline"
    seconds, done = timed(folder, sys.executable, "-m", "pipeline.comparison.publish")
    count = int(re.search(r"(\d+) runs published", done.stdout)[1])
    return {"what": f"publishing {count} runs", "variant": "offline", "seconds": seconds, "ratio": ""}


def page(folder: Path) -> dict | None:
    if CHROMIUM is None:
        print(f"the page is not measured: {MISSING}")
        return None
    made_up_runs(folder, SHOWN)
    with chromium() as browser, served(folder) as address, browser.new_page(viewport=WINDOW) as shown:
        shown.goto(address)
        shown.wait_for_function("document.querySelectorAll('.ag-center-cols-container .ag-row').length")
        for plot in ("bits", "latency"):
            shown.wait_for_function(f"document.querySelectorAll('#{plot} .points path').length")
        seconds = shown.evaluate("performance.now()") / 1e3
    return {"what": f"page of {SHOWN} runs", "variant": "", "seconds": seconds, "ratio": ""}


def made_up_runs(folder: Path, count: int) -> None:
    """Make a project folder of finished cells with made-up figures."""
    folder.mkdir()
    shutil.copytree(ROOT / "conf", folder / "conf")
    before = Path.cwd()
    os.chdir(folder)
    try:
        write_cells(count, tables=PUBLISHED)
    finally:
        os.chdir(before)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the dashboard and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipeline.comparison.dashboard", "--port", str(port)]
    address = f"http://127.0.0.1:{port}/"
    process = subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(address, timeout=60).close()  # the first page takes seconds
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def timed(folder: Path, *command: str) -> tuple[float, subprocess.CompletedProcess]:
    environment = os.environ | {"PYTHONPATH": str(ROOT if not (folder / "pipeline").is_dir() else folder)}
    started = time.perf_counter()
    done = tiny_chain.run(folder, *command, env=environment)
    return time.perf_counter() - started, done


def write(rows: list[dict]) -> None:
    described = machine.describe()
    facts = {"cpu": described["cpu"], "cores": len(os.sched_getaffinity(0)), "versions": versions_text(described)}
    rounded = [{k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    write_csv(machine_file("experiments"), [row | facts for row in rounded])


if __name__ == "__main__":
    guarded(main)
