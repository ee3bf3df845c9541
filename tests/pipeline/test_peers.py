"""The comparison with other tools takes each at its best, and records every setting that it tried."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks import real
from benchmarks.peer_tools import Setting, quantize_static_settings, single_feeds, write_float
from benchmarks.peers import Comparison
from qwt2 import export_onnx, load_engine
from qwt2.evaluation import machine
from tests.support.tiny_models import images, resnet, vit


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    """A comparison whose files hold the size of the error that their model makes."""
    made = Comparison.__new__(Comparison)
    made.name, made.folder, made.costs, made.settings, made.tried = "vit", tmp_path, {}, {}, []
    made.test = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    made.exact = made.test.numpy()
    monkeypatch.setattr(made, "compiled", lambda engine, path, batch: lambda x: x * (1 + float(path.read_text())))
    return made


def writing(error: float):
    return lambda path: (path.write_text(str(error)), path.with_suffix(".bin").write_text(f"weights {error}"))


def failing(path):
    raise ValueError("no such operator\nin layer 3")


def test_the_setting_closest_to_the_float_model_is_kept(comparison):
    settings = [Setting("coarse", writing(0.1)), Setting("broken", failing), Setting("fine", writing(0.01)), Setting("poor", writing(0.5))]
    comparison.keep_best("openvino", "nncf", settings)
    path = comparison.path("openvino", "nncf")
    assert path.read_text() == "0.01" and path.with_suffix(".bin").read_text() == "weights 0.01"
    assert comparison.settings == {("openvino", "nncf"): "fine"} and ("openvino", "nncf") in comparison.costs
    tried = {row["setting"]: (row["logits_sqnr_db"], row["error"]) for row in comparison.tried}
    assert tried == {"coarse": (20.0, ""), "broken": ("", "no such operator"), "fine": (40.0, ""), "poor": (pytest.approx(6.02), "")}


def test_a_tool_that_fails_with_every_setting_is_named(comparison):
    with pytest.raises(RuntimeError, match="nncf failed on vit with every setting: no such operator"):
        comparison.keep_best("openvino", "nncf", [Setting("broken", failing)])


@pytest.mark.slow
def test_quantize_static_runs_with_every_calibration_method(tmp_path, monkeypatch):
    model, batch = vit(), images(8)
    export_onnx(model, tmp_path / "fp32.onnx", batch[:1])
    with torch.no_grad():
        exact = model(batch).numpy()
    for flags, suffix in ((["avx2"], ", reduce_range"), (["avx512_vnni"], "")):
        monkeypatch.setattr(machine, "describe", lambda: {"instruction_sets": flags})
        settings = list(quantize_static_settings(tmp_path / "fp32.onnx", single_feeds([batch]), is_transformer=True))
        names = [f"{name}{suffix}" for name in ("MinMax", "Entropy", "Percentile")]
        assert [setting.name for setting in settings] == [*names, *(f"{name}, products only" for name in names)]
    for setting in settings:
        setting.write(tmp_path / "int8.onnx")
        assert np.abs(load_engine(tmp_path / "int8.onnx", "onnxruntime")(batch.numpy()) - exact).mean() < np.abs(exact).mean()


@pytest.mark.slow
def test_quantize_static_gets_a_file_without_batchnorms(tmp_path):
    model, batch = resnet(), images(2)
    path = write_float(model, tmp_path / "fp32.onnx", batch[:1])
    quant_pre_process(path, tmp_path / "prepared.onnx", skip_symbolic_shape=True)
    assert not {"BatchNormalization", "Expand"} & {node.op_type for node in onnx.load(tmp_path / "prepared.onnx").graph.node}
    with torch.no_grad():
        exact = model(batch).numpy()
    assert np.allclose(load_engine(tmp_path / "prepared.onnx", "onnxruntime")(batch.numpy()), exact, atol=1e-4)


def test_calibration_inputs_are_given_one_by_one():
    feeds = single_feeds([{"ids": torch.tensor([[1, 2], [3, 4]])}, {"ids": torch.tensor([[5, 6]])}])
    assert [feed["ids"].tolist() for feed in feeds] == [[[1, 2]], [[3, 4]], [[5, 6]]]


def test_settings_that_fail_on_a_real_network_are_named_and_left_out(tmp_path, monkeypatch, capsys):
    made = real.Comparison.__new__(real.Comparison)
    made.cfg, made.folder, made.float_file, made.calibration = {"model": {"name": "lite"}}, tmp_path, tmp_path, []
    made.network, made.example, made.is_transformer = None, None, False
    monkeypatch.setattr(real, "quantize_static_settings", lambda *_: [Setting("broken", failing), Setting("fine", writing(0.1))])
    assert dict(made.others("onnxruntime")) == {"quantize_static (fine)": tmp_path / "quantize_static-1.onnx"}
    assert "quantize_static (broken) fails on lite: no such operator\n" in capsys.readouterr().out


def test_calls_are_timed_without_the_checks_of_inputs():
    class Checking:
        input = SimpleNamespace(name="x")

        def session(self, batch):
            return lambda feeds: (batch, feeds)

    images, texts = np.zeros((3, 2)), {"ids": np.zeros((4, 2)), "mask": np.zeros((4, 2))}
    assert real.timed(Checking(), images)() == (3, {"x": images})
    assert real.timed(Checking(), texts)() == (4, texts)
