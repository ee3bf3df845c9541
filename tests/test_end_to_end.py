"""The whole chain at a tiny size, through `dvc repro` in a temporary clone."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qwt2.results import read_rows

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("conf", "pipeline", "qwt2", "dvc.yaml", ".dvc/config", ".dvcignore", ".gitignore")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A Git repository of its own with the project's sources and a small grid."""
    folder = tmp_path_factory.mktemp("clone")
    for source in SOURCES:
        target = folder / source
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, target)
    edit(folder / "conf/grid.yaml", lambda c: c["grid"].update(model=["vit_micro", "resnet_micro"], precision=["w3a3"]))
    edit(folder / "conf/data/digits.yaml", lambda c: c.update(train_images=256, val_images=64))
    edit(folder / "conf/config.yaml", shrink)
    for model in ("vit_micro", "resnet_micro"):
        edit(folder / f"conf/model/{model}.yaml", lambda c: c["train"].update(steps=3, batch_size=16))
    edit(folder / "conf/model/resnet_micro.yaml", lambda c: c["kwargs"].update(channels=[8, 8, 16, 16]))
    run(folder, "git", "init", "--quiet")
    return folder


def shrink(config: dict) -> None:
    config["seeds"] = [0, 1]
    config["calibration"].update(images=32, batch_size=8, observer_images=8)
    config["evaluate"]["mismatch_images"] = 2
    config["evaluate"]["latency"]["repeats"] = 5


def edit(path: Path, change) -> None:
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def run(folder: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": paths, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def hashes(folder: Path) -> dict[str, str]:
    """Of the arrays in `folder`; its JSON holds durations."""
    files = [path for path in folder.iterdir() if path.suffix != ".json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stages_run(output: str) -> set[str]:
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}


@pytest.mark.timeout(840)
def test_repro_builds_everything_and_reruns_only_what_reads_a_change(clone):
    first = run(clone, sys.executable, "-m", "pipeline.warm", "dvc", "repro")
    cells = {f"{m}-w3a3" for m in ("vit_micro", "resnet_micro")}
    assert {f"{s}@{c}" for s in ("ptq", "compensate", "fold", "evaluate") for c in cells} < stages_run(first.stdout)
    check_summary(clone)
    check_page(clone)

    assert stages_run(run(clone, "dvc", "repro").stdout) == set()

    # A comment re-runs `resolve` alone; a key that only `evaluate` and `report` read re-runs those.
    with (clone / "conf/config.yaml").open("a") as file:
        file.write("# nothing new\n")
    assert stages_run(run(clone, "dvc", "repro").stdout) == {"resolve"}
    edit(clone / "conf/grid.yaml", lambda c: c["grid"].update(model=["vit_micro"]))
    assert stages_run(run(clone, "dvc", "repro").stdout) == {"resolve", "report"}
    assert {row.model for row in read_rows(clone / "results/summary.csv")} == {"vit_micro"}

    # A stage in a process of its own writes the same results as one that started warm.
    for stage in ("ptq", "compensate", "fold"):
        folder = clone / "out" / stage / "vit_micro-w3a3"
        warm = hashes(folder)
        run(clone, sys.executable, "-m", f"pipeline.{stage}", "vit_micro-w3a3")
        assert warm == hashes(folder) and warm


def check_summary(clone: Path) -> None:
    rows = read_rows(clone / "results/summary.csv")
    found = {(r.model, r.method, r.engine, r.metric) for r in rows}
    for model, ptq in (("vit_micro", "repq"), ("resnet_micro", "percentile")):
        assert (model, "fp32", "torch", "top1") in found
        for method in (ptq, f"{ptq}+qwt", f"{ptq}+cwac"):
            for engine in ("onnxruntime", "openvino"):
                for metric in ("top1", "agreement", "engine_top1_delta", "engine_mismatch_steps", "latency_ratio_to_ptq"):
                    assert (model, method, engine, metric) in found
        assert (model, f"{ptq}_published+cwac", "torch", "top1") in found
    figures = {(r.model, r.method, r.engine, r.metric): r.value for r in rows}
    for model, ptq in (("vit_micro", "repq"), ("resnet_micro", "percentile")):
        assert figures[model, f"{ptq}+cwac", "torch", "extra_params"] == 0
        assert figures[model, f"{ptq}+qwt", "torch", "extra_params"] > 0
        sizes = [figures[model, method, "openvino", "file_bytes"] for method in (ptq, f"{ptq}+cwac")]
        assert sizes[0] == sizes[1]


def check_page(clone: Path) -> None:
    page = (clone / "results/report.html").read_text()
    assert "vit_micro" in page and "resnet_micro" in page


@pytest.mark.timeout(300)
def test_mistakes_end_with_one_sentence_and_exit_code_2(clone):
    edit(clone / "conf/precision/w3a3.yaml", lambda c: c.update(weight_bits=9))
    failed = run(clone, sys.executable, "-m", "pipeline.resolve", check=False)
    edit(clone / "conf/precision/w3a3.yaml", lambda c: c.update(weight_bits=3))
    assert failed.returncode == 2
    assert failed.stderr.strip() == "error: precision: weight_bits is 9; use a whole number from 2 to 8"

    edit(clone / "conf/grid.yaml", lambda c: c["grid"].update(precision=["w3a9"]))
    failed = run(clone, sys.executable, "-m", "pipeline.resolve", check=False)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "'precision/w3a9'" in failed.stderr and "w8a8" in failed.stderr
