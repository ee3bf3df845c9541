"""Resolving the configuration: who reads what, and what a slip in it looks like."""

import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.build import compose
from pipeline.stages import resolve as stage
from pipeline.stages.resolve import resolve
from qwt2.errors import Qwt2Error

ROOT = Path(__file__).resolve().parents[1]
MODELS = ["resnet_micro", "vit_micro"]
REPORTS = {"report", "report@classification"}


@pytest.fixture
def conf(tmp_path, monkeypatch) -> Path:
    """A copy of the configuration with a small grid, in the working directory."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    write_grid(MODELS, ["w8a8", "w4a4"])
    return tmp_path / "conf"


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


def test_every_stage_and_cell_has_a_file(conf):
    names = {path.stem for path in resolve()}
    baselines = {f"baseline@{model}" for model in MODELS}
    assert names == cells("quantize", "evaluate") | baselines | REPORTS | {"data"}


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
        ("ptq/percentile.yaml", "[default, published]", "[default]",
         cells("quantize", "evaluate", models=["resnet_micro"])),
    ],
)  # fmt: skip
def test_a_change_reaches_exactly_the_stages_that_read_it(conf, file, old, new, readers):
    before = resolve()
    edit(conf / file, old, new)
    after = resolve()
    assert before.keys() == after.keys()
    if readers is None:  # all that compute
        readers = {path.stem for path in before} - REPORTS - {"data"}
    assert changed(before, after) == readers


def test_comments_change_nothing(conf):
    before = resolve()
    for path in conf.rglob("*.yaml"):
        path.write_text("# a remark\n" + path.read_text())
    assert resolve() == before


def test_a_new_precision_or_model_leaves_the_other_cells_alone(conf):
    before = resolve()
    write_grid([*MODELS, "swin_micro"], ["w8a8", "w4a4", "w3a3"])
    after = resolve()
    assert before.keys() < after.keys() and changed(before, after) == REPORTS


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


def test_a_task_takes_its_own_datasets_alone():
    with pytest.raises(Qwt2Error, match="data.name is 'digits_coco'; for classification, choose one of digits, imagefolder"):
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


def test_resolving_imports_no_torch():
    import subprocess
    import sys

    code = "import sys; from pipeline.stages.resolve import resolve; resolve(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("group", ["model", "precision", "ptq"])
def test_every_option_of_every_group_composes(group):
    for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
        needs_path = "data: coco" in path.read_text()
        cfg = compose.compose_cell([f"{group}={path.stem}", *["data.path=some/folder"] * needs_path])
        assert cfg[group].get("name", cfg[group].get("method")) == path.stem.removesuffix("_integer")


def test_compensations_are_added_under_a_name_of_their_own():
    name = "compensation.offsets"
    cfg = compose.compose_cell([f"+compensation@{name}=cwac", f"{name}.estimator=bias_only", "compensation.qwt.dtype=float32"])
    assert cfg["compensations"] == ["qwt", "cwac", "offsets"]
    assert cfg["compensation"]["offsets"] == cfg["compensation"]["cwac"] | {"estimator": "bias_only"}
    assert cfg["compensation"]["qwt"]["dtype"] == "float32"


def test_full_size_models_compose_with_a_folder_of_images():
    cfg = compose.compose_cell(["model=deit_small", "data=imagefolder", "data.path=some/folder"])
    assert cfg["data"]["num_classes"] == 1000 and cfg["model"]["pretrained"] and cfg["model"]["train"] is None


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["precision=w4a9"], "options of group 'precision' are: .*w4a4.*w8a8"),
        (["model=vit_huge"], "options of group 'model' are: .*vit_base"),
        (["data=imagenet"], "options of group 'data' are: coco, digits, digits_coco, imagefolder"),
        (["ptq=gptq"], "options of group 'ptq' are: minmax, mse, percentile, percentile_integer, repq, repq_integer"),
        (["compensation@compensation.qwt=qwt3"], "options of group 'compensation' are: cwac, none, qwt"),
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
        (["data.name=cifar"], "data.name is 'cifar'; for classification, choose one of digits, imagefolder"),
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
