"""`python -m qwt2`: from a model and a folder of images to a checked integer file."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import qwt2
from qwt2.__main__ import main
from qwt2.onnx.tensorrt_rules import check
from qwt2.report.results import QUANTILES
from tests.support.tiny_models import vit

pytestmark = pytest.mark.e2e

FACTORY = "from tests.support import tiny_models\n\ndef make():\n    return tiny_models.vit()\n\ndef number():\n    return 3\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Twelve pictures in two subfolders, and a module that makes a model."""
    rng = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    (tmp_path / "mine.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    return tmp_path


def command(model: str, *options: str) -> None:
    main([model, "--images", "pictures", "--output", "out.onnx", "--calibration-images", "12", "--batch-size", "4", *options])


@pytest.mark.parametrize("compensation", ["cwac", "qwt", "none"])
def test_a_model_of_one_s_own(folder, capsys, compensation):
    command("mine:make", "--image-size", "32", "--compensation", compensation, "--weight-bits", "6")
    report = json.loads((folder / "out.json").read_text())
    assert report["file_bytes"] == (folder / "out.onnx").stat().st_size
    assert report["precision"]["weight_bits"] == 6 and len(report["calibration_images"]) == 12
    names = [*report["quantized_layers"], *report["quantized_products"]]
    modules = {module["module"]: module for module in report["modules"] if module["kind"] != "block"}
    assert set(modules) == set(names) and all(set(m["mismatch"]) == set(report["engines"]) for m in modules.values())
    fitted = [module for module in report["modules"] if "sqnr_before_db" in module]
    assert len(fitted) == {"cwac": len(report["quantized_layers"]), "qwt": 2, "none": 0}[compensation]
    if compensation == "cwac":
        for module in fitted:
            quantiles = [module[f"alpha_{suffix}"] for suffix in QUANTILES]
            assert quantiles == sorted(quantiles) and module["output_rms"] > 0 and module["gate_before_db"] is not None
    page = (folder / "out.html").read_text()
    assert all(f'"{name}"' in page for name in names) and page.count("<!DOCTYPE html>") == 1
    for engine in ("onnxruntime", "openvino"):
        assert report["engines"][engine]["mismatch_steps"] <= 1 + 1e-3
        worst = max(module["mismatch"][engine]["steps"] for module in modules.values())
        assert worst == report["engines"][engine]["mismatch_steps"]
        assert report["engines"][engine]["logits_sqnr_db"] > 10
    assert qwt2.load_engine("out.onnx")(np.zeros((2, 3, 32, 32), np.float32)).shape == (2, 5)
    assert "report: out.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [("--target", "tensorrt", "--opset", "19"), ("--target", "openvino", "--rotate"), ("--weight-storage", "int4", "--weight-bits", "4")],
)
def test_other_kinds_of_files(folder, options):
    command("mine:make", "--image-size", "32", "--compensation", "none", "--engines", "onnxruntime", *options)
    report = json.loads((folder / "out.json").read_text())
    assert report["engines"]["onnxruntime"]["mismatch_steps"] <= 1 + 1e-3
    stored = onnx.load("out.onnx")
    if "tensorrt" in options:
        assert check(stored) == []
    elif "openvino" in options:
        assert not any(tensor.name.endswith(".output.scale") for tensor in stored.graph.initializer)
        assert report["rotate"]
    else:
        assert onnx.TensorProto.INT4 in {tensor.data_type for tensor in stored.graph.initializer}


def test_unknown_targets_are_refused_before_any_work(folder, capsys):
    with pytest.raises(SystemExit) as error:
        command("mine:make", "--target", "coreml")
    assert error.value.code == 2 and "unknown target 'coreml'" in capsys.readouterr().err


def test_a_timm_model_with_a_checkpoint(folder):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7)
    save_file(model.state_dict(), "weights.safetensors")
    command("test_vit", "--checkpoint", "weights.safetensors", "--num-classes", "7", "--engines", "onnxruntime")
    report = json.loads((folder / "out.json").read_text())
    assert list(report["engines"]) == ["onnxruntime"] and not report["float_modules"]
    operations = report["engines"]["onnxruntime"]["operations"]
    assert operations["integer"]["QGemm"] and operations["float"]["Softmax"] and "MatMul" not in operations["float"]


def test_the_same_seed_gives_the_same_file(folder):
    files = []
    for _ in range(2):
        main(["mine:make", "--images", "pictures", "--output", "out.onnx", "--calibration-images", "6", "--batch-size", "3",
              "--image-size", "32", "--engines"])  # fmt: skip
        files.append((folder / "out.onnx").read_bytes())
    assert files[0] == files[1]


def corrupt(folder: Path) -> None:
    for path in (folder / "pictures").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("vit_smal_patch16_224", ["--pretrained"], "timm has no model 'vit_smal_patch16_224'; similar names: "),
        ("test_vit", [], "a timm model needs weights: give --checkpoint FILE or --pretrained"),
        ("test_vit", ["--checkpoint", "gone.pth"], "gone.pth does not exist"),
        ("mine:gone", [], "mine has no 'gone'"),
        ("gone:make", [], "gone cannot be imported"),
        ("mine:number", [], "mine:number returned a int; it must return an nn.Module"),
        ("mine:make", ["--pretrained"], "--pretrained is for timm's models"),
        ("mine:make", ["--images", "nowhere"], "nowhere is no folder; --images must name"),
        ("mine:make", ["--calibration-images", "99"], "pictures holds 12 images, fewer than --calibration-images 99"),
        ("mine:make", ["--calibration-images", "0"], "--calibration-images is 0; give at least 1"),
        ("mine:make", ["--batch-size", "-1"], "--batch-size is -1"),
        ("mine:make", ["--output", "model.bin"], "--output model.bin must end with .onnx"),
        ("mine:make", ["--output", "no/where.onnx"], "is no folder; make it first, or correct --output"),
        ("mine:make", ["--weight-bits", "9"], "weight_bits is 9; use a whole number from 2 to 8"),
        ("mine:make", ["--image-size", "32", "--method", "nope"], "unknown PTQ method 'nope'"),
        ("mine:make", ["--image-size", "32", "--compensation", "lora"], "unknown compensation method 'lora'"),
        ("mine:make", ["--image-size", "32", "--engines", "tensorflow"], "unknown engine 'tensorflow'"),
    ],
)
def test_mistakes_end_with_one_sentence_and_leave_nothing(folder, capsys, model, options, message):
    with pytest.raises(SystemExit) as end:
        command(model, *options)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not [path for path in folder.iterdir() if path.suffix in (".onnx", ".json", ".html")]


def test_images_that_cannot_be_decoded_are_named(folder, capsys):
    corrupt(folder)
    with pytest.raises(SystemExit) as end:
        command("mine:make", "--image-size", "32")
    assert end.value.code == 2 and "cannot be decoded" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = "import sys, qwt2.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--calibration-images" in done.stdout


def test_the_factory_s_model_is_the_one_that_is_quantized(folder):
    """The file computes what the library makes of the same model and images."""
    command("mine:make", "--image-size", "32", "--engines")
    logits = qwt2.load_engine("out.onnx")(np.zeros((1, 3, 32, 32), np.float32))
    with torch.no_grad():
        exact = vit()(torch.zeros(1, 3, 32, 32)).numpy()
    assert np.abs(logits - exact).max() < 0.2 * np.abs(exact).max()


def test_what_is_left_in_float_and_raised_to_8_bits(folder, capsys):
    """Excluded by pattern, allocated to a target; sizes, normalization and engines as a user may write them."""
    command(
        "mine:make", "--image-size", "32x32", "--mean", "0.5", "--std", "0.25", "--weight-bits", "3", "--exclude",
        "blocks.0.mlp", "--target-sqnr", "25", "--engines", "onnxruntime,openvino", "--sensitivity",
    )  # fmt: skip
    report = json.loads((folder / "out.json").read_text())
    assert {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2"} <= report["float_modules"].keys()
    assert report["allocation"] and all(move.endswith((" to W8A8", " to float")) for move in report["allocation"])
    assert report["engines"].keys() == {"onnxruntime", "openvino"}
    assert "allocated: " in capsys.readouterr().out
    with (folder / "out.sensitivity.csv").open() as file:
        costs = {row["module"]: float(row["sqnr_db"]) for row in csv.DictReader(file)}
    assert costs.keys() == set(report["quantized_layers"]) | set(report["quantized_products"])
    assert list(costs.values()) == sorted(costs.values())
    assert next(iter(costs)) in (folder / "out.sensitivity.svg").read_text()


def test_one_channel_and_a_compiled_checkpoint(folder):
    (folder / "grey.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 15 * 12, 5))\n"
    )
    import grey

    state = {f"_orig_mod.{name}": tensor for name, tensor in grey.make().state_dict().items()}  # as torch.compile names them
    save_file(state, folder / "compiled.safetensors")
    command("grey:make", "--image-size", "32x26", "--channels", "1", "--checkpoint", "compiled.safetensors")
    assert qwt2.load_engine("out.onnx")(np.zeros((2, 1, 32, 26), np.float32)).shape == (2, 5)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--device", "cuda"), "PyTorch sees no GPU here"),
        (("--mean", "0.5", "0.5"), "--mean gives 2 values for 3 channels"),
        (("--exclude", "blcks"), "exclude: 'blcks' matches no module"),
        (("--rotate", "--sensitivity"), "--sensitivity and --target-sqnr measure the model without rotation"),
    ],
)
def test_options_that_do_not_fit(folder, capsys, options, message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as error:
        command("mine:make", "--image-size", "32", *options)
    assert error.value.code == 2 and message in capsys.readouterr().err
