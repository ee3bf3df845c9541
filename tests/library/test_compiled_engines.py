"""Engines that compile a model first, which takes seconds: Inductor and TVM, each against the exact engine."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qwt2
from qwt2.engines import ENGINES
from qwt2.engines.operations import count_operations
from qwt2.errors import Qwt2Error
from qwt2.evaluation.mismatch import record_modules
from qwt2.onnx.file import load_onnx, with_batch_size, with_constant_shapes
from qwt2.onnx.slices import slice_modules
from tests.support import tiny_models as tiny

pytestmark = pytest.mark.slow

GROUPS = {name: pytest.mark.xdist_group(name) for name in ("inductor", "tvm")}
NAMES = [pytest.param(name, marks=group) for name, group in GROUPS.items()]
# Compiling takes up to half a minute each.
MODULES = [("inductor", "vit", 8), ("inductor", "mobilenet", 4), ("tvm", "swin", 4), ("tvm", "mobilenet", 8)]
WHOLE = [("inductor", "resnet"), ("tvm", "resnet"), ("tvm", "vit")]
NEEDS = {"tvm": ("tvm", "apache-tvm")}


@pytest.fixture(autouse=True)
def installed(request):
    engine = request.node.callspec.params.get("engine") if hasattr(request.node, "callspec") else None
    if engine in NEEDS:
        pytest.importorskip(NEEDS[engine][0], reason=f"needs {NEEDS[engine][1]}")


@pytest.mark.parametrize("engine, network, bits", [pytest.param(*row, marks=GROUPS[row[0]]) for row in MODULES])
def test_every_module_agrees_with_the_exact_engine(engine, network, bits):
    folded, path = tiny.exported(network, bits, "cwac")
    records = record_modules(folded, tiny.images(2, seed=1))
    inputs = {name: array for name, array in records.items() if not name.endswith(".result")}
    sliced, slices = slice_modules(load_onnx(path), inputs)
    exact = ENGINES.get("torch_int8")(sliced, 1)(inputs)
    session = ENGINES.get(engine)(sliced, 1)
    found = session(inputs)
    assert found.keys() == exact.keys() and len(found) == len(slices)
    steps = {m: np.abs(found[s.output] - exact[s.output]) / s.step(exact[s.output]) for m, s in slices.items()}
    assert max(difference.max() for difference in steps.values()) <= 1 + 1e-3
    assert (np.concatenate([d.ravel() for d in steps.values()]) >= 0.5).mean() <= 1e-3
    # Inductor multiplies activations in float.
    integer = {"Conv", "Gemm"} if engine == "inductor" else {"Conv", "Gemm", "MatMul"}
    products = sum(node.op_type in integer for node in sliced.graph.node)
    assert sum(count_operations(session.operations())["integer"].values()) == products


@pytest.mark.parametrize("engine, network", [pytest.param(*row, marks=GROUPS[row[0]]) for row in WHOLE])
def test_whole_networks_agree(engine, network):
    _, path = tiny.exported(network, 8, "cwac")
    images = tiny.images(3, seed=1).numpy()
    model, exact = qwt2.load_engine(path, engine), qwt2.load_engine(path, "torch_int8")
    for batch in (images, images[::-1].copy()):
        expected = exact(batch)
        assert np.abs(model(batch) - expected).max() < 0.05 * np.abs(expected).max()
    graph = onnx.load(path).graph
    found = count_operations(model.session(3).operations())
    assert sum(found["integer"].values()) >= sum(node.op_type in ("Conv", "Gemm") for node in graph.node)


@pytest.mark.parametrize("engine", NAMES)
def test_float_layers_are_reported_as_float(engine, tmp_path):
    import torch

    model = tiny.randomize(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 4), torch.nn.ReLU()))
    engine = qwt2.load_engine(qwt2.export_onnx(model, tmp_path / "float.onnx", tiny.images(2)), engine)
    images = tiny.images(2)
    np.testing.assert_allclose(engine(images.numpy()), model(images).numpy(), rtol=1e-5, atol=1e-5)
    found = count_operations(engine.session(2).operations())
    assert found["integer"] == {} and found["float"]


@pytest.mark.parametrize("network", tiny.exported_models())
def test_constant_shapes_change_no_output(network):
    _, path = tiny.exported(network, 8, "cwac")
    model = with_batch_size(load_onnx(path), 2)
    folded = with_constant_shapes(model)
    assert not [node.op_type for node in folded.graph.node if node.op_type in ("Shape", "Constant")]
    onnx.checker.check_model(folded, full_check=True)
    feeds = {"images": tiny.images(2).numpy()}
    [before], [after] = (ENGINES.get("torch_int8")(m, 1)(feeds).values() for m in (model, folded))
    assert np.array_equal(before, after)


def test_inductor_names_operations_it_has_not():
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    model = helper.make_model(helper.make_graph([helper.make_node("Hardmax", ["x"], ["y"])], "g", [x], [y]))
    with pytest.raises(Qwt2Error, match="inductor has no Hardmax"):
        ENGINES.get("inductor")(model, 1)
