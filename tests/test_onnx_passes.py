"""Rewritten graphs compute what the exporter's own graphs compute, bit for bit, and lie as engines fuse them."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_models import BUILDERS, PTQ, batches, images

import qwt2
from qwt2.errors import Qwt2Error
from qwt2.onnx_passes import quantize_before_pooling
from qwt2.torch_graph import TorchGraph


@pytest.fixture(scope="module", params=list(BUILDERS))
def exported(request, tmp_path_factory):
    """Name, the exporter's graph and the rewritten one."""
    name, folder = request.param, tmp_path_factory.mktemp("passes")
    qmodel = qwt2.quantize(BUILDERS[name](), batches(), PTQ[name])
    qwt2.compensate(qmodel, batches(), "cwac")
    folded = qwt2.fold(qmodel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwt2.export.rewrite_for_engines", lambda model: None)
        plain = onnx.load(qwt2.export_onnx(folded, folder / "plain.onnx", images(1)))
    return name, plain, onnx.load(qwt2.export_onnx(folded, folder / "rewritten.onnx", images(1)))


def test_rewritten_graphs_compute_the_same(exported):
    _, plain, rewritten = exported
    feeds = {"images": images(3, seed=5).numpy()}
    [expected], [actual] = TorchGraph(plain)(feeds).values(), TorchGraph(rewritten)(feeds).values()
    assert np.array_equal(actual, expected)
    onnx.checker.check_model(rewritten, full_check=True)


def test_nothing_lies_between_layers_and_their_activation(exported):
    name, plain, rewritten = exported

    def between(model):
        made = {output: node for node in model.graph.node for output in node.output}
        pairs = [(node, made.get(node.input[0])) for node in model.graph.node if node.input]
        behind = [node for node, source in pairs if source is not None and source.op_type in ("Reshape", "Identity")]
        return sum(node.op_type == "Gelu" for node in behind)

    assert between(rewritten) == 0
    assert (between(plain) > 0) == (name in ("vit", "swin"))


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
    quantize_before_pooling(model)
    assert (model.graph.node[0].op_type == "QuantizeLinear") == moved
    for name, y in TorchGraph(model)({"x": x}).items():
        assert np.array_equal(y, expected[name])
    nodes = len(model.graph.node)
    quantize_before_pooling(model)
    assert len(model.graph.node) == nodes


def test_pooling_that_the_model_returns_stays_in_float():
    model, x = pooled([0.03]), np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    model.graph.output.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, [2, 3, 4, 4]))
    expected = TorchGraph(model)({"x": x})["p"]
    quantize_before_pooling(model)
    assert np.array_equal(TorchGraph(model)({"x": x})["p"], expected)
    assert np.array_equal(expected, x.reshape(2, 3, 4, 2, 4, 2).max((3, 5)))


def test_numbers_that_do_not_fit_the_rewritten_graph_are_refused():
    model = pooled([0.03, 0.03])
    quantize_before_pooling(model)
    tensor = next(t for t in model.graph.initializer if t.name == "s1")
    tensor.CopyFrom(numpy_helper.from_array(np.float32(0.05), "s1"))
    with pytest.raises(Qwt2Error, match="quantizers behind .* differ"):
        quantize_before_pooling(model)
