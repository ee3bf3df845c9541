"""Integer engines: they compute what the folded model computes, and refuse what they were not made for."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import qwt2
import qwt2.engines
from qwt2.errors import Qwt2Error
from qwt2.evaluation.mismatch import Mismatch, engine_mismatch, fold_mismatch, record_modules
from qwt2.io import load_arrays, save_arrays
from qwt2.onnx.file import load_onnx
from tests.support import tiny_models as tiny

pytestmark = pytest.mark.slow

NAMES, NETWORKS = tiny.ENGINES, list(tiny.BUILDERS)


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("bits, method", [(8, "cwac"), (4, None), (3, "cwac"), (4, "qwt")])
def test_every_module_agrees_with_the_simulation(engine, network, bits, method):
    """Each module fed with the same input: at most one output step, and rarely."""
    folded, path = tiny.exported(network, bits, method)
    records = record_modules(folded, tiny.images(4, seed=1))
    mismatches = engine_mismatch(load_onnx(path), engine, records)
    assert len(mismatches) == sum(name.endswith(".result") for name in records)
    assert max(m.steps for m in mismatches.values()) <= 1 + 1e-3
    sizes = {name: records[f"{name}.result"].size for name in mismatches}
    differing = sum(m.fraction * sizes[name] for name, m in mismatches.items())
    assert differing <= 1e-3 * sum(sizes.values())  # over all modules; the smallest have 20 elements


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("network", NETWORKS)
def test_whole_networks_agree_at_8_bits(engine, network):
    folded, path = tiny.exported(network, 8, "cwac")
    images = tiny.images(8, seed=1)
    with torch.no_grad():
        expected = folded(images).numpy()
    found = qwt2.load_engine(path, engine)(images.numpy())
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("bits", [8, 3])
def test_whole_residual_networks_are_the_same(engine, bits):
    """Also what engines make one kernel of, as OpenVINO does of convolution, quantizer and addition.

    A value on the border between two codes may fall on either side, which changes what follows in that image alone.
    """
    folded, path = tiny.exported("resnet", bits, "cwac")
    images = tiny.images(8, seed=1)
    with torch.no_grad():
        expected = folded(images).numpy()
    found = qwt2.load_engine(path, engine)(images.numpy())
    assert np.median(np.abs(found - expected).max(1)) < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("network", ["resnet", "mobilenet"])
@pytest.mark.parametrize("bits", [8, 3])
def test_openvino_computes_its_own_variant_as_simulated(network, bits):
    """Convolution, activation, addition and one rounding in one kernel.

    Other engines run the file too, and round where OpenVINO does not.
    """
    folded, path = tiny.exported(network, bits, "cwac", "openvino")
    images = tiny.images(8, seed=1)
    with torch.no_grad():
        expected = folded(images).numpy()
    records = record_modules(folded, images[:4])
    for engine in NAMES:
        found = qwt2.load_engine(path, engine)(images.numpy())
        error = np.median(np.abs(found - expected).max(1)) / np.abs(expected).max()
        assert error < (1e-4 if engine == "openvino" else 0.02 if bits == 8 else 0.2)
        assert max(m.steps for m in engine_mismatch(load_onnx(path), engine, records).values()) <= 1 + 1e-3


@pytest.mark.parametrize("network", NETWORKS)
def test_engines_agree_for_every_batch_size(network):
    _, path = tiny.exported(network, 8, "cwac")
    images = tiny.images(5, seed=2).numpy()
    for engine in NAMES:
        model = qwt2.load_engine(path, engine)
        whole = model(images)
        single = np.concatenate([model(images[i : i + 1]) for i in range(5)])
        assert np.abs(whole - single).max() < 0.05 * np.abs(whole).max()


def test_mismatch_is_measured_in_steps():
    expected = np.linspace(0, 10, 1000)
    actual = expected.copy()
    actual[3] += 0.5
    found = Mismatch.of(actual, expected, step=0.25)
    assert found.steps == pytest.approx(2) and found.fraction == pytest.approx(1e-3)
    assert Mismatch.worst([found, Mismatch(1.0, 0.5)]) == Mismatch(found.steps, 0.5)


@pytest.mark.parametrize("engine", NAMES)
def test_a_wrong_model_shows_as_a_mismatch(engine):
    """The figure is no formality: one weight code changed by one is seen in the module that holds it."""
    folded, path = tiny.exported("vit", 8, None)
    records = record_modules(folded, tiny.images(4, seed=1))
    model = load_onnx(path)
    weight = next(i for i in model.graph.initializer if i.name == "blocks.0.mlp.fc1.weight")
    codes = onnx.numpy_helper.to_array(weight).copy()
    codes[0, 0] = codes[0, 0] - 20 if codes[0, 0] > 0 else codes[0, 0] + 20
    weight.CopyFrom(onnx.numpy_helper.from_array(codes, weight.name))
    mismatches = engine_mismatch(model, engine, records)
    assert mismatches["blocks.0.mlp.fc1"].steps > 1
    assert all(m.steps <= 1 + 1e-3 for name, m in mismatches.items() if name != "blocks.0.mlp.fc1")


def test_folding_is_compared_layer_by_layer():
    qmodel = tiny.quantized("resnet", 4, 4)
    qwt2.compensate(qmodel, tiny.batches(), "cwac")
    folded = qwt2.fold(qmodel)
    worst = Mismatch.worst(list(fold_mismatch(qmodel, folded, tiny.images(4, seed=1)).values()))
    assert worst.steps <= 1 + 1e-3 and worst.fraction <= 1e-3
    with torch.no_grad():
        folded.get_submodule("layer1.0.conv1").bias.mul_(3)
    changed = fold_mismatch(qmodel, folded, tiny.images(4, seed=1))
    assert changed["layer1.0.conv1"].steps > 1


def test_records_survive_a_file(tmp_path):
    folded, _ = tiny.exported("swin", 8, None)
    records = record_modules(folded, tiny.images(2))
    save_arrays(tmp_path / "r.safetensors", records)
    loaded = load_arrays(tmp_path / "r.safetensors")
    assert loaded.keys() == records.keys() and all(np.array_equal(v, records[k]) for k, v in loaded.items())


def test_unknown_engines_are_refused_with_the_known_ones():
    _, path = tiny.exported("vit", 8, None)
    with pytest.raises(Qwt2Error, match="tensorflow.*onnxruntime.*openvino"):
        qwt2.load_engine(path, "tensorflow")


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize(
    "images",
    [np.zeros((1, 3, 32, 32)), np.zeros((1, 3, 24, 24), np.float32), np.zeros((0, 3, 32, 32), np.float32),
     np.zeros((3, 32, 32), np.float32)],
)  # fmt: skip
def test_images_of_another_kind_are_refused(engine, images):
    _, path = tiny.exported("vit", 8, None)
    with pytest.raises(Qwt2Error, match=r"takes float32 \(N, 3, 32, 32\)"):
        qwt2.load_engine(path, engine)(images)


def foreign_model() -> bytes:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    return helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])).SerializeToString()


@pytest.mark.parametrize(
    "content, message",
    [(None, "does not exist"), (b"", "."), (b"PNG and not ONNX", "."), (foreign_model(), "qwt2.export_onnx")],
    ids=["missing", "empty", "other format", "foreign"],
)
def test_files_that_are_not_ours_are_refused(content, message, tmp_path):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Qwt2Error, match=message) as error:
        qwt2.load_engine(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_onnx_runtime_is_quiet_in_our_sessions_only(capfd):
    """It warns of a stored tensor that no node reads: to a user's own session, before and after ours."""
    import onnxruntime

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "xy"]
    unread = helper.make_tensor("unread", TensorProto.FLOAT, [1], [0.0])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:], [unread])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    said = []
    for ours in (False, True, False):
        if ours:
            qwt2.engines.Engine(model, "onnxruntime").session(1)
        else:
            onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        said.append("unread" in capfd.readouterr().err)
    assert said == [True, False, True]
