"""What DVC shows of experiments with this project: few columns, those that differ; figures of two states side by side."""

import csv
import io
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import tiny_chain
from benchmarks.tiny_chain import run

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
FIGURES = {"w3a3": {"top1": 70.0, "sqnr_db": 5.5}, "w8a8": {"top1": 97.5, "sqnr_db": 20.0}}
COMMIT = ("git", "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "--all", "-m")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The tiny chain with two commits: of a trial at 3 bits, and at 8. The figures are made up."""
    folder = tiny_chain.make(tmp_path_factory.mktemp("experiments") / "project")
    (folder / "results/trial").mkdir(parents=True)
    for precision, figures in FIGURES.items():
        run(folder, "python", "-m", "pipeline.sweeps.params", "model=resnet_micro", f"precision={precision}", "seed=1")
        (folder / "results/trial/metrics.json").write_text(json.dumps(figures))
        layers = f"module,sqnr_after_db\nconv1,{figures['sqnr_db']}\n"
        (folder / "results/trial/layers.csv").write_text(layers)
        run(folder, "git", "add", "--force", ".")
        run(folder, *COMMIT, precision)
    return folder


def shown(project: Path, *arguments: str) -> list[dict[str, str]]:
    """The table of `make experiments`, in an environment that is set up."""
    shutil.copy(ROOT / "Makefile", project)
    command = ["make", "--no-print-directory", "--dry-run", "--old-file=.venv/.installed", "experiments", f"ARGS={' '.join(arguments)} --csv"]
    line = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout
    return [*csv.DictReader(io.StringIO(run(project, *shlex.split(line)).stdout))]


def test_experiments_are_shown_by_what_differs(project):
    rows = {row["rev"]: row for row in shown(project, "--num=2", "--hide-workspace") if row["rev"]}
    assert len(rows) == 2
    assert [float(row["top1"]) for row in rows.values()] == [97.5, 70.0]
    columns = {name.rpartition(":")[2] for name in next(iter(rows.values()))}
    assert {"top1", "sqnr_db", "precision.name", "precision.weight_bits"} <= columns
    assert len(columns) < 20 and not any(name.startswith(("pipeline/", "qwt2/", "out/")) for name in columns)


def test_two_states_are_compared_by_figures_and_modules(project):
    text = run(project, "dvc", "metrics", "diff", "HEAD~1", "HEAD").stdout
    rows = {words[1]: words[2:] for words in map(str.split, text.splitlines())}
    assert rows["top1"] == ["70.0", "97.5", "27.5"] and rows["sqnr_db"] == ["5.5", "20.0", "14.5"]
    run(project, "dvc", "plots", "diff", "HEAD~1", "HEAD", "--out", "plots")
    page = (project / "plots/index.html").read_text()
    assert "SQNR after compensation, dB" in page and "conv1" in page and "https://" not in page.split("</head>")[0]


def test_experiments_wait_in_a_queue_with_their_configuration(project):
    for precision in ("w4a4", "w2a3"):
        run(project, "dvc", "exp", "run", "trial", "--queue", "--name", f"at-{precision}",
            "-S", "model=resnet_micro", "-S", f"precision={precision}")  # fmt: skip
    queued = {row["Experiment"]: row for row in shown(project) if row["State"] == "Queued"}
    (bits,) = [name for name in next(iter(queued.values())) if name.endswith("precision.weight_bits")]
    assert {name: row[bits] for name, row in queued.items()} == {"at-w4a4": "4", "at-w2a3": "2"}
    wrong = run(project, "dvc", "exp", "run", "trial", "-S", "precision=w4a9", check=False)
    assert wrong.returncode and "w4a9" in wrong.stderr and "Traceback" not in wrong.stderr
