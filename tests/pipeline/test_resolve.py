"""Resolving the configuration: who reads what, and what a slip in it looks like."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml

from pipeline.build import compose
from pipeline.stages import resolve as stage
from pipeline.stages.resolve import resolve
from qwt2.classification.models import build_model, call_factory
from qwt2.data import DATASETS, open_dataset, write_dataset
from qwt2.errors import Qwt2Error
from tests.support.options import options

pytestmark = pytest.mark.xdist_group("resolve")  # one worker resolves the small grid

ROOT = Path(__file__).resolve().parents[2]
MODELS = ["resnet_micro", "vit_micro"]
REPORTS = {"report", "report@classification"}


@pytest.fixture
def conf(tmp_path, monkeypatch) -> Path:
    """A copy of the configuration with a small grid, in the working directory."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    write_grid(MODELS, ["w8a8", "w4a4"])
    return tmp_path / "conf"


@pytest.fixture(scope="module")
def resolved(tmp_path_factory) -> dict[Path, str]:
    """What the small grid resolves to before a test changes anything."""
    folder = tmp_path_factory.mktemp("resolved")
    shutil.copytree(ROOT / "conf", folder / "conf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_grid(MODELS, ["w8a8", "w4a4"])
        return resolve()


def write_grid(models, precisions) -> None:
    Path("conf/grid.yaml").write_text(yaml.safe_dump({"grid": {"model": models, "precision": precisions}}))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def changed(before: dict, after: dict) -> set[str]:
    """Names of the resolved files that exist in both and differ, without `.yaml`."""
    return {path.stem for path in before.keys() & after.keys() if before[path] != after[path]}


def cells(*stages: str, models=MODELS, precisions=("w8a8", "w4a4")) -> set[str]:
    return {f"{stage}@{model}-{precision}" for stage in stages for model in models for precision in precisions}


def test_every_stage_and_cell_has_a_file(resolved):
    names = {path.stem for path in resolved}
    baselines = {f"baseline@{model}" for model in MODELS}
    assert names == cells("quantize", "evaluate") | baselines | REPORTS | {"data"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, old, new, readers",
    [
        ("config.yaml", "threads: 1 ", "threads: 2 ", None),
        ("config.yaml", "repeats: 200", "repeats: 20", cells("evaluate") | REPORTS),
        ("config.yaml", "mismatch_images: 8", "mismatch_images: 4", cells("evaluate", "quantize") | REPORTS),
        ("config.yaml", "observer_images: 32", "observer_images: 16", cells("quantize")),
        ("config.yaml", "images: 256", "images: 128", cells("quantize") | REPORTS),
        ("model/vit_micro.yaml", "steps: 1500", "steps: 10", {"baseline@vit_micro"}),
        ("compensation/cwac.yaml", "order: sequential", "order: one_pass", cells("quantize")),
        ("precision/w4a4.yaml", "weight_bits: 4", "weight_bits: 5", cells("quantize", precisions=["w4a4"])),
        ("ptq/percentile.yaml", "[percentile_published]", "[]",
         cells("quantize", "evaluate", models=["resnet_micro"])),
        ("ptq/percentile.yaml", "portable", "openvino", cells("quantize", models=["resnet_micro"])),
    ],
)  # fmt: skip
def test_a_change_reaches_exactly_the_stages_that_read_it(conf, resolved, file, old, new, readers):
    edit(conf / file, old, new)
    after = resolve()
    assert resolved.keys() == after.keys()
    if readers is None:  # all that compute
        readers = {path.stem for path in resolved} - REPORTS - {"data"}
    assert changed(resolved, after) == readers


def test_comments_change_nothing(conf, resolved):
    for path in conf.rglob("*.yaml"):
        path.write_text("# a remark\n" + path.read_text())
    assert resolve() == resolved


def test_a_new_precision_or_model_leaves_the_other_cells_alone(conf, resolved):
    write_grid([*MODELS, "swin_micro"], ["w8a8", "w4a4", "w3a3"])
    after = resolve()
    assert resolved.keys() < after.keys() and changed(resolved, after) == REPORTS


def test_detectors_are_resolved_beside_classifiers_and_apart(conf):
    write_grid(["vit_micro", "mask_rcnn_swin_micro"], ["w4a4"])
    files = {path.stem: yaml.safe_load(text) for path, text in resolve().items()}
    tasks = {name: files[f"report@{name}"]["grid"]["model"] for name in ("classification", "detection")}
    assert tasks == {"classification": ["vit_micro"], "detection": ["mask_rcnn_swin_micro"]}
    assert files["report"]["grid"]["model"] == ["vit_micro", "mask_rcnn_swin_micro"]
    assert set(files["data"]["datasets"]) == {"digits", "digits_coco"}
    assert files["quantize@mask_rcnn_swin_micro-w4a4"]["model"]["parts"] == ["backbone", "neck", "heads"]
    assert "train" not in files["quantize@mask_rcnn_swin_micro-w4a4"]["model"]  # where weights come from is baseline's
    assert stage.cells_of("classification") == ["vit_micro-w4a4"]
    write_grid(["vit_micro"], ["w4a4"])
    with pytest.raises(Qwt2Error, match="no model of task 'detection'"):
        stage.cells_of("detection")


def test_experimental_models_stay_out_of_the_grid(conf):
    write_grid(["vit_micro", "gpt_micro"], ["w4a4"])
    with pytest.raises(Qwt2Error, match="the grid has gpt_micro, whose task language is experimental and runs in sweeps only"):
        resolve()


def test_a_task_takes_its_own_datasets_alone():
    with pytest.raises(Qwt2Error, match="data.name is 'digits_coco'; for classification, choose one of .*digits.*imagefolder"):
        compose.compose_cell(["data=digits_coco"])
    with pytest.raises(Qwt2Error, match="'data.path' is not set"):
        compose.compose_cell(["model=mask_rcnn_swin_tiny"])


def test_stage_writes_its_files_and_removes_those_of_former_cells(conf):
    stage.main([])
    write_grid(["vit_micro"], ["w4a4"])
    stage.main([])
    assert {path.stem for path in Path("out/resolved").iterdir()} == {
        *("data", "report", "report@classification", "baseline@vit_micro", "code"),
        *cells("quantize", "evaluate", models=["vit_micro"], precisions=["w4a4"]),
    }


@pytest.mark.slow
def test_resolving_imports_no_torch():
    import subprocess
    import sys

    code = """
import sys
from pipeline.build.compose import compose_cell
from pipeline.stages.resolve import resolve
resolve()
for model in ("gpt_micro", "clip_micro", "dit_micro"):
    compose_cell([f"model={model}"])  # its dataset is known, too
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("group", ["model", "precision", "ptq"])
def test_every_option_of_every_group_composes(group):
    for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
        needs_path = "data: coco" in path.read_text()
        cfg = compose.compose_cell([f"{group}={path.stem}", *["data.path=some/folder"] * needs_path])
        assert cfg[group].get("name", cfg[group].get("method")) == path.stem.removesuffix("_integer")


def test_a_dataset_is_one_registered_class_and_one_file_of_configuration(conf, monkeypatch):
    DATASETS.names()  # finds those of this library, before the copy that the test adds to
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))

    @DATASETS.register("noise")
    @dataclass
    class Noise:
        TASK: ClassVar[str] = "classification"
        name: str
        num_classes: int
        amplitude: float

        @staticmethod
        def write(cfg, folder):
            folder.mkdir()
            (folder / "amplitude.txt").write_text(str(cfg["amplitude"]))

        @staticmethod
        def open(cfg, folder, model):
            return float((folder / "amplitude.txt").read_text())

    (conf / "data/noise.yaml").write_text("name: noise\nnum_classes: 3\namplitude: 0.5\n")
    cfg = compose.compose_cell(["data=noise", "model=deit_tiny"])["data"]
    assert cfg == {"name": "noise", "num_classes": 3, "amplitude": 0.5}
    write_dataset(cfg, Path("noise"))
    assert open_dataset(cfg, Path("noise")) == 0.5
    with pytest.raises(Qwt2Error, match="no key 'data.amplitud'; the keys there are: name, num_classes, amplitude"):
        compose.compose_cell(["data=noise", "model=deit_tiny", "+data.amplitud=1"])
    with pytest.raises(Qwt2Error, match="for classification, choose one of .*digits.*imagefolder.*noise"):
        compose.compose_cell(["data.name=nois"])


TRAIN = yaml.safe_load((ROOT / "conf/model/vit_micro.yaml").read_text())["train"]
OWN = """
from torch import nn

def small(classes=10):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
"""


def test_a_pytorch_model_of_one_s_own_is_one_file_of_configuration(conf, monkeypatch):
    monkeypatch.syspath_prepend(conf.parent)
    (conf.parent / "own_net.py").write_text(OWN)
    (conf / "model/own.yaml").write_text("name: own\nfactory: own_net:small\nkwargs: {classes: 10}\ncheckpoint: null\n")
    write_grid(["own"], ["w8a8"])
    before = resolve()
    network = yaml.safe_load(before[stage.config_path("quantize", "own-w8a8")])["model"]
    assert network.items() > {"name": "own", "factory": "own_net:small", "kwargs": {"classes": 10}}.items()
    assert not {"checkpoint", "train"} & network.keys()
    model = build_model(compose.compose_cell(["model=own"])["model"])
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10) and not model.training
    (conf.parent / "own_net.py").write_text(OWN + "# a remark\n")
    assert resolve() == before
    (conf.parent / "own_net.py").write_text(OWN.replace("ReLU", "GELU"))
    assert changed(before, resolve()) == {"baseline@own", "quantize@own-w8a8", "evaluate@own-w8a8"}


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"factory": "no_such_module:f"}, "model.factory is 'no_such_module:f', but there is no module 'no_such_module'"),
        ({"factory": "own_net:small", "checkpoint": "a", "train": TRAIN}, "has model.checkpoint and model.train"),
        ({"factory": "own_net:small", "kwarg": 1}, "no key 'model.kwarg'; the keys there are: name, factory, kwargs"),
        ({}, "model own does not say what to build; give it one of the keys: "),
    ],
)
def test_a_slip_in_a_model_of_one_s_own_is_one_sentence(keys, message, conf, monkeypatch):
    monkeypatch.syspath_prepend(conf.parent)
    (conf.parent / "own_net.py").write_text(OWN)
    (conf / "model/own.yaml").write_text(yaml.safe_dump({"name": "own"} | keys))
    with pytest.raises(Qwt2Error, match=message):
        compose.compose_cell(["model=own"])


@pytest.mark.parametrize(
    "factory, arguments, message",
    [
        ("own_net:large", {}, "own_net has no 'large'; give the name of a function that returns the model"),
        ("own_net:small", {"width": 1}, "own_net:small refuses its arguments: .*'width'; correct model.kwargs"),
        ("os:getcwd", {}, "os:getcwd returned a str; it must return an nn.Module"),
    ],
)
def test_a_factory_that_cannot_be_used_is_one_sentence(factory, arguments, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_net.py").write_text(OWN)
    with pytest.raises(Qwt2Error, match=message):
        call_factory(factory, **arguments)


def test_compensations_are_added_under_a_name_of_their_own():
    name = "compensation.offsets"
    cfg = compose.compose_cell([f"+compensation@{name}=cwac", f"{name}.estimator=bias_only", "compensation.qwt.dtype=float32"])
    assert cfg["compensations"] == [*compose.compose_cell([])["compensations"], "offsets"]
    assert cfg["compensation"]["offsets"] == cfg["compensation"]["cwac"] | {"estimator": "bias_only"}
    assert cfg["compensation"]["qwt"]["dtype"] == "float32"


def test_full_size_models_compose_with_a_folder_of_images():
    cfg = compose.compose_cell(["model=deit_small", "data=imagefolder", "data.path=some/folder"])
    assert cfg["data"]["num_classes"] == 1000 and cfg["model"]["pretrained"] and cfg["model"]["train"] is None


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["precision=w4a9"], options("precision")),
        (["model=vit_huge"], options("model")),
        (["data=imagenet"], options("data")),
        (["ptq=nope"], options("ptq")),
        (["compensation@compensation.qwt=qwt3"], options("compensation")),
        (["data=imagefolder"], "'data.path' is not set"),
        (["+calibration.image=3"], "no key 'calibration.image'; the keys there are: images, batch_size, observer_images"),
        (["calibration.images=many"], "'calibration.images' cannot be used: .*'many'"),
        (["calibration.images=0"], "'calibration.images' is 0, but must be at least 1"),
        (["seeds=[0,-1]"], "'seeds' is -1, but must be at least 0"),
        (["model.train.seed=-1"], "'model.train.seed' is -1"),
        (["evaluate.latency.repeats=-5"], "'evaluate.latency.repeats' is -5"),
        (["model.pretrained=true"], "has model.pretrained and model.train"),
        (["model.train=null"], "but has none"),
        (["data.val_images=null"], "'data.val_images' cannot be used"),
        (["data.name=cifar"], "data.name is 'cifar'; for classification, choose one of .*digits.*imagefolder"),
        (["precision.weight_bits=9"], "weight_bits is 9; use a whole number from 2 to 8"),
        (["precision.activation_bits=2"], "activation_bits is 2; use a whole number from 3 to 8"),
        (["evaluate.engines=[tensorflow]"], "'tensorflow'; use one of: inductor, onnxruntime, openvino"),
        (["no.such.key=1"], "no key 'no.such.key'"),
    ],
)
def test_a_slip_is_one_sentence_with_what_is_valid(overrides, message):
    with pytest.raises(Qwt2Error, match=message) as caught:
        compose.compose_cell(overrides)
    assert "\n" not in str(caught.value)
