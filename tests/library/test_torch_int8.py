"""The PyTorch engine's accumulators against plain integer arithmetic, exactly."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import qwt2
from qwt2.engines.interpreter.graph import TorchGraph, integer_conv2d, integer_matmul
from qwt2.engines.torch_int8 import TorchInt8Session
from qwt2.errors import Qwt2Error
from qwt2.onnx.file import load_onnx
from tests.support import tiny_models as tiny

pytestmark = pytest.mark.slow

EXACT = settings(max_examples=60, deadline=None)
TYPES = st.sampled_from([np.uint8, np.int8])


def codes(rng: np.random.Generator, shape, dtype) -> np.ndarray:
    """Random codes, the extreme ones often."""
    limits = np.iinfo(dtype)
    values = rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    extreme = rng.choice(np.array([limits.min, limits.max], dtype), shape)
    return np.where(rng.random(shape) < 0.3, extreme, values)


@EXACT
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 70), st.integers(1, 40), TYPES)
def test_matmul_accumulators_are_exact(seed, rows, inner, width, dtype):
    rng = np.random.default_rng(seed)
    a, b = codes(rng, (rows, inner), dtype), codes(rng, (inner, width), np.int8)
    zero = codes(rng, (), dtype)
    expected = (a.astype(np.int64) - int(zero)) @ b.astype(np.int64)
    found = integer_matmul(torch.from_numpy(a), torch.from_numpy(np.array(zero)), torch.from_numpy(b))
    assert found.dtype == torch.int32 and np.array_equal(found.numpy(), expected)


def test_long_sums_of_extreme_codes_stay_exact():
    """60,000 products of the largest codes: far beyond what float32 holds."""
    a, b = torch.full((3, 60_000), 255, dtype=torch.uint8), torch.full((60_000, 2), -127, dtype=torch.int8)
    b[0, 0] = 1
    found = integer_matmul(a, torch.tensor(0, dtype=torch.uint8), b)
    assert found[0].tolist() == [255 * (-127 * 59_999 + 1), -255 * 127 * 60_000]


@EXACT
@given(
    st.integers(0, 2**32), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3),
    st.tuples(st.integers(1, 2), st.integers(1, 3)), st.tuples(*[st.integers(0, 2)] * 4), st.integers(1, 2), TYPES,
)  # fmt: skip
def test_convolution_accumulators_are_exact(seed, groups, inputs, outputs, kernel, stride, pads, dilation, dtype):
    rng = np.random.default_rng(seed)
    x, zero = codes(rng, (2, groups * inputs, 9, 8), dtype), codes(rng, (), dtype)
    weight = codes(rng, (groups * outputs, inputs, kernel, kernel), np.int8)
    top, left, bottom, right = pads
    padded = np.pad(x.astype(np.int64) - int(zero), [(0, 0), (0, 0), (top, bottom), (left, right)])
    span = dilation * (kernel - 1) + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, (span, span), (2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], ::dilation, ::dilation]
    windows = windows.reshape(2, groups, inputs, *windows.shape[2:])
    by_group = weight.astype(np.int64).reshape(groups, outputs, inputs, kernel, kernel)
    expected = np.einsum("ngihwkl,goikl->ngohw", windows, by_group)
    found = integer_conv2d(
        torch.from_numpy(x), torch.from_numpy(np.array(zero)), torch.from_numpy(weight), list(stride), list(pads),
        [dilation, dilation], groups,
    )  # fmt: skip
    assert np.array_equal(found.numpy(), expected.reshape(found.shape))


@pytest.mark.parametrize("network", ["vit", "resnet"])
def test_products_run_in_integers(network, monkeypatch):
    """No quantized layer falls back to a float product without anyone noticing."""
    _, path = tiny.exported(network, 8, "cwac")
    calls = []
    for name in ("integer_matmul", "integer_conv2d"):
        original = getattr(__import__("qwt2.engines.interpreter.graph", fromlist=["x"]), name)
        monkeypatch.setattr(
            f"qwt2.engines.interpreter.graph.{name}", lambda *a, f=original, n=name: calls.append(n) or f(*a)
        )
    qwt2.load_engine(path, "torch_int8")(tiny.images(1).numpy())
    graph = onnx.load(path).graph
    convolutions = sum(node.op_type == "Conv" for node in graph.node)
    layers = convolutions + sum(node.op_type == "Gemm" for node in graph.node)
    assert calls.count("integer_conv2d") == convolutions
    # A convolution in one group is a product of its patches.
    assert calls.count("integer_matmul") == layers


def test_threads_are_given_back():
    _, path = tiny.exported("vit", 8, "cwac")
    before = torch.get_num_threads()
    qwt2.load_engine(path, "torch_int8", threads=1)(tiny.images(1).numpy())
    assert torch.get_num_threads() == before


def test_operations_it_has_not_are_named():
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Frobnicate", ["x"], ["y"])], "g", [x], [y])
    with pytest.raises(Qwt2Error, match="torch_int8 has no Frobnicate; run this file on another engine"):
        TorchGraph(helper.make_model(graph))


def test_other_float_operations_are_those_of_the_reference():
    """Also on sequences: Hardmax of the second half of a quantized tensor."""
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in (("x", [2, 4]), ("y", [2, 2])))
    constants = {"s": np.float32(0.5), "z": np.uint8(128), "sizes": np.array([2, 2]), "second": np.array(1)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("SplitToSequence", ["d", "sizes"], ["parts"], axis=1),
        helper.make_node("SequenceAt", ["parts", "second"], ["part"]), helper.make_node("Hardmax", ["part"], ["y"]),
    ]  # fmt: skip
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 20)])
    found = TorchGraph(model)({"x": np.array([[9, 9, 1.2, 1.9], [9, 9, 0.1, -0.3]], np.float32)})["y"]
    assert found.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    "kind, attributes, constants, x",
    [
        ("Pad", {}, [np.array([0, 1, 2, 0, 3, 0])], (2, 3, 4)),
        ("Pad", {}, [np.array([1, 2]), np.float32(1.5), np.array([-1])], (2, 3, 4)),
        ("Slice", {}, [np.array([1, -3]), np.array([9, 2**40]), np.array([0, 2]), np.array([1, 2])], (3, 2, 5)),
        ("Gather", {"axis": 1}, [np.array([[0, -1], [1, 0]])], (2, 3, 4)),
        ("Transpose", {}, [], (2, 3, 4)),
        ("Squeeze", {}, [np.array([0, 2])], (1, 3, 1)),
        ("Unsqueeze", {}, [np.array([0, 3])], (3, 2)),
        ("Reshape", {}, [np.array([0, -1])], (2, 3, 4)),
        ("Expand", {}, [np.array([4, 2, 3])], (2, 3)),
        ("ReduceMean", {"keepdims": 0}, [np.array([-1, 0])], (2, 3, 4)),
        ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, [], (1, 2, 7, 7)),
        ("Softmax", {"axis": 1}, [], (2, 3, 4)),
        ("Gelu", {"approximate": "tanh"}, [], (2, 3)),
        ("LayerNormalization", {"epsilon": 1e-3}, [np.arange(1, 5, dtype=np.float32), np.ones(4, np.float32)], (2, 4)),
        ("Flatten", {"axis": 2}, [], (2, 3, 4, 5)),
        ("Split", {"axis": 1, "num_outputs": 1}, [], (2, 3)),
        ("GlobalAveragePool", {}, [], (2, 3, 4, 4)),
        ("Clip", {}, [np.float32(-0.5), np.float32(0.5)], (3, 4)),
        ("HardSwish", {}, [], (3, 4)),
    ],
)  # fmt: skip
def test_float_operations_agree_with_onnx_s_own_reference(kind, attributes, constants, x):
    names = [f"c{i}" for i in range(len(constants))]
    inputs, output = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x), onnx.ValueInfoProto(name="y")
    node = helper.make_node(kind, ["x", *names], ["y"], **attributes)
    tensors = [numpy_helper.from_array(np.asarray(c), n) for c, n in zip(constants, names)]
    model = helper.make_model(
        helper.make_graph([node], "g", [inputs], [output], tensors), opset_imports=[helper.make_opsetid("", 20)]
    )
    array = np.random.default_rng(0).normal(size=x).astype(np.float32)
    [expected] = onnx.reference.ReferenceEvaluator(model).run(None, {"x": array})
    found = TorchGraph(model)({"x": array})["y"]
    assert found.shape == expected.shape and np.allclose(found, expected, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("network", ["vit", "swin", "resnet", "mobilenet"])
def test_cuda_agrees_with_the_cpu(network):
    _, path = tiny.exported(network, 8, "cwac")
    feeds = {"images": tiny.images(2).numpy()}
    [on_cpu] = TorchInt8Session(load_onnx(path), 1)(feeds).values()
    [on_cuda] = TorchInt8Session(load_onnx(path), 1, "cuda")(feeds).values()
    assert np.abs(on_cuda - on_cpu).max() < 0.05 * np.abs(on_cpu).max()
