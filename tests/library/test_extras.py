"""Packages that are optional: what a missing one leads to, and that importing the library needs none of them."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import qwt2
from qwt2.engines import check_engine
from qwt2.errors import Qwt2Error
from tests.support import tiny_models

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def hide(monkeypatch):
    """Make packages unimportable, as if they were not installed."""

    def hide_one(package: str) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return hide_one


def forget(monkeypatch, *modules: str) -> None:
    """Let modules of this library be imported anew, and the old ones stand again after the test."""
    for name in modules:
        monkeypatch.delitem(sys.modules, name, raising=False)


def sentence(package: str, extra: str) -> str:
    return rf"^{package} cannot be imported \(.*\); install it with: pip install 'qwt2\[{extra}\]'$"


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "tvm", "tensorrt"])
def test_an_engine_that_is_not_installed(hide, engine):
    hide(engine)
    with pytest.raises(Qwt2Error, match=sentence(engine, engine)):
        check_engine(engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "tvm"])
def test_a_model_on_an_engine_that_is_not_installed(hide, engine):
    _, path = tiny_models.exported("vit", 8, None)
    loaded = qwt2.load_engine(path, engine)
    hide(engine)
    with pytest.raises(Qwt2Error, match=sentence(engine, engine)):
        loaded(np.zeros((1, 3, 32, 32), np.float32))


def test_models_and_transforms_without_timm(hide):
    from qwt2.classification.models import build_model
    from qwt2.data.transforms import transform_config

    hide("timm")
    for function in (build_model, transform_config):
        with pytest.raises(Qwt2Error, match=sentence("timm", "timm")):
            function({"timm": "resnet18", "kwargs": {}, "num_classes": 10, "pretrained": False, "checkpoint": None})


def test_image_folders_without_pillow(hide, monkeypatch):
    forget(monkeypatch, "qwt2.data.imagefolder")
    hide("PIL")
    with pytest.raises(Qwt2Error, match=sentence("PIL", "timm")):
        import qwt2.data.imagefolder  # noqa: F401


@pytest.mark.parametrize("package", ["altair", "jinja2", "vl_convert"])
def test_reports_without_their_packages(hide, monkeypatch, package):
    forget(monkeypatch, "qwt2.report.page", "qwt2.report.charts", "qwt2.report.modules")
    hide(package)
    with pytest.raises(Qwt2Error, match=sentence(package, "report")):
        import qwt2.report.page  # noqa: F401


@pytest.mark.parametrize("package", ["mmdet", "mmengine"])
def test_detectors_without_mmdet(hide, package):
    from qwt2.detection.models import detector_config

    hide(package)
    with pytest.raises(Qwt2Error, match=sentence(package, "detection")):
        detector_config({"mmdet": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", "options": {}})


def test_digits_without_scipy(hide):
    from qwt2.data.digits import warped_ink

    hide("scipy")
    with pytest.raises(Qwt2Error, match=sentence("scipy", "pipeline")):
        warped_ink(np.zeros((1, 8, 8), np.float32), 16, np.random.default_rng(0))


def test_every_extra_that_a_message_names_exists():
    named = set()
    for path in (ROOT / "qwt2").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "extra"
                and isinstance(node.args[0], ast.Constant)
            ):
                named.add(node.args[0].value)
    assert {"timm", "report", "detection", "pipeline", "openvino"} <= named <= PROJECT["optional-dependencies"].keys()


def test_importing_loads_neither_torch_nor_anything_else_that_is_installed():
    code = "import sys; before = set(sys.modules); import qwt2; print(*sorted(set(sys.modules) - before))"
    done = python(code)
    top = {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names
    assert top == {"qwt2"}, done.stderr


@pytest.mark.slow
def test_the_library_needs_no_extra():
    """What `pip install .` brings is enough to quantize, compensate, fold and run: the rest is hidden here."""
    core = {re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]}
    extras = ["timm", "torchvision", "PIL", "onnxruntime", "openvino", "tvm", "mmdet", "mmengine", "mmcv", "pycocotools",
              "scipy", "altair", "vl_convert", "jinja2", "sklearn", "pandas", "hydra", "dvc", "wandb", "yaml", "psutil"]  # fmt: skip
    assert core == {"torch", "numpy", "onnx", "onnx-ir", "onnxscript", "safetensors", "tqdm"}
    code = f"""
import sys
for name in {extras}:
    sys.modules[name] = None
import tempfile, torch, qwt2
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
quantized = qwt2.quantize(model, data, method="percentile")
qwt2.compensate(quantized, data)
with tempfile.TemporaryDirectory() as folder:
    path = qwt2.export_onnx(qwt2.fold(quantized), folder + "/m.onnx", data[0])
    print(qwt2.load_engine(path, "torch_int8")(data[0].numpy()).shape)
"""
    done = python(code)
    assert done.stdout.strip() == "(4, 5)", done.stderr[-2000:]


@pytest.mark.parametrize("arguments", [["-c", "import qwt2"], ["-m", "qwt2"]])
def test_another_python_is_refused_in_one_sentence(arguments):
    code = "import runpy, sys; sys.version_info = (3, 10, 4); sys.version = '3.10.4 (main)'; "
    code += "import qwt2" if arguments[0] == "-c" else "runpy._run_module_as_main('qwt2')"
    done = python(code)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "qwt2 needs Python 3.11 or newer; this is Python 3.10.4" in last
    assert arguments[0] == "-c" or len(done.stderr.strip().splitlines()) == 1
    assert PROJECT["requires-python"] == ">=3.11"


def test_the_version_stands_in_one_place():
    assert qwt2.__version__ == PROJECT["version"]
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
