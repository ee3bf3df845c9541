"""Single passes on graphs of a few nodes: what lies where afterwards, and that nothing else is computed."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qwt2.onnx.graph import store
from qwt2.onnx.passes.layout import (
    activate_before_reshapes,
    drop_identities,
    merge_reshapes,
    quantize_before_transposes,
    scale_before_heads,
)
from qwt2.onnx.passes.names import FIRST_NAMES, drop_unread, strip_notes, use_first_names
from qwt2.onnx.passes.quantizers import drop_later_attributes, fuse_additions
from qwt2.onnx.passes.tensorrt import make_biases_float
from tests.support.onnx_graphs import after, equal, kinds, parsed, run, stored

GRID = "float s = {0.04}, uint8 z = {100}"
GEMM = f"float[4,6] w = {{{','.join(map(str, range(24)))}}}, float[6] b = {{1,2,3,4,5,6}}"


def test_identities_and_empty_pads_go_unless_the_graph_returns_them():
    model = parsed("""g (float[2,3] x) => (float[2,3] y, float[3,4] p, float[2,3] i)
        <int64[4] none = {0,0,0,0}, int64[4] some = {0,0,1,1}> {
        a = Identity(x)
        c = Pad(a, none)
        y = Relu(c)
        p = Pad(c, some)
        i = Identity(x)
    }""")
    changed = after(model, drop_identities)
    assert kinds(changed) == ["Relu", "Pad", "Identity"] and equal(model, changed)


@pytest.mark.parametrize(
    "order, shape, read, moved",
    [([0, 2, 1], "2,4,3", "", True), ([1, 0, 2], "3,2,4", "", False), ([0, 2, 1], "2,4,3", "o = Relu(t)", False)],
)
def test_quantizers_move_in_front_of_a_transpose_of_the_last_axis(order, shape, read, moved):
    extra = f", float[{shape}] o" if read else ""
    model = parsed(f"""g (float[2,3,4] x) => (float[{shape}] y{extra})
        <{GRID}, float low = {{-1}}, float high = {{1}}> {{
        t = Transpose<perm = {order}>(x)
        {read}
        c = Clip(t, low, high)
        q = QuantizeLinear(c, s, z)
        y = DequantizeLinear(q, s, z)
    }}""")
    changed = after(model, quantize_before_transposes)
    assert kinds(changed).index("Transpose") == (3 if moved else 0) and equal(model, changed)


@pytest.mark.parametrize("factor, moved", [("float factor = {0.5}", True), ("float[3] factor = {1,2,3}", False)])
def test_scaling_and_quantizing_move_in_front_of_heads_if_by_one_number(factor, moved):
    model = parsed(f"""g (float[6,4] x) => (float[2,2,3,3] y)
        <{GEMM}, {GRID}, {factor}, int64[4] shape = {{2,3,2,3}}> {{
        l = Gemm(x, w, b)
        r = Reshape(l, shape)
        t = Transpose<perm = [0, 2, 1, 3]>(r)
        m = Mul(t, factor)
        q = QuantizeLinear(m, s, z)
        y = DequantizeLinear(q, s, z)
    }}""")
    changed = after(model, scale_before_heads)
    behind = ["Mul", "QuantizeLinear", "DequantizeLinear"]
    assert kinds(changed)[2:] == ([*behind, "Transpose"] if moved else ["Transpose", *behind]) and equal(model, changed)


@pytest.mark.parametrize("layer, moved", [("Gemm(x, w, b)", True), ("MatMul(x, w)", False)])
def test_activations_move_in_front_of_the_reshape_behind_a_linear_layer(layer, moved):
    model = parsed(f"""g (float[6,4] x) => (float[2,3,6] y) <{GEMM}, {GRID}, int64[3] shape = {{2,3,6}}> {{
        l = {layer}
        r = Reshape(l, shape)
        a = Relu(r)
        q = QuantizeLinear(a, s, z)
        y = DequantizeLinear(q, s, z)
    }}""")
    changed = after(model, activate_before_reshapes)
    assert kinds(changed).index("Reshape") == (4 if moved else 1) and equal(model, changed)


@pytest.mark.parametrize("second, other, left", [("{6,4}", "", 1), ("{0,4}", "", 2), ("{6,4}", "o = Relu(r)", 2)])
def test_a_reshape_reads_what_the_one_before_reads_if_its_sizes_are_absolute(second, other, left):
    model = parsed(f"""g (float[2,3,4] x) => (float[6,4] y{", float[6,4] o" if other else ""})
        <int64[2] first = {{6,4}}, int64[2] second = {second}> {{
        r = Reshape(x, first)
        {other}
        y = Reshape(r, second)
    }}""")
    changed = after(model, merge_reshapes)
    assert kinds(changed).count("Reshape") == left and equal(model, changed)
    [last] = [node for node in changed.graph.node if node.output[0] == "y"]
    assert last.input[0] == ("r" if second == "{0,4}" else "x")


def with_dots(graph: ir.Graph) -> None:
    """Name `m.low` what ONNX's text form can only name `m__low`."""
    for value in list(graph.initializers.values()):
        value.name = value.name.replace("__", ".")


@pytest.mark.parametrize("scales, rounds", [([0.05], True), ([0.05, 0.05], True), ([0.05, 0.06], False)])
def test_what_does_not_round_is_a_pair_where_the_sum_is_rounded_once_and_else_a_clip(scales, rounds):
    """The values of a rounding quantizer are clipped by the range of its codes, which the Clip repeats."""
    numbers = ", ".join(f"float n{i} = {{{scale}}}" for i, scale in enumerate(scales))
    numbered = range(len(scales))
    readers = [f"q{i} = QuantizeLinear(a, n{i}, z)\n y{i} = DequantizeLinear(q{i}, n{i}, z)" for i in numbered]
    model = parsed(f"""g (float[2,3] x, float[2,3] w) => ({", ".join(f"float[2,3] y{i}" for i in range(len(scales)))})
        <{numbers}, uint8 z = {{100}}, float m__scale = {{0.01}}, float m__low = {{-1}}, float m__high = {{1.55}}> {{
        c = Clip(x, m__low, m__high)
        q = QuantizeLinear(c, m__scale, z)
        d = DequantizeLinear(q, m__scale, z)
        t = Add(d, w)
        a = Relu(t)
        {chr(10).join(readers)}
    }}""")
    changed = after(model, with_dots, fuse_additions)
    assert kinds(changed)[:3] == (["QuantizeLinear", "DequantizeLinear", "Add"] if rounds else ["Clip", "Add", "Relu"])
    if rounds:
        assert equal(model, changed)
        return
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=(2, 3)).astype(np.float32) for _ in range(2))
    total = np.maximum(np.clip(x, -1, 1.55) + w, 0)
    for found, scale in zip(run(changed), scales):
        assert np.abs(found - total.clip(max=155 * scale)).max() <= scale / 2 + 1e-6


def test_attributes_of_later_opsets_go():
    """Of opset 18, a quantizer has an axis and nothing else."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=1, saturate=1, block_size=0),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=1, block_size=0),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy")
    tensors = [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.uint8(7), "z")]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(model)
    changed = after(model, drop_later_attributes)  # checked there
    assert [[a.name for a in node.attribute] for node in changed.graph.node] == [["axis"], ["axis"]]


def test_notes_of_the_exporting_machine_go():
    model = parsed("g (float[2] x) => (float[2] y) <float[2] w = {1,2}> { a = Relu(x)\n y = Add(a, w) }")

    def note(graph: ir.Graph) -> None:
        store(graph.initializers["w"], np.ones(2, np.float32))
        values = [value for node in graph for value in (*node.inputs, *node.outputs)]
        for part in (graph, *graph, *values, *graph.initializers.tensors()):
            part.metadata_props["trace"] = "/home/me/train.py"
        graph[0].doc_string = "/home/me/train.py"

    assert b"/home/me" in after(model, note).SerializeToString()
    assert b"/home/me" not in after(model, note, strip_notes).SerializeToString()


def test_shared_tensors_get_their_first_names():
    model = parsed("""g (float[2] x) => (float[2] y) <float[2] again = {1,2}, float[2] other = {3,4}> {
        a = Add(x, again)
        y = Mul(a, other)
    }""")

    def rename(graph: ir.Graph) -> None:
        graph.meta[FIRST_NAMES] = {"again": "first", "not in the file": "other"}
        use_first_names(graph)

    changed = after(model, rename)
    assert stored(changed).keys() == {"first", "other"} and equal(model, changed)


def test_what_nothing_reads_goes():
    model = parsed("""g (float[2] x) => (float[2] y) <float[2] w = {1,2}, float[2] v = {3,4}> {
        shape = Shape(x)
        count = Size(shape)
        y = Add(x, w)
    }""")
    changed = after(model, drop_unread)
    assert kinds(changed) == ["Add"] and stored(changed).keys() == {"w"} and equal(model, changed)


def test_float_biases_are_the_values_of_their_codes():
    """A layer that runs twice has two dequantizers of one bias."""
    model = parsed("""g (float[2,2] x) => (float[2,2] y)
        <int32[2] b = {7,-9}, float[2] s = {0.5,0.25}, int32[2] z = {0,0}, float[2,2] w = {1,2,3,4}> {
        b1 = DequantizeLinear<axis = 0>(b, s, z)
        h = Gemm(x, w, b1)
        b2 = DequantizeLinear<axis = 0>(b, s, z)
        y = Gemm(h, w, b2)
    }""")
    changed = after(model, make_biases_float, drop_unread)
    assert kinds(changed) == ["Gemm", "Gemm"] and equal(model, changed)
    assert stored(changed)["b"].tolist() == [3.5, -2.25] and stored(changed).keys() == {"b", "w"}
