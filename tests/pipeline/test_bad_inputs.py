"""Every mistake a user can make at a command line ends with its one sentence and exit code, before anything is computed."""

import importlib.util
import json
import runpy
import shutil
import socket
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.stages import resolve
from tests.support.options import options

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with the configuration, and nothing built."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "QWT2_VERBOSE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def command(line: str, monkeypatch, capsys) -> tuple[int, str]:
    """Run `python -m <line>`; its exit code and what it said on stderr."""
    module, *arguments = line.split()
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return end.value.code, capsys.readouterr().err


# What follows `python -m pipeline.sweeps.experiment`, and words of the sentence.
EXPERIMENT = {
    "experiment=quick printed=all": "printed 'all' is unknown; use one of: table, regained, published",
    "model=vit_huge": "options of group 'model' are: .*vit_micro",
    "model=": "conf has no 'model/'",
    "-m model=vit_micro,vit_huge": "conf has no 'model/vit_huge'",
    "precision=w4a9": options("precision"),
    "compensation=lora": options("compensation"),
    "ptq=nope": options("ptq"),
    "data=imagenet": options("data"),
    "data=imagefolder": "'data.path' is not set",
    "experiment=nope": options("experiment"),
    "hydra/launcher=dask": "options of group 'hydra/launcher' are: basic, .*slurm",
    "hydra/sweeper=bayes": "options of group 'hydra/sweeper' are: ",
    "data.path=x": "the configuration has no key 'data.path'",
    "+foo=1": "the configuration has no key 'foo'; the keys there are: ",
    "+calibration.image=3": "no key 'calibration.image'; the keys there are: images, batch_size, observer_images",
    "foo": "Error parsing override 'foo'",
    "model=vit_micro,swin_micro": "Ambiguous value",
    "seed=x": "'seeds\\[0\\]' cannot be used: Value 'x'",
    "seed=-1": "'seeds' is -1, but must be at least 0",
    "seed=1.5": "'seeds\\[0\\]' cannot be used",
    "-m seed=-1,-2": "'seeds' is -1",
    "threads=0": "'threads' is 0, but must be at least 1",
    "threads=many": "'threads' cannot be used",
    "calibration.images=0": "'calibration.images' is 0, but must be at least 1",
    "calibration.batch_size=-3": "'calibration.batch_size' is -3",
    "calibration=null": "'calibration'",
    "precision.weight_bits=9": "weight_bits is 9; use a whole number from 2 to 8",
    "precision.activation_bits=2": "activation_bits is 2; use a whole number from 3 to 8",
    "precision.softmax_bits=0": "softmax_bits is 0",
    "evaluate.engines=[tensor]": "unknown engine 'tensor'; use one of: .*onnxruntime, openvino",
    "evaluate.latency.repeats=-5": "'evaluate.latency.repeats' is -5",
    "evaluate.batch_size=null": "'evaluate.batch_size' cannot be used",
    "model.pretrained=true": "has model.pretrained and model.train",
    "model.train=null": "but has none",
    "model.train.steps=0": "'model.train.steps' is 0",
    "data.name=cifar": "data.name is 'cifar'; for classification, choose one of .*digits.*imagefolder",
    "data.val_images=null": "'data.val_images' cannot be used",
    "compensation.method=null": "compensation.method is None; choose the compensation by compensation=cwac, qwt, all or none",
    "objective=speed": "objective 'speed' is no figure; use one of: top1",
    "sweep=../x": "sweep is '../x'; use letters, digits",
    "sweep=": "sweep is ''; use letters",
}


@pytest.mark.parametrize("arguments", EXPERIMENT)
def test_experiment(arguments, folder, monkeypatch, capsys):
    code, error = command(f"pipeline.sweeps.experiment {arguments}", monkeypatch, capsys)
    check_sentence(code, error, EXPERIMENT[arguments])
    assert not (folder / "out/cells").exists()


def test_a_launcher_that_is_an_extra(folder, monkeypatch, capsys):
    if importlib.util.find_spec("hydra_plugins.hydra_ray_launcher"):
        pytest.skip("hydra-ray-launcher is installed here")
    code, error = command("pipeline.sweeps.experiment -m experiment=quick hydra/launcher=ray", monkeypatch, capsys)
    check_sentence(code, error, "the launcher is not installed; see its file in conf/hydra/launcher for the package")


def check_sentence(code: int, error: str, words: str) -> None:
    import re

    assert code == 2 and "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 == len(error.splitlines()), error
    assert re.search(words, lines[0]), lines[0]


# Module and arguments, and words of the sentence, in a folder where nothing has been built.
OTHERS = {
    "pipeline.comparison.publish": "there are no results yet; run `make repro`",
    "pipeline.comparison.dashboard": "there are no results yet",
    "pipeline.comparison.differences a.csv b.csv": "a.csv does not exist",
    "pipeline.comparison.differences conf/config.yaml conf/config.yaml": "config.yaml must have the columns task,dataset",
    "pipeline.stages.quantize vit_micro-w3a3": "out/resolved/quantize@vit_micro-w3a3.yaml does not exist; run `dvc repro`",
    "pipeline.stages.baseline no_such_model": "baseline@no_such_model.yaml does not exist",
    "pipeline.sweeps.params model=vit_huge": "options of group 'model' are",
    "pipeline.comparison.free_accuracy nope": r"sweep 'nope' has no finished cell; run it first \(make free-accuracy\)",
    "pipeline.comparison.readme": "results/summary.csv does not exist",
    "pipeline.comparison.verdict": "git does not have results/summary.csv of HEAD .*; give a revision or a file with --against",
    "pipeline.comparison.verdict --against conf/config.yaml": "config.yaml must have the columns task,dataset",
}


@pytest.mark.parametrize("line", OTHERS)
def test_other_commands(line, folder, monkeypatch, capsys):
    check_sentence(*command(line, monkeypatch, capsys), OTHERS[line])


USAGE = [
    "pipeline.comparison.publish --nope", "pipeline.comparison.dashboard --port x", "pipeline.build.verify now", "pipeline.comparison.differences only-one.csv",
    "pipeline.stages.quantize a b", "benchmarks.kills --kills x",
]  # fmt: skip


@pytest.mark.parametrize("line", USAGE)
def test_wrong_usage_shows_the_usage(line, folder, monkeypatch, capsys):
    code, error = command(line, monkeypatch, capsys)
    assert code == 2 and error.startswith("usage: python -m ") and "error: " in error and "Traceback" not in error


def edit(path: str, change) -> None:
    content = yaml.safe_load(Path(path).read_text())
    change(content)
    Path(path).write_text(yaml.safe_dump(content))


# What is done to the configuration, and words of what `python -m pipeline.stages.resolve` says.
CONFIGURATIONS = {
    "a model of the grid that is not there": (lambda: edit("conf/grid.yaml", lambda c: c["grid"].update(model=["vit"])), "conf has no 'model/vit'"),
    "bits out of range": (lambda: edit("conf/precision/w4a4.yaml", lambda c: c.update(weight_bits=1)), "weight_bits is 1; use"),
    "a key too many": (lambda: edit("conf/config.yaml", lambda c: c.update(thread=1)), "no key 'thread'"),
    "a key too few": (lambda: edit("conf/data/digits.yaml", lambda c: c.pop("seed")), "'data.seed' is not set"),
    "a word for a number": (lambda: edit("conf/config.yaml", lambda c: c.update(workers="two")), "'workers' cannot be used"),
    "two sources of weights": (lambda: edit("conf/model/vit_micro.yaml", lambda c: c.update(checkpoint="x.pth")), "model.checkpoint and model.train"),
    "a broken file": (lambda: Path("conf/config.yaml").write_text("threads: [1\n"), "conf/config.yaml"),
    "an empty grid": (lambda: Path("conf/grid.yaml").write_text("grid:\n"), "conf/grid.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CONFIGURATIONS)
def test_configuration(mistake, folder, monkeypatch, capsys):
    change, words = CONFIGURATIONS[mistake]
    change()
    check_sentence(*command("pipeline.stages.resolve", monkeypatch, capsys), words)
    assert not Path("out").exists()


def test_outside_the_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in ("pipeline.build.verify", "pipeline.sweeps.experiment experiment=quick"):
        check_sentence(*command(line, monkeypatch, capsys), "there is no dvc.yaml here; run the command in the repository's root")


def make_results() -> None:
    baseline = Path("out/baseline/vit_micro/metrics.json")
    baseline.parent.mkdir(parents=True)
    baseline.write_text(json.dumps({"top1": 90.0, "top5": 99.0}))
    resolve.main([])


@pytest.mark.slow
def test_mistakes_with_results(folder, monkeypatch, capsys):
    make_results()
    check_sentence(*command("pipeline.comparison.publish --sweep nope", monkeypatch, capsys), "sweep 'nope' has no finished run; use one of: grid")
    check_sentence(*command("pipeline.comparison.publish --report", monkeypatch, capsys), "a report needs the W&B server: set WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    check_sentence(*command("pipeline.comparison.publish", monkeypatch, capsys), "WANDB_MODE is 'sometimes'; use one of: online, offline")
    check_sentence(*command("pipeline.comparison.dashboard --port 0", monkeypatch, capsys), "--port is 0; use a number from 1 to 65535")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check_sentence(*command(f"pipeline.comparison.dashboard --port {port}", monkeypatch, capsys), f"port {port} cannot be used")
    Path("dvc.lock").write_text("stages:\n  data:\n    outs:\n    - path: out/da")
    check_sentence(*command("pipeline.build.verify", monkeypatch, capsys), "delete them with `python -m pipeline.build.verify --repair`")
    Path("out/baseline/vit_micro/metrics.json").write_text("{")
    check_sentence(*command("pipeline.comparison.dashboard", monkeypatch, capsys), "metrics.json is damaged")
