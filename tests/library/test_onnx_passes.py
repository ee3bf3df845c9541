"""Rewritten graphs compute what the exporter's own graphs compute, bit for bit, and lie as engines fuse them."""

import copy
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import qwt2
from qwt2.engines.interpreter.graph import TorchGraph
from qwt2.engines.onnxruntime import OnnxRuntimeSession
from qwt2.engines.openvino import OpenVinoSession
from qwt2.engines.operations import count_operations
from qwt2.errors import Qwt2Error
from qwt2.onnx.file import with_batch_size
from qwt2.onnx.graph import maker, only_reader, readers
from qwt2.onnx.metadata import SHARED, properties, shared_quantizers
from qwt2.onnx.passes import PASSES
from qwt2.onnx.passes.layout import normalize_rows
from qwt2.onnx.passes.names import strip_notes, use_first_names
from qwt2.onnx.passes.projections import split_projections
from qwt2.onnx.passes.quantizers import drop_later_attributes, quantize_before_pooling, share_quantizers
from qwt2.onnx.passes.tensorrt import make_biases_float
from qwt2.onnx.passes.windowed_attention import limit_masks, move_codes, repeat_masks
from qwt2.onnx.templates import rewrite_onnx
from tests.support.onnx_graphs import after, kinds, stored, values_of
from tests.support.tiny_models import BUILDERS, PTQ, batches, captured, images

pytestmark = pytest.mark.slow

NAMES_ONLY = (strip_notes, drop_later_attributes, use_first_names)


@pytest.fixture(scope="module", params=list(BUILDERS))
def exported(request, tmp_path_factory):
    """Name, the exporter's graph and the rewritten one."""
    name, folder = request.param, tmp_path_factory.mktemp("passes")
    qmodel = qwt2.quantize(captured(BUILDERS[name]), batches(), PTQ[name])
    qwt2.compensate(qmodel, batches(), "cwac")
    folded = qwt2.fold(qmodel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwt2.onnx.passes.PASSES", [(p, profiles) for p, profiles in PASSES if p in NAMES_ONLY])
        plain = onnx.load(qwt2.export_onnx(folded, folder / "plain.onnx", images(1)))
    return name, plain, onnx.load(qwt2.export_onnx(folded, folder / "rewritten.onnx", images(1)))


def test_rewritten_graphs_compute_the_same(exported):
    _, plain, rewritten = exported
    feeds = {"images": images(3, seed=5).numpy()}
    [expected], [actual] = TorchGraph(plain)(feeds).values(), TorchGraph(rewritten)(feeds).values()
    assert np.array_equal(actual, expected)
    onnx.checker.check_model(rewritten, full_check=True)


def test_every_pass_keeps_every_value(exported):
    """One after the other, as they stand in the list, on what the exporter made."""
    _, model, _ = exported
    feeds = {"images": images(3, seed=6).numpy()}
    [expected] = TorchGraph(model)(feeds).values()
    for rewrite, _ in PASSES:
        model = after(model, rewrite)
        [actual] = TorchGraph(model)(feeds).values()
        if rewrite is make_biases_float:  # adds in float32 what was added in integers, from here on
            assert np.allclose(actual, expected, rtol=0, atol=1e-2 * np.abs(expected).max())
            expected = actual
        assert np.array_equal(actual, expected), rewrite.__name__


def test_nothing_lies_between_layers_and_their_activation(exported):
    name, plain, rewritten = exported

    def between(model):
        made = {output: node for node in model.graph.node for output in node.output}
        pairs = [(node, made.get(node.input[0])) for node in model.graph.node if node.input]
        behind = [node for node, source in pairs if source is not None and source.op_type in ("Reshape", "Identity")]
        return sum(node.op_type == "Gelu" for node in behind)

    assert between(rewritten) == 0
    assert (between(plain) > 0) == (name in ("vit", "swin"))


def test_query_key_and_value_are_quantized_right_behind_layers_of_their_own(exported):
    name, plain, rewritten = exported
    made = {output: node for node in rewritten.graph.node for output in node.output}
    heads = [node for node in rewritten.graph.node if node.op_type == "QuantizeLinear" and ".matmul" in node.input[1]]
    behind = Counter()
    for node in heads:
        source = made[node.input[0]]
        while source.op_type in ("Mul", "Clip"):
            source = made[source.input[0]]
        behind[source.op_type] += 1
    assert behind["Gemm"] == 3 * behind["Softmax"] and set(behind) <= {"Gemm", "Softmax"}
    assert (behind["Gemm"] > 0) == (name in ("vit", "swin"))
    assert "Pad" not in {node.op_type for node in rewritten.graph.node}


def test_reshapes_do_not_follow_each_other(exported):
    name, plain, rewritten = exported

    def pairs(model):
        reshapes = [value.producer() for value in values_of(model).values() if maker(value, "Reshape")]
        sources = [maker(node.inputs[0], "Reshape") for node in reshapes]
        return sum(source is not None and only_reader(source.outputs[0]) is not None for source in sources)

    assert pairs(rewritten) == 0
    assert (pairs(plain) > 0) == (name in ("vit", "swin"))


def test_shifted_windows_are_rolled_as_codes_and_masked_in_four_dimensions(exported):
    name, plain, rewritten = exported

    def windows(model):
        """Additions of masks, and rolls of floats and of codes."""
        known = onnx.shape_inference.infer_shapes(model).graph.value_info
        kinds = {value.name: value.type.tensor_type for value in known}
        masked = [n for n in model.graph.node if n.op_type == "Add" and len(kinds[n.output[0]].shape.dim) == 5]
        rolls = [kinds[n.output[0]].elem_type for n in model.graph.node if n.op_type == "Concat" and len(kinds[n.output[0]].shape.dim) == 4]
        return len(masked), rolls.count(TensorProto.FLOAT), rolls.count(TensorProto.UINT8)

    shifted = 1 if name == "swin" else 0  # blocks; each rolls along two axes, there and back
    assert windows(plain) == (shifted, 4 * shifted, 0)
    assert windows(rewritten) == (0, 2 * shifted, 2 * shifted)


def test_openvino_computes_attention_in_shifted_windows_in_one_kernel(exported):
    name, plain, rewritten = exported

    def products(model):
        operations = OpenVinoSession(with_batch_size(model, 2), threads=1).operations()
        return sum(operation.kind in ("MatMul", "Softmax", "SoftMax") for operation in operations)

    assert products(rewritten) == 0
    assert (products(plain) > 0) == (name == "swin")


def masked(windows: int, mask: list[int], joined: list[int]) -> onnx.ModelProto:
    """Scores (4, 3, 5, 5) of two images of two windows, viewed with an axis of windows, plus a mask, and viewed back."""
    rng = np.random.default_rng(0)
    constants = {
        "split": np.array([-1, windows, 3, 5, 5]), "mask": rng.normal(size=mask).astype(np.float32), "joined": np.array(joined)
    }  # fmt: skip
    nodes = [
        helper.make_node("Relu", ["x"], ["scores"]),
        helper.make_node("Reshape", ["scores", "split"], ["apart"]),
        helper.make_node("Unsqueeze", ["mask", "axis"], ["window_mask"]),
        helper.make_node("Add", ["apart", "window_mask"], ["sum"], "add"),
        helper.make_node("Reshape", ["sum", "joined"], ["together"]),
        helper.make_node("Softmax", ["together"], ["y"]),
    ]
    constants["axis"] = np.array([0])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in (("x", ["images", 3, 5, 5]), ("y", None))]
    graph = helper.make_graph(nodes, "masked", ends[:1], ends[1:], [numpy_helper.from_array(a, n) for n, a in constants.items()])
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), data_prop=True)


@pytest.mark.parametrize(
    "windows, mask, joined, repeated",
    [
        (2, [2, 1, 5, 5], [-1, 3, 5, 5], True),
        (2, [2, 3, 5, 5], [-1, 3, 5, 5], False),  # a mask of its own for each head
        (2, [1, 1, 5, 5], [-1, 3, 5, 5], False),  # the same for all windows
        (2, [2, 1, 5, 5], [-1, 15, 5, 1], False),  # not viewed back
    ],
)
def test_masks_are_repeated_where_nothing_but_a_view_lies_around_the_addition(windows, mask, joined, repeated):
    model, x = masked(windows, mask, joined), np.random.default_rng(1).normal(size=(4, 3, 5, 5)).astype(np.float32)
    [expected] = ReferenceEvaluator(model).run(None, {"x": x})
    model = after(model, repeat_masks)
    before_softmax = values_of(model)["together"].producer().op_type
    assert (before_softmax == "Add") == repeated
    [actual] = ReferenceEvaluator(model).run(None, {"x": x})
    assert np.array_equal(actual, expected)


def test_masks_of_a_softmax_hide_without_denormal_numbers():
    model = masked(2, [2, 1, 5, 5], [-1, 3, 5, 5])
    [stored] = [tensor for tensor in model.graph.initializer if tensor.name == "mask"]
    mask = np.where(np.random.default_rng(0).random((2, 1, 5, 5)) < 0.3, -100, -2).astype(np.float32)
    mask[0, 0, 0, :3] = -np.inf
    stored.CopyFrom(numpy_helper.from_array(mask, "mask"))
    x = np.random.default_rng(1).normal(size=(4, 3, 5, 5)).astype(np.float32)
    [expected] = ReferenceEvaluator(model).run(None, {"x": x})
    model = after(model, limit_masks, repeat_masks)
    assert values_of(model)["together"].producer().op_type == "Add"
    [actual] = ReferenceEvaluator(model).run(None, {"x": x})
    hidden = np.broadcast_to(np.tile(mask, (2, 1, 1, 1)) < -99, actual.shape)
    assert actual[hidden].min() > np.finfo(np.float32).tiny and actual[hidden].max() < 1e-20
    assert np.any((expected > 0) & (expected < 1e-38))
    assert np.array_equal(actual[~hidden], expected[~hidden])


def rolled(low_bits: bool, other: str) -> onnx.ModelProto:
    """A tensor (2, 6, 4) rolled by two along its second axis and quantized, perhaps clipped before."""
    constants = {"i0": [0], "i2": [2], "i9": [9], "axis": [1]}
    arrays = {name: np.array(values) for name, values in constants.items()}
    arrays |= {"s": np.float32(0.03), "z": np.uint8(100), "low": np.float32(-1), "high": np.float32(1)}
    nodes = [
        helper.make_node("Tanh", ["x"], ["root"]),
        helper.make_node("Slice", ["root", "i0", "i2", "axis"], ["front"]),
        helper.make_node("Slice", ["root" if other != "two tensors" else "x", "i2", "i9", "axis"], ["back"]),
        helper.make_node("Concat", ["back", "front"], ["roll"], axis=1),
        helper.make_node("Transpose", ["roll"], ["cut"], perm=[0, 2, 1]),
        helper.make_node("Clip", ["cut", "low", "high"], ["clipped"]),
        helper.make_node("QuantizeLinear", ["clipped" if low_bits else "cut", "s", "z"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["y"]),
    ]
    if not low_bits:
        del nodes[5]
    outputs = ["y", *(["roll"] if other == "an output" else [])]
    if other == "read":
        nodes.append(helper.make_node("Relu", ["back"], ["read"]))
        outputs.append("read")
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6, 4]), *(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs)]
    graph = helper.make_graph(nodes, "rolled", ends[:1], ends[1:], [numpy_helper.from_array(a, n) for n, a in arrays.items()])
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


@pytest.mark.parametrize("low_bits", [False, True])
@pytest.mark.parametrize("other", ["", "two tensors", "an output", "read"])
def test_what_is_rolled_is_quantized_before_if_nothing_else_reads_it(low_bits, other):
    model, x = rolled(low_bits, other), np.random.default_rng(1).normal(size=(2, 6, 4)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"x": x})
    model = after(model, move_codes)
    dequantize = values_of(model)["y"].producer()
    assert (dequantize.inputs[0].producer().op_type == "Transpose") == (other == "")
    for y, wanted in zip(ReferenceEvaluator(model).run(None, {"x": x}), expected):
        assert np.array_equal(y, wanted)


def test_windows_are_cut_of_codes_and_heads_of_floats(exported):
    name, _, rewritten = exported
    transposes = [node for value in values_of(rewritten).values() if (node := maker(value, "Transpose"))]
    cuts = [node.inputs[0].producer() for node in transposes if len(node.attributes.get_ints("perm")) == 6]
    quantized = [reshape for reshape in cuts if maker(reshape.inputs[0], "QuantizeLinear")]
    assert len(quantized) == (2 if name == "swin" else 0)  # of three blocks; the shifted one rolls its codes before
    heads = [node for node in transposes if maker(node.inputs[0], "MatMul")]
    assert (len(heads) > 0) == (name in ("vit", "swin"))


def normalized(shape: list, axis: int) -> onnx.ModelProto:
    """A layer norm along the last axes from ``axis`` on, whose output two operations read."""
    rng, size = np.random.default_rng(0), shape[axis:]
    constants = {"weight": rng.normal(size=size).astype(np.float32), "bias": rng.normal(size=size).astype(np.float32)}
    nodes = [
        helper.make_node("Tanh", ["x"], ["maps"]),
        helper.make_node("LayerNormalization", ["maps", "weight", "bias"], ["norm"], "norm", axis=axis),
        helper.make_node("Relu", ["norm"], ["y"]),
        helper.make_node("Add", ["norm", "maps"], ["z"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "xyz"]
    graph = helper.make_graph(nodes, "normalized", ends[:1], ends[1:], [numpy_helper.from_array(a, n) for n, a in constants.items()])
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


@pytest.mark.parametrize("shape, axis, rows", [
    (["images", 4, 5, 8], -1, True), (["images", 4, 5, 8], 3, True), (["images", 2, 3, 4, 8], -1, True),
    (["images", 4, 5, 8], -2, False), (["images", 20, 8], -1, False), (["images", "height", 5, 8], -1, False),
])  # fmt: skip
def test_layer_norms_of_maps_see_rows(shape, axis, rows):
    model = normalized(shape, axis)
    x = np.random.default_rng(1).normal(size=[s if isinstance(s, int) else 3 for s in shape]).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"x": x})
    model = after(model, normalize_rows)
    assert (kinds(model)[1:3] == ["Reshape", "LayerNormalization"]) == rows
    for y, wanted in zip(ReferenceEvaluator(model).run(None, {"x": x}), expected):
        assert np.array_equal(y, wanted)


def test_openvino_computes_every_layer_norm_in_one_kernel(exported):
    name, plain, rewritten = exported
    norms = sum(node.op_type == "LayerNormalization" for node in rewritten.graph.node)

    def kernels(model):
        return sum(o.kind == "MVN" for o in OpenVinoSession(with_batch_size(model, 2), threads=1).operations())

    assert kernels(rewritten) == norms
    assert (kernels(plain) < norms) == (name == "swin")


def projected(shape: list[int], order: list[int], pieces: int, select: str, extra: str = "") -> onnx.ModelProto:
    """A layer of 24 channels on (6, 4), reshaped, transposed and taken apart along its first axis."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.integers(-127, 128, (4, 24), np.int8), "ws": rng.uniform(0.01, 0.1, 24).astype(np.float32), "wz": np.zeros(24, np.int8),
        "b": rng.integers(-999, 999, 24, np.int32), "bs": rng.uniform(0.001, 0.01, 24).astype(np.float32), "bz": np.zeros(24, np.int32),
    } | {f"i{i}": np.array([i]) for i in range(4)} | {f"n{i}": np.array(i) for i in range(4)} | {f"d{i}": np.array([size]) for i, size in enumerate(shape)}  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["weight"], axis=1),
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bias"], axis=0),
        helper.make_node("Gemm", ["x", "weight", "bias"], ["y"]),
        helper.make_node("Concat", [f"d{i}" for i in range(len(shape))], ["shape"], axis=0),
        helper.make_node("Reshape", ["y", "shape"], ["heads"], allowzero=1),
        helper.make_node("Transpose", ["heads"], ["moved"], perm=order),
    ]
    for i in range(pieces):
        if select == "gather":
            nodes.append(helper.make_node("Gather", ["moved", f"n{i}"], [f"out{i}"], axis=0))
        else:
            nodes.append(helper.make_node("Slice", ["moved", f"i{i}", f"i{i + 1}", "i0"], [f"slice{i}"]))
            nodes.append(helper.make_node("Squeeze", [f"slice{i}", "i0"], [f"out{i}"]))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in [*(f"out{i}" for i in range(pieces)), *([extra] if extra else [])]]
    graph = helper.make_graph(
        nodes, "projected", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [6, 4])], outputs,
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), data_prop=True)


@pytest.mark.parametrize("select", ["slice", "gather"])
@pytest.mark.parametrize(
    "shape, order, pieces, extra, split",
    [
        ([2, 3, 3, 2, 4], [2, 0, 3, 1, 4], 3, "", True),
        ([6, 2, 3, 4], [1, 2, 0, 3], 2, "", True),
        ([2, 3, 3, 2, 4], [2, 0, 3, 1, 4], 2, "", False),  # a piece is not used
        ([2, 3, 3, 2, 4], [2, 0, 3, 1, 4], 3, "heads", False),  # the whole is
        ([2, 3, 2, 3, 4], [3, 0, 2, 1, 4], 3, "", False),  # the pieces' channels do not lie together
        ([2, 3, 24], [0, 1, 2], 2, "", False),  # taken apart along the images
    ],
)
def test_layers_are_split_where_their_output_is_taken_apart(shape, order, pieces, extra, split, select):
    model = projected(shape, order, pieces, select, extra)
    x = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"x": x})
    model = after(model, split_projections)
    assert sum(node.op_type == "Gemm" for node in model.graph.node) == (pieces if split else 1)
    for y, wanted in zip(ReferenceEvaluator(model).run(None, {"x": x}), expected):
        assert y.shape == wanted.shape and np.allclose(y, wanted, rtol=0, atol=1e-6)
    assert sum(t.dims[-1] for t in model.graph.initializer if t.name.startswith("w/") or t.name == "w") == 24


def pooled(scales: list[float]) -> onnx.ModelProto:
    """MaxPool, read by a quantizer for each of the scales."""
    nodes = [helper.make_node("MaxPool", ["x"], ["p"], kernel_shape=[2, 2], strides=[2, 2])]
    constants = [numpy_helper.from_array(np.uint8(3), "z")]
    for i, scale in enumerate(scales):
        constants.append(numpy_helper.from_array(np.float32(scale), f"s{i}"))
        nodes.append(helper.make_node("QuantizeLinear", ["p", f"s{i}", "z"], [f"q{i}"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}", "z"], [f"y{i}"]))
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [2, 3, 4, 4]) for i in range(len(scales))]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 8, 8])
    return helper.make_model(helper.make_graph(nodes, "pooled", [value], outputs, constants))


@pytest.mark.parametrize("scales, moved", [([0.03], True), ([0.03, 0.03], True), ([0.03, 0.05], False)])
def test_quantizing_before_pooling_changes_no_value(scales, moved):
    model, x = pooled(scales), np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    expected = TorchGraph(model)({"x": x})
    model = after(model, quantize_before_pooling)
    assert (model.graph.node[0].op_type == "QuantizeLinear") == moved
    for name, y in TorchGraph(model)({"x": x}).items():
        assert np.array_equal(y, expected[name])
    assert kinds(after(model, quantize_before_pooling)) == kinds(model)


def test_pooling_that_the_model_returns_stays_in_float():
    model, x = pooled([0.03]), np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    model.graph.output.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, [2, 3, 4, 4]))
    expected = TorchGraph(model)({"x": x})["p"]
    model = after(model, quantize_before_pooling)
    assert np.array_equal(TorchGraph(model)({"x": x})["p"], expected)
    assert np.array_equal(expected, x.reshape(2, 3, 4, 2, 4, 2).max((3, 5)))


class Largest(nn.Module):
    """The largest value of each channel."""

    def forward(self, x):
        return x.amax((2, 3))


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_openvino_pools_what_convolutions_round(name, tmp_path):
    qmodel = qwt2.quantize(captured(BUILDERS[name]), batches(), "percentile", target="openvino")
    qwt2.compensate(qmodel, batches(), "cwac")
    folded = qwt2.fold(qmodel)
    path = qwt2.export_onnx(folded, tmp_path / "model.onnx", images(1))
    session = OpenVinoSession(with_batch_size(onnx.load(path), 4), threads=1)
    pooled = [operation for operation in session.operations() if operation.kind in ("Reduce", "Pooling")]
    assert sum(operation.integer for operation in pooled) == 1 + (name == "resnet")  # behind the stem too; squeezes average floats
    [logits] = session({"images": images(4, seed=9).numpy()}).values()
    expected = folded(images(4, seed=9)).numpy()
    assert np.abs(logits - expected).max() < 0.02 * np.ptp(expected)


def test_what_is_not_rounded_is_quantized_where_one_quantizer_reads_the_sum_and_else_clipped(tmp_path):
    model = BUILDERS["resnet"]()
    model.global_pool = Largest()
    qmodel = qwt2.quantize(model, batches(), "percentile", target="openvino")
    folded, additions = qwt2.fold(qmodel), qmodel.quantization.additions
    path = qwt2.export_onnx(folded, tmp_path / "model.onnx", images(1))
    made_by = {
        name: {node.op_type for node in onnx.load(path).graph.node if f"{name}.a.low" in node.input or f"{name}.a.scale" in node.input}
        for name in additions
    }  # fmt: skip
    assert made_by.pop(additions[-1]) == {"Clip"}  # what no engine computes on codes reads this sum
    assert made_by and all(kinds == {"QuantizeLinear", "DequantizeLinear"} for kinds in made_by.values())
    stored = {tensor.name for tensor in onnx.load(path).graph.initializer}
    assert stored == {name for node in onnx.load(path).graph.node for name in node.input if name in stored}

    assert rewrite_onnx(path, folded, tmp_path / "again.onnx").read_bytes() == path.read_bytes()
    folded.get_submodule("layer2.0.conv1").input.scale *= 2  # reads the first sum, as an addition does
    with pytest.raises(Qwt2Error, match="layer2.0.conv1.input differ"):
        rewrite_onnx(path, folded, tmp_path / "other.onnx")


def test_of_equal_quantizers_of_a_tensor_one_is_in_the_file(exported, tmp_path):
    name, _, rewritten = exported
    constants = {key: array.tobytes() for key, array in stored(rewritten).items()}
    nodes = rewritten.graph.node
    quantizers = [(n.input[0], *map(constants.get, n.input[1:])) for n in nodes if n.op_type == "QuantizeLinear"]
    assert len(quantizers) == len(set(quantizers))
    shared = shared_quantizers(properties(rewritten))
    # What a residual block reads, its first convolution and its shortcut, is quantized alike; in a transformer one layer reads it.
    assert (len(shared) > 0) == (name in ("resnet", "mobilenet"))
    assert not {f"{gone}.scale" for gone in shared} & constants.keys()


def test_sums_behind_shared_quantizers_are_added_in_integers():
    model, x = summed([0.03, 0.03]), np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"x": x})
    shared = after(model, share_quantizers)
    assert all(np.array_equal(y, wanted) for y, wanted in zip(ReferenceEvaluator(shared).run(None, {"x": x}), expected))
    operations = [OnnxRuntimeSession(m, threads=1).operations() for m in (model, shared)]
    assert ["QLinearAdd" in {operation.kind for operation in found} for found in operations] == [False, True]


def test_quantizers_that_differ_stay():
    model = summed([0.03, 0.04])
    graph = ir.from_proto(model).graph
    share_quantizers(graph)
    assert [node.op_type for node in graph] == kinds(model) and not graph.meta[SHARED]


def summed(scales: list[float]) -> onnx.ModelProto:
    """x + x, both quantized, read by a quantizer for each of the scales."""
    constants = {"s": np.float32(0.02), "z": np.uint8(7)} | {f"m{i}.scale": np.float32(scale) for i, scale in enumerate(scales)}
    constants |= {f"m{i}.zero_point": np.uint8(9) for i in range(len(scales))}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["value"]),
        helper.make_node("Add", ["value", "value"], ["sum"]),
    ]
    for i in range(len(scales)):
        nodes.append(helper.make_node("QuantizeLinear", ["sum", f"m{i}.scale", f"m{i}.zero_point"], [f"c{i}"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"c{i}", f"m{i}.scale", f"m{i}.zero_point"], [f"v{i}"]))
        nodes.append(helper.make_node("Softmax" if i else "Relu", [f"v{i}"], [f"y{i}"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("x", *(f"y{i}" for i in range(len(scales))))]
    graph = helper.make_graph(nodes, "summed", ends[:1], ends[1:], [numpy_helper.from_array(a, n) for n, a in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_numbers_with_which_shared_quantizers_would_differ_are_refused(tmp_path):
    qmodel = qwt2.quantize(captured(BUILDERS["resnet"]), batches(), "percentile")
    folded = qwt2.fold(qmodel)
    path = qwt2.export_onnx(folded, tmp_path / "model.onnx", images(1))
    assert rewrite_onnx(path, folded, tmp_path / "again.onnx").read_bytes() == path.read_bytes()
    model = onnx.load(path)
    shared, values = shared_quantizers(properties(model)), values_of(model)
    quantizers = [node for kept in shared.values() for node in readers(values[f"{kept}.scale"])]
    sources = [node.inputs[0].producer().op_type for node in quantizers if node.op_type == "QuantizeLinear"]
    assert {"MaxPool", "Relu"} <= set(sources)  # behind the pooling in front of the blocks, and behind sums
    for gone, kept in shared.items():
        other = copy.deepcopy(folded)
        other.get_submodule(gone).scale *= 2
        with pytest.raises(Qwt2Error, match=f"{gone} and {kept} differ"):
            rewrite_onnx(path, other, tmp_path / "other.onnx")


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.SiLU])
def test_clamps_between_convolutions_that_several_layers_read(activation, tmp_path):
    """The exporter computes the bounds of some clamps, so that they are no stored numbers."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.activation = nn.Conv2d(3, 8, 3, padding=1), activation()
            self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.activation(3 * self.stem(x))
            return self.activation(self.left(x)) + self.right(x)

    torch.manual_seed(0)
    qmodel = qwt2.quantize(Branches(), batches(), "minmax")
    folded = qwt2.fold(qmodel)
    path = qwt2.export_onnx(folded, tmp_path / "a.onnx", images(2))
    with torch.no_grad():
        expected = folded(images(4)).numpy()
    for engine in ("onnxruntime", "openvino", "torch_int8"):
        found = qwt2.load_engine(path, engine)(images(4).numpy())
        assert np.square(found - expected).sum() <= 1e-3 * np.square(expected).sum()


def test_a_relu6_between_convolutions_is_part_of_their_integer_kernels(tmp_path):
    """ONNX Runtime runs no convolution and no clamp of such a network in float."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.Flatten(),
        nn.Linear(8 * 13 * 13, 5),
    )  # fmt: skip
    model[0].weight.data *= 8  # so that the clamp's upper bound matters
    folded = qwt2.fold(qwt2.quantize(model, batches(), "minmax"))
    engine = qwt2.load_engine(qwt2.export_onnx(folded, tmp_path / "a.onnx", images(2)))
    with torch.no_grad():
        expected = folded(images(4)).numpy()
    found = engine(images(4).numpy())
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()
    counted = count_operations(engine.operations())
    assert counted["integer"]["QLinearConv"] == 3 and not {"Conv", "Clip"} & counted["float"].keys()
