"""Zero points in biases: not a bit of any output changes, and they stay where they cannot go."""

from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import qwt2
from qwt2.engines.interpreter.graph import TorchGraph
from qwt2.engines.onnxruntime import OnnxRuntimeSession
from qwt2.engines.openvino import OpenVinoSession
from qwt2.onnx.graph import readers
from qwt2.onnx.passes.zero_points import FOLDED, fold_zero_points, unfold_zero_points
from qwt2.onnx.templates import rewrite_onnx
from tests.support import tiny_models as tiny
from tests.support.onnx_graphs import after, stored, values_of

pytestmark = pytest.mark.slow

LARGEST = np.iinfo(np.int32).max


def layers(
    kind: str = "Gemm", zero_point: int = 100, pad: int = 0, groups: int = 1, read: str = "", bias: int = 900, count: int = 2, seed: int = 0
) -> onnx.ModelProto:
    """Layers that read one quantized tensor: (5, 8), transposed for a Gemm, or (2, 8, 6, 6).

    Args:
        read: what else reads the tensor: "a function", "the caller", "a product" or nothing; or "one bias", the layers'.
        bias: largest code of the biases, or the only one.
    """
    rng = np.random.default_rng(seed)
    shape = [8, 5] if kind == "Gemm" else [2, 8, 6, 6]
    constants = {"in.scale": np.float32(0.03), "in.zero_point": np.uint8(zero_point)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "in.scale", "in.zero_point"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "in.scale", "in.zero_point"], ["value"]),
    ]
    source, axis = "value", 0
    if kind == "Gemm":
        nodes.append(helper.make_node("Transpose", ["value"], ["rows"], perm=[1, 0]))
        source, axis = "rows", 1
    outputs = []
    for i in range(count):
        size = (8, 6) if kind == "Gemm" else (6 * groups, 8 // groups, 3, 3)
        own = f"b{i if read != 'one bias' else 0}"
        channels = size[axis]
        constants |= {
            f"w{i}": rng.integers(-127, 128, size, np.int8), f"w{i}.scale": rng.uniform(0.01, 0.1, channels).astype(np.float32),
            f"w{i}.zero_point": np.zeros(channels, np.int8), f"{own}.zero_point": np.zeros(channels, np.int32),
        }  # fmt: skip
        constants[own] = np.full(channels, bias, np.int32) if bias == LARGEST else rng.integers(-bias, bias, channels, np.int32, endpoint=True)
        constants[f"{own}.scale"] = constants["in.scale"] * constants[f"w{i}.scale"]
        nodes.append(helper.make_node("DequantizeLinear", [f"w{i}", f"w{i}.scale", f"w{i}.zero_point"], [f"weight{i}"], axis=axis))
        nodes.append(helper.make_node("DequantizeLinear", [own, f"{own}.scale", f"{own}.zero_point"], [f"bias{i}"], axis=0))
        own_attributes = {} if kind == "Gemm" else {"kernel_shape": [3, 3], "pads": [pad] * 4, "group": groups}
        nodes.append(helper.make_node(kind, [source, f"weight{i}", f"bias{i}"], [f"y{i}"], **own_attributes))
        outputs.append(f"y{i}")
    if read == "a function":
        nodes.append(helper.make_node("Relu", [source], ["other"]))
    if read == "a product":
        nodes.append(helper.make_node("MatMul", ["value", "value"] if kind == "Conv" else [source, "value"], ["other"]))
    if read in ("a function", "a product"):
        outputs.append("other")
    if read == "the caller":
        outputs.append(source)
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape), *(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs)]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], [numpy_helper.from_array(a, n) for n, a in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def outputs_of(model: onnx.ModelProto, seed: int) -> list[np.ndarray]:
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)
    return list(TorchGraph(model)({"x": x}).values())


def folded_zero_points(model: onnx.ModelProto) -> int:
    folded = values_of(model).get(FOLDED)
    return 0 if folded is None else len(readers(folded))


def equal(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["Gemm", "Conv"]), zero_point=st.integers(0, 255), groups=st.sampled_from([1, 2, 8]),
    count=st.integers(1, 3), bias=st.sampled_from([0, 900, 2**30]), seed=st.integers(0, 99),
)  # fmt: skip
def test_no_bit_of_an_output_changes(kind, zero_point, groups, count, bias, seed):
    model = layers(kind, zero_point, groups=groups, count=count, bias=bias, seed=seed)
    expected = outputs_of(model, seed)
    model = after(model, fold_zero_points)
    assert folded_zero_points(model) == (zero_point > 0)
    assert equal(outputs_of(model, seed), expected)


def test_biases_are_those_of_the_closed_form():
    model = layers(zero_point=77, count=1)
    new, old = stored(after(model, fold_zero_points)), stored(model)
    assert np.array_equal(new["b0"], old["b0"] - 77 * old["w0"].astype(np.float64).sum(0))


@pytest.mark.parametrize("changes", [
    {"kind": "Conv", "pad": 1}, {"read": "a function"}, {"read": "the caller"}, {"read": "a product"}, {"read": "one bias"},
    {"bias": LARGEST},
])  # fmt: skip
def test_zero_points_stay_where_they_cannot_go(changes):
    model = layers(**changes)
    assert after(model, fold_zero_points) == after(model)


def test_of_a_file_with_other_numbers_they_are_folded_anew(tmp_path):
    """A file written from another's structure equals one that was exported, whichever zero points the two have."""
    models = []
    for shift in (0.0, 4.0, -4.0):
        calibration = [batch + shift for batch in tiny.batches()]
        models.append(qwt2.fold(qwt2.quantize(tiny.captured(tiny.mobilenet), calibration, "minmax")))
    exported = [qwt2.export_onnx(model, tmp_path / f"{i}.onnx", tiny.images(1)) for i, model in enumerate(models)]
    assert all(folded_zero_points(onnx.load(path)) for path in exported)
    for template in exported:
        for model, path in zip(models, exported):
            assert rewrite_onnx(template, model, tmp_path / "new.onnx").read_bytes() == path.read_bytes()


def test_unfolding_gives_every_pair_one_zero_point():
    model = after(layers(), fold_zero_points, unfold_zero_points)
    nodes = model.graph.node
    assert list(nodes[0].input[1:]) == list(nodes[1].input[1:]) and FOLDED not in stored(model)


@pytest.mark.parametrize("kind", ["Gemm", "Conv"])
@pytest.mark.parametrize("session", [OnnxRuntimeSession, OpenVinoSession])
def test_engines_compute_with_the_same_kernels_as_before(kind, session):
    model = layers(kind)
    before, folded = (session(m, threads=1) for m in (model, after(model, fold_zero_points)))
    count = [Counter(o for o in s.operations() if o.kind not in ("Const", "Subgraph", "Input")) for s in (before, folded)]
    assert count[0] == count[1]
    x = np.random.default_rng(0).normal(0, 3, [8, 5] if kind == "Gemm" else [2, 8, 6, 6]).astype(np.float32)
    expected = before({"x": x})
    for name, y in folded({"x": x}).items():
        np.testing.assert_allclose(y, expected[name], rtol=1e-5, atol=1e-4)
