"""The TensorRT profile: its files keep TensorRT's rules, which are checked without it, and say what was simulated."""

import copy
import functools
import importlib.util
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import qwt2
from qwt2.engines import ENGINES
from qwt2.errors import Qwt2Error
from qwt2.evaluation.mismatch import engine_mismatch, record_modules
from qwt2.onnx.export import write_onnx
from qwt2.onnx.file import load_onnx
from qwt2.onnx.templates import rewrite_onnx
from qwt2.onnx.tensorrt_rules import MAX_OPSET, check
from qwt2.quantization.info import quantized_layers
from tests.support import tiny_models as tiny

pytestmark = pytest.mark.slow

# Every network, and every number of bits for tokens and for images.
PAIRS = [("vit", 8), ("vit", 4), ("swin", 4), ("resnet", 8), ("mobilenet", 4)]
_FILES = tempfile.TemporaryDirectory(prefix="qwt2-tests-")


@functools.cache
def exported(network: str, bits: int) -> tuple[torch.nn.Module, Path]:
    """A folded model with a channel of negative alpha in every layer, and its file."""
    qmodel = tiny.quantized(network, bits, bits, "tensorrt")
    qwt2.compensate(qmodel, tiny.batches(), "cwac", gate="none")
    for layer in quantized_layers(qmodel).values():
        sign = torch.ones_like(layer.alpha)
        sign[0] = -1
        layer.set_compensation(layer.alpha * sign, layer.beta)
    folded = qwt2.fold(qmodel)
    return folded, write_onnx(folded, Path(_FILES.name) / f"{network}-{bits}.onnx", tiny.images(2))


@pytest.mark.parametrize("network, bits", [pytest.param(*pair, marks=pytest.mark.xdist_group(f"export-{pair[0]}")) for pair in PAIRS])
class TestFiles:
    def test_keep_every_rule(self, network, bits):
        _, path = exported(network, bits)
        model = load_onnx(path)
        onnx.checker.check_model(model, full_check=True)
        assert check(model) == []
        # The rules again, in the plainest form.
        types = {tensor.data_type for tensor in model.graph.initializer}
        assert TensorProto.INT8 in types and not types & {TensorProto.UINT8, TensorProto.INT32}
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        assert all((array == 0).all() for name, array in stored.items() if name.endswith("zero_point"))
        assert all((array > 0).all() for name, array in stored.items() if name.endswith("scale"))
        assert all(array.min() >= -127 for name, array in stored.items() if name.endswith(".weight") and array.dtype == np.int8)

    def test_agree_with_the_simulation(self, network, bits):
        folded, path = exported(network, bits)
        records = record_modules(folded, tiny.images(4, seed=1))
        for engine in ("onnxruntime", "torch_int8"):
            mismatches = engine_mismatch(load_onnx(path), engine, records)
            assert len(mismatches) == sum(name.endswith(".result") for name in records)
            assert max(m.steps for m in mismatches.values()) <= 1 + 1e-3
            sizes = {name: records[f"{name}.result"].size for name in mismatches}
            assert sum(m.fraction * sizes[name] for name, m in mismatches.items()) <= 1e-3 * sum(sizes.values())

    def test_run_on_onnx_runtime(self, network, bits):
        folded, path = exported(network, bits)
        images = tiny.images(8, seed=1)
        with torch.no_grad():
            expected = folded(images).numpy()
        found = qwt2.load_engine(path)(images.numpy())
        assert np.abs(found - expected).max() < (0.05 if bits == 8 else 0.3) * np.abs(expected).max()


def test_folding_agrees_with_the_symmetric_simulation():
    """Codes after ReLU and softmax use the upper half of a signed range, in the simulation as in the file."""
    qmodel = tiny.quantized("vit", 8, 8, "tensorrt")
    images = tiny.images(4, seed=1)
    with torch.no_grad():
        expected, folded = qmodel(images), qwt2.fold(qmodel)(images)
    assert (expected - folded).abs().max() < 0.05 * expected.abs().max()
    assert all(not m.zero_point.any() for m in qmodel.modules() if hasattr(m, "zero_point"))


def test_files_of_other_recipes_are_refused(tmp_path):
    folded = copy.deepcopy(tiny.exported("resnet", 8, None)[0])
    info = folded.quantization
    info.request = replace(info.request, target="tensorrt")  # which it was not quantized for
    with pytest.raises(Qwt2Error, match="target 'tensorrt': .*zero point.*leave that module in float"):
        write_onnx(folded, tmp_path / "a.onnx", tiny.images(2))
    assert list(tmp_path.iterdir()) == []


def test_a_tensorrt_file_is_no_template_for_others(tmp_path):
    folded, path = exported("resnet", 8)
    with pytest.raises(Qwt2Error, match="another structure"):
        rewrite_onnx(path, folded, tmp_path / "a.onnx")


def broken(change) -> list[str]:
    """What `check` says of a small sound model after `change`."""
    f = np.float32
    stored = {
        "s": f(0.1), "z": np.int8(0), "w": np.ones((3, 2), np.int8), "ws": np.ones(2, f), "wz": np.zeros(2, np.int8), "b": np.ones(2, f),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], "weight", axis=1),
        helper.make_node("Gemm", ["d", "dw", "b"], ["y"], "gemm"),
    ]
    x, y = helper.make_tensor_value_info("x", 1, ["batch", 3]), helper.make_tensor_value_info("y", 1, ["batch", 2])
    opsets = [helper.make_opsetid("", MAX_OPSET)]
    parts = {"stored": stored, "nodes": nodes, "opsets": opsets, "x": x}
    change(parts)
    tensors = [numpy_helper.from_array(np.asarray(a), n) for n, a in stored.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=opsets)
    return [str(violation) for violation in check(model)]


def test_a_sound_model_breaks_no_rule():
    assert broken(lambda parts: None) == []


@pytest.mark.parametrize(
    "change, node, reason",
    [
        (lambda p: p["stored"].update(z=np.int8(3)), "quantize", "zero point other than 0"),
        (lambda p: p["stored"].update(z=np.uint8(0)), "quantize", "not int8"),
        (lambda p: p["nodes"][0].input.pop(), "quantize", "not int8"),
        (lambda p: p["stored"].update(s=np.float32(-1)), "quantize", "not positive"),
        (lambda p: p["stored"].update(ws=np.array([1, 0], np.float32)), "weight", "not positive"),
        (lambda p: p["stored"].update(s=np.ones(3, np.float32), z=np.zeros(3, np.int8)), "quantize", "more than one scale"),
        (lambda p: p["stored"].pop("ws"), "weight", "not a constant"),
        (lambda p: p["stored"].update(w=np.ones((3, 2), np.int32), wz=np.zeros(2, np.int32)), "weight", "int32"),
        (lambda p: p["nodes"][2].attribute[0].CopyFrom(helper.make_attribute("axis", 0)), "gemm", "axis 0"),
        (lambda p: p["nodes"][3].input.__setitem__(0, "x"), "gemm", r"one \(x\) in float"),
        (lambda p: p["stored"].pop("b"), "gemm", "bias that is not a float constant"),
        (lambda p: p["nodes"].insert(1, helper.make_node("Relu", ["q"], ["r"])), "quantize", "Relu reads before"),
        (lambda p: p["opsets"].__setitem__(0, helper.make_opsetid("", 21)), "model", "opset 21"),
        (lambda p: p["opsets"].append(helper.make_opsetid("com.microsoft", 1)), "model", "com.microsoft"),
        (lambda p: p["x"].type.tensor_type.shape.dim[1].Clear(), "x", "dynamic dimension"),
    ],
)  # fmt: skip
def test_each_rule_names_the_node_that_breaks_it(change, node, reason):
    import re

    found = broken(change)
    assert any(line.startswith(f"{node}: ") and re.search(reason, line) for line in found), found


def test_the_session_refuses_other_files_before_it_needs_tensorrt():
    _, path = tiny.exported("vit", 8, None)
    with pytest.raises(Qwt2Error, match="TensorRT cannot run this file: .*target='tensorrt'"):
        ENGINES.get("tensorrt")(load_onnx(path), 1)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_the_engine_says_what_to_install():
    _, path = exported("resnet", 8)
    with pytest.raises(Qwt2Error, match=r"tensorrt cannot be imported .*install it with: pip install 'qwt2\[tensorrt\]'"):
        qwt2.load_engine(path, "tensorrt")(tiny.images(1).numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("network", tiny.BUILDERS)
def test_modules_agree_on_tensorrt(network):
    pytest.importorskip("tensorrt", reason="needs the package tensorrt")
    folded, path = exported(network, 8)
    records = record_modules(folded, tiny.images(4, seed=1))
    mismatches = engine_mismatch(load_onnx(path), "tensorrt", records)
    assert max(m.steps for m in mismatches.values()) <= 1 + 1e-3
    session = ENGINES.get("tensorrt")(load_onnx(path), 1)
    assert any(operation.integer for operation in session.operations())
