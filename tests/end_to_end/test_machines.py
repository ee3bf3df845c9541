"""One sweep on several machines: an array job on SLURM, a Ray cluster of two nodes, and results shared through a remote."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import slurm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("conf", "pipeline", "qwt2", "dvc.yaml", "requirements.lock")
# Two cells of a network that is hardly trained, in simulation.
SMALL = ["experiment=quick", "data.train_images=128", "data.val_images=64", "model.kwargs.channels=[8,8,16,16]",
         "model.train={steps: 3, batch_size: 16, warmup_steps: 1}", "calibration={images: 16, batch_size: 8, observer_images: 8}",
         "evaluate.engines=[]", "compensation=qwt,cwac"]  # fmt: skip
# Python imports it first. When a job of SLURM begins to write the results of its cell, its node dies in the first task;
# in the second, SLURM takes the node away, which it says by a signal.
TROUBLE = """
import os, signal, sys
place = os.path.dirname(__file__)

def note(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)) and "/evaluate/.rows" in os.fspath(arguments[0]):
        mark = os.path.join(place, "trouble-" + os.environ["SLURM_ARRAY_TASK_ID"])
        if not os.path.exists(mark):
            os.close(os.open(mark, os.O_CREAT))
            os.kill(os.getpid(), signal.SIGKILL if mark.endswith("0") else signal.SIGUSR2)

if "SLURM_ARRAY_TASK_ID" in os.environ:
    sys.addaudithook(note)
"""
REMOTE = "[core]\n    no_scm = true\n    remote = shared\n['remote \"shared\"']\n    url = {}\n"


def clone(folder: Path) -> Path:
    """Copy the sources into a folder in which nothing has been built."""
    for source in SOURCES:
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, folder / source)
    return folder


def run(folder: Path, *command: str, **variables: str) -> str:
    first, inherited = variables.pop("IMPORTED_FIRST", ""), os.environ.get("PYTHONPATH", "")
    python = os.pathsep.join(filter(None, [first, str(folder), inherited]))
    path = os.pathsep.join([variables.pop("PROGRAMS", ""), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python, "PATH": path} | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout


def sweep(folder: Path, name: str, *overrides: str, **variables: str) -> list[dict[str, str]]:
    run(folder, sys.executable, "-m", "pipeline.sweeps.experiment", *SMALL, f"sweep={name}", *overrides, **variables)
    with (folder / "out/sweeps" / name / "table.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> tuple[Path, Path, list[dict[str, str]]]:
    """A folder in which SLURM ran a sweep, the folder of its commands, and the sweep's table."""
    folder, programs = clone(tmp_path_factory.mktemp("machine")), tmp_path_factory.mktemp("slurm")
    slurm.install(programs)
    (programs / "sitecustomize.py").write_text(TROUBLE)
    rows = sweep(folder, "jobs", "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "threads=2",
                 "hydra.launcher.timeout_min=240", PROGRAMS=str(programs), IMPORTED_FIRST=str(programs))  # fmt: skip
    return folder, programs, rows


def test_an_array_job_has_its_resources_and_is_queued_again(cluster):
    _, programs, _ = cluster
    script = (programs / "script").read_text()
    flags = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines() if line.startswith("#SBATCH"))
    assert flags["array"] == "0-1%2" and flags["cpus-per-task"] == "2" and flags["mem"] == "4GB" and flags["time"] == "240"
    assert flags["partition"] == "gpu" and flags["requeue"] == "" and flags["signal"] == "USR2@120"
    assert flags["nodes"] == flags["ntasks-per-node"] == "1"


def test_cells_whose_jobs_were_lost_go_on_behind_their_last_stage(cluster):
    folder, programs, rows = cluster
    assert [(row["compensation"], row["status"]) for row in rows] == [("qwt", "finished"), ("cwac", "finished")]
    calls = (programs / "calls").read_text().splitlines()
    assert sum(call.startswith("srun") for call in calls) == 4  # two tasks, twice each
    assert [call for call in calls if call.startswith("scontrol")] == ["scontrol requeue 7_1"]  # a dead node says nothing
    for row in rows:
        cell = folder / "out/cells" / row["cell"]
        stages = [line.split("INFO ")[1] for line in (cell / "log.txt").read_text().splitlines() if "INFO stage" in line]
        assert stages == ["stage evaluate"]  # the log is of the second time
        assert sorted(path.name for path in cell.iterdir()) == ["cell.json", "config.yaml", "evaluate", "log.txt"]


def test_a_second_machine_takes_what_the_first_pushed(cluster, tmp_path):
    first, _, rows = cluster
    second = clone(tmp_path / "second")
    for machine in (first, second):
        (machine / ".dvc").mkdir()
        (machine / ".dvc/config").write_text(REMOTE.format(tmp_path / "remote"))
    share = (sys.executable, "-m", "pipeline.sweeps.remote")
    assert run(first, *share, "push").startswith("4 ")  # 2 cells, data, baseline
    assert run(second, *share, "pull").startswith("4 ") and run(second, *share, "pull").startswith("0 ")
    again = sweep(second, "again", "threads=2")
    assert [row["status"] for row in again] == ["skipped", "skipped"]
    assert [row["sqnr_db"] for row in again] == [row["sqnr_db"] for row in rows]
    run(second, sys.executable, "-m", "pipeline.build.verify")


def test_a_ray_cluster_of_two_nodes(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs the extra `ray`: uv pip install 'qwt2[ray]'")
    from ray.cluster_utils import Cluster

    folder = clone(tmp_path / "machine")
    monkeypatch.chdir(tmp_path)  # nodes are started somewhere
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        rows = sweep(folder, "ray", "hydra/launcher=ray", "threads=1", RAY_ADDRESS=nodes.address)
    finally:
        nodes.shutdown()
    assert [row["status"] for row in rows] == ["finished", "finished"]
    began, ended = zip(*(period(folder / "out/cells" / row["cell"]) for row in rows))
    assert max(began) < min(ended)  # at the same time, though each node has one CPU


def period(cell: Path) -> tuple[float, float]:
    """When a cell began and ended, in seconds."""
    ended = (cell / "cell.json").stat().st_mtime
    return ended - json.loads((cell / "cell.json").read_text())["seconds"], ended
