"""Sweeps: every experiment composes, `quick` runs, finished cells are skipped, failing cells leave the others alone."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from pipeline.build import code_hashes, dvcfiles
from pipeline.common import stage
from pipeline.stages.resolve import resolve
from pipeline.sweeps import cells, experiment
from pipeline.sweeps import sweep as sweeps
from qwt2.errors import Qwt2Error
from qwt2.io import atomic_path, read_json, write_json
from qwt2.report.results import read_rows

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("conf", "pipeline", "qwt2", "dvc.yaml", "requirements.lock")
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))
LAUNCHERS = ["basic", *sorted(path.stem for path in (ROOT / "conf/hydra/launcher").glob("*.yaml"))]
NEEDS = {"paper_imagenet": ["data.path=some/folder"], "paper_coco": ["data.path=some/folder"]}


@pytest.fixture(scope="module", autouse=True)
def _in_root(request):
    OmegaConf.register_new_resolver("cores_per", experiment.processes, replace=True)
    before = Path.cwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


def composed(overrides: list[str], hydra_too: bool = False):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("cell", ["sweep=test", *overrides], return_hydra_config=hydra_too)


def cells_of(name: str) -> list[list[str]]:
    """The overrides of every cell of an experiment, as Hydra's own sweeper combines them."""
    params = composed([f"experiment={name}"], hydra_too=True).hydra.sweeper.params
    overrides = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    return BasicSweeper.split_arguments(overrides, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if not name.startswith("optuna")])
def test_every_value_of_every_experiment_composes(name):
    """Each value at least once: the cells are all combinations of them."""
    wanted, seen = cells_of(name), set()
    for overrides in wanted:
        if not set(overrides) <= seen:
            cells.cell_config(composed([f"experiment={name}", *NEEDS.get(name, []), *overrides]))
            seen |= set(overrides)
    assert len(wanted) == len({tuple(overrides) for overrides in wanted}) > 1


def test_a_cell_may_have_several_compensations_under_names_of_their_own():
    one, several = (cells.cell_config(composed([f"compensation={name}"])) for name in ("qwt", "all"))
    assert several["compensations"] == ["qwt", "qwt_global", "cwac_paper", "cwac", "refit"]
    assert several["compensation"]["qwt"] == one["compensation"]["qwt"]
    changed = {"method": "qwt_global", "target": "global"}
    assert several["compensation"]["qwt_global"] == one["compensation"]["qwt"] | changed


@pytest.mark.slow
def test_the_optuna_example_names_settings_that_exist():
    params = composed(["experiment=optuna_calibration"], hydra_too=True).hydra.sweeper.params
    for key, choices in params.items():
        for value in choices.removeprefix("choice(").removesuffix(")").split(", "):
            cells.cell_config(composed([f"{key}={value}"]))


@pytest.mark.parametrize(
    "name, count",
    [
        ("ablation_cwac", 3 * 4 * 4 * 2),  # target x estimator x gate x ranges
        ("ablation_cwac_order", 3 * 2 * 2),  # target x order x granularity
        ("ablation_refit", 3 * 5 * 2),  # target x ridges x ranges
        ("free_accuracy", 5 * 5 * 6 * 5),  # models x precisions x methods x seeds
        ("free_accuracy_ptq", 5 * 5 * 4 * 5),
        ("free_accuracy_learned", 5 * 5 * 5),
        ("free_accuracy_rotated", 5 * 2 * 5),
        ("calibration_size", 2 * 6 * 8 * 3),  # models x methods x sizes x seeds
        ("paper_imagenet", 10 * 3 * 2),  # models x precisions x compensations
    ],
)
def test_an_experiment_is_the_product_of_its_settings(name, count):
    assert len(cells_of(name)) == count


def test_cells_without_engines_export_nothing():
    assert cells.cell_config(composed(["experiment=free_accuracy", "compensation=qwt"]))["exported"] == []
    assert cells.cell_config(composed(["compensation=qwt"]))["exported"] == ["ptq", "qwt"]


def test_experiments_that_share_a_table_have_one_base_and_differ_only_in_what_they_vary():
    names = [name for name in EXPERIMENTS if name.startswith("free_accuracy")]
    params = {name: dict(composed([f"experiment={name}"], hydra_too=True).hydra.sweeper.params) for name in names}
    varied = ("ptq", "ptq.rotate", "compensation", "model")
    assert len({str({key: value for key, value in of.items() if key not in varied}) for of in params.values()}) == 1
    assert params["free_accuracy"]["ptq"] == params["free_accuracy_rotated"]["ptq"] == "percentile_integer"
    everything = [f"experiment={','.join(names)}", "sweep=all", "seed=0"]
    assert experiment._experiments(everything) == [["seed=0", f"experiment={name}"] for name in names]
    assert experiment._experiments(["sweep=s", "seed=0"]) == [["seed=0"]]


def test_only_the_deployed_method_is_rotated():
    ptq = cells.cell_config(composed(["ptq=percentile_integer", "ptq.rotate=true"]))["ptq"]
    assert stage.ptq_label(ptq, "percentile") == "percentile_rotated"
    assert stage.ptq_label(ptq, "percentile_published") == "percentile_published"
    assert stage.ptq_label(ptq | {"rotate": False}, "percentile") == "percentile"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_composes(launcher):
    config = composed([f"hydra/launcher={launcher}", "threads=1"], hydra_too=True).hydra.launcher
    assert OmegaConf.to_container(config, resolve=False)["_target_"].startswith("hydra")
    if launcher == "local":
        assert config.n_jobs == len(os.sched_getaffinity(0))


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert [experiment.processes(threads) for threads in (1, 2, 3, 16)] == [8, 4, 2, 1]


def test_a_cell_s_id_is_of_its_settings_and_not_of_how_it_is_run():
    def cell(*overrides):
        return cells.cell_id(cells.cell_config(composed(list(overrides))))

    assert cell() == cell("workers=2") == cell("sweep=another") == cell("keep_models=true")
    others = ["seed=1", "compensation=qwt", "compensation=none", "precision=w3a3", "model=resnet_micro",
              "compensation.target=local", "calibration.images=64", "data.train_images=100", "evaluate.latency.repeats=3"]
    assert len({cell(), *(cell(other) for other in others)}) == len(others) + 1


def test_a_cell_is_configured_as_the_same_cell_of_the_grid():
    cfg = cells.cell_config(composed(["model=resnet_micro", "precision=w2a3", "seed=2"]))
    grid = yaml.safe_load(resolve()[stage.config_path("quantize", "resnet_micro-w2a3")])
    assert cfg["seeds"] == [2] and 2 in grid["seeds"]
    assert {key: cfg[key] for key in ("calibration", "data", "precision")} == {
        key: grid[key] for key in ("calibration", "data", "precision")
    }


def test_sweeps_are_named_after_what_is_asked_for():
    name = sweeps.sweep_name
    assert name(["experiment=bits"]) == "bits" == name(["hydra/launcher=local", "experiment=bits"])
    assert name(["experiment=bits", "seed=1"]) == name(["seed=1", "experiment=bits"]) != "bits"
    assert name(["seed=1,2"]) == name(["seed=1,2"]) != name(["seed=1"])


def test_a_record_that_is_being_written_is_none_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished = sweeps.job_path("s", {"seed": "1"})
    finished.parent.mkdir(parents=True)
    finished.write_text(json.dumps({"number": 0, "overrides": {"seed": "1"}}))
    with atomic_path(sweeps.job_path("s", {"seed": "2"})) as half:
        half.write_text('{"numb')
        assert sweeps.job_paths("s") == [finished] and len(sweeps.jobs("s")) == 1


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The sources in a folder of their own; nothing has been built there."""
    folder = tmp_path_factory.mktemp("sweeps")
    for source in SOURCES:
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, folder / source)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline.sweeps.experiment", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)


def table(folder: Path, sweep: str) -> list[dict[str, str]]:
    with (folder / "out/sweeps" / sweep / "table.csv").open() as file:
        return list(csv.DictReader(file))


# The quick experiment with a network that is hardly trained, on few images.
SMALL = ["experiment=quick", "data.train_images=256", "data.val_images=64", "model.kwargs.channels=[8,8,16,16]",
         "model.train={steps: 20, batch_size: 16, warmup_steps: 5}", "calibration={images: 32, batch_size: 8, observer_images: 8}",
         "evaluate.latency={repeats: 5, instances: 1}"]  # fmt: skip


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_quick_runs_skips_and_survives_a_failing_cell(clone):
    first = run(clone, *SMALL, "sweep=quick", "-v")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "stage quantize" in first.stderr  # -v
    rows = table(clone, "quick")
    assert [(row["compensation"], row["status"]) for row in rows] == [("qwt", "finished"), ("cwac", "finished"), ("refit", "finished")]
    for row in rows:
        check_figures(clone, row)
    assert "3 finished" in first.stdout
    check_text(rows, first.stdout)

    # The cells are done: a sweep that has them too takes them as they are. Of its two others, one cannot work.
    kept = {path: path.read_bytes() for path in (clone / "out/cells").glob("*/cell.json")}
    more = run(clone, *SMALL, "compensation=none,cwac", "calibration.images=4,32", "sweep=more", "printed=table",
               "hydra/launcher=local")  # fmt: skip
    assert more.returncode == 1 and "Traceback" not in more.stderr
    outcomes = {(row["compensation"], row["calibration.images"]): row for row in table(clone, "more")}
    assert {key: row["status"] for key, row in outcomes.items()} == {
        ("none", "4"): "failed", ("none", "32"): "finished", ("cwac", "4"): "failed", ("cwac", "32"): "skipped",
    }  # fmt: skip
    assert "less than one batch" in outcomes["cwac", "4"]["error"] and "less than one batch" in more.stdout
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert outcomes["none", "32"]["top1"] == outcomes["none", "32"]["ptq_top1"]
    for shared in (clone / "out/cells/shared").glob("*/"):
        assert {path.name for path in shared.iterdir()} >= {"config.yaml", "outputs.json"}
    assert subprocess.run([sys.executable, "-m", "pipeline.build.verify"], cwd=clone, env=os.environ | {"PYTHONPATH": str(clone)}).returncode == 0
    failed = clone / "out/cells" / outcomes["cwac", "4"]["cell"]
    assert sorted(path.name for path in failed.iterdir()) == ["cell.json", "config.yaml", "log.txt"]
    assert "Traceback" in (failed / "log.txt").read_text()



def check_text(rows: list[dict[str, str]], text: str) -> None:
    """The table and the sentence at the command's end have the figures of table.csv."""
    [sentence] = [line for line in text.splitlines() if line.startswith("On ONNX Runtime, W2A3 takes resnet_small")]
    for row, name in zip(rows, ("QwT", "CWAC")):
        figure = f"{float(row['onnxruntime_top1']):.1f}"
        assert re.search(rf"{name} brings it to {figure} %, with [\d,]+ more parameters", sentence)
        [line] = [line for line in text.splitlines() if line.startswith(f"PTQ (percentile) + {name} ")]
        assert line.split()[4:6] == [f"{float(row['top1']):.1f}", figure]
    assert f"from {float(rows[0]['fp32_top1']):.1f} to {float(rows[0]['ptq_top1']):.1f} % top-1" in sentence
    assert sentence.count("0 more parameters and") >= 1 and "CWAC" in sentence.split(";")[1]


def check_figures(clone: Path, row: dict[str, str]) -> None:
    """The table's figures are the cell's."""
    cell = clone / "out/cells" / row["cell"]
    figures = {(r.method, r.engine, r.metric): r.value for r in read_rows(cell / "evaluate/rows.csv")}
    method = f"percentile+{row['compensation']}"
    assert float(row["top1"]) == pytest.approx(figures[method, "torch", "top1"])
    assert float(row["ptq_top1"]) == pytest.approx(figures["percentile", "torch", "top1"])
    assert float(row["openvino_latency_ratio"]) == pytest.approx(figures[method, "openvino", "latency_ratio_to_ptq"])
    record = json.loads((cell / "cell.json").read_text())
    assert any(name.endswith(".onnx") for name in record["artifacts"]) and not (cell / "quantize").exists()


def test_a_change_of_code_or_baseline_makes_a_cell_anew(clone, tmp_path, monkeypatch):
    """A finished cell is skipped; one that is run anew ends at once here, as there is no model."""
    monkeypatch.setattr(code_hashes, "ROOT", clone)
    monkeypatch.chdir(tmp_path)
    for folder in ("data_folder", "baseline_folder"):
        monkeypatch.setattr(cells, folder, lambda cfg: tmp_path)
    cfg, weights = cells.cell_config(composed([])), tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    write_json(tmp_path / "metrics.json", {})
    cells.run_cell(cfg)
    record = read_json(cells.cell_folder(cfg) / "cell.json") | {"status": "finished"}

    def status(changed: dict, keep_models: bool = False) -> str:
        write_json(cells.cell_folder(cfg) / "cell.json", record | changed)
        return cells.run_cell(cfg, keep_models)["status"]

    assert status({}) == "skipped"
    assert status({}, keep_models=True) == "failed" and status({"models_kept": True}, keep_models=True) == "skipped"
    assert status({"status": "failed"}) == "failed"
    source = clone / "qwt2/folding/fold.py"
    before = source.read_text()
    source.write_text(before + "ANOTHER = 1\n")
    assert status({}) == "failed"
    source.write_text(before)
    assert status({}) == "skipped"
    weights.write_bytes(b"others")
    assert status({}) == "failed"


def test_what_dvc_built_is_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "conf", "conf")
    cfg = cells.cell_config(composed([]))
    folder = Path("out/baseline/vit_micro")
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    config = cells.select(cfg, "baseline")
    entry = {
        "params": {stage.config_path("baseline", "vit_micro").as_posix(): yaml.safe_load(config)},
        "outs": [{"path": str(folder), "md5": dvcfiles.md5(folder)}],
    }
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"baseline@vit_micro": entry}}))
    assert cells.baseline_folder(cfg) == folder
    (folder / "metrics.json").write_text("{} ")  # not what DVC built any more
    assert not cells.is_whole("baseline@vit_micro", "baseline/vit_micro")
    Path("dvc.lock").write_text("schema: '2.0'\nstages:\n  baseline@vit_micro:\n    outs:\n    - pa")
    with pytest.raises(Qwt2Error, match="dvc.lock is damaged"):
        cells.baseline_folder(cfg)


def test_other_tools_are_compared_with_cells_that_make_real_runs():
    from benchmarks import real

    recipe = (ROOT / "Makefile").read_text()
    for model, (experiment_name, precisions) in real.swept().items():
        assert "w8a8" in precisions and f" {experiment_name}-cells" in recipe
        for engine, overrides in real.COMPARED.items():
            cfg = real.configuration([f"experiment={experiment_name}", f"model={model}", *overrides])
            assert engine in cfg["evaluate"]["engines"] and set(overrides[1:]) <= set(recipe.replace("'", "").split())
            assert cfg["ptq"]["target"] == {"onnxruntime": "portable"}.get(engine, engine)
    with pytest.raises(Qwt2Error, match="the cell of resnet_fashion at w8a8 has not finished; run `make real`"):
        real.finished(real.configuration(["experiment=fashion", "precision=w8a8", "seed=12345"]))
