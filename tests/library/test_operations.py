"""What engines say of their own graphs, against what the exported file asks for."""

import onnx
import pytest

import qwt2
from qwt2.engines.operations import Operation, count_operations
from tests.support import tiny_models as tiny

pytestmark = pytest.mark.slow

PRODUCTS = {
    "onnxruntime": ("Conv", "Gemm", "MatMul"),
    "openvino": ("Convolution", "FullyConnected"),
    "torch_int8": ("Conv", "Gemm", "MatMul"),
}


def counts(network: str, engine: str) -> dict[str, dict[str, int]]:
    _, path = tiny.exported(network, 8, "cwac")
    return count_operations(qwt2.load_engine(path, engine).session(1).operations())


@pytest.mark.parametrize("engine", PRODUCTS)
@pytest.mark.parametrize("network", ["vit", "swin"])
def test_transformers_multiply_in_integers_alone(network, engine):
    found = counts(network, engine)
    assert not [kind for kind in found["float"] if any(product in kind for product in PRODUCTS[engine])]
    graph = onnx.load(tiny.exported(network, 8, "cwac")[1]).graph
    layers = sum(node.op_type in ("Conv", "Gemm") for node in graph.node)
    assert sum(found["integer"].values()) >= layers


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
    return qwt2.export_onnx(tiny.vit(), tmp_path_factory.mktemp("float") / "vit.onnx", tiny.images(1))


@pytest.mark.parametrize("engine", PRODUCTS)
def test_a_float_model_has_no_integer_product(engine, float_file):
    found = count_operations(qwt2.load_engine(float_file, engine).session(1).operations())
    assert found["integer"] == {} and any(product in kind for kind in found["float"] for product in PRODUCTS[engine])


def test_what_only_moves_values_is_left_out():
    operations = [Operation("Reshape", False), Operation("QGemm", True), Operation("QGemm", True), Operation("Gelu", False)]
    assert count_operations(operations) == {"integer": {"QGemm": 2}, "float": {"Gelu": 1}}
