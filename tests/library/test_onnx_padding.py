"""Padding moves from Pads into convolutions: not a bit of any output changes, and engines run the convolutions."""

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from timm.layers import Conv2dSame
from torch import nn

import qwt2
from qwt2.capture.export import capture
from qwt2.capture.wiring import escaping
from qwt2.engines.interpreter.graph import TorchGraph
from qwt2.engines.operations import count_operations
from qwt2.evaluation.mismatch import engine_mismatch, record_modules
from qwt2.onnx.file import load_onnx
from qwt2.onnx.passes.padding import fold_pads
from qwt2.onnx.templates import rewrite_onnx
from qwt2.quantization.targets import TARGETS
from tests.support import tiny_models as tiny
from tests.support.onnx_graphs import after, equal, kinds, parsed

pytestmark = pytest.mark.slow

SIDES = st.lists(st.integers(0, 3), min_size=4, max_size=4)
GRID = {"scale": np.float32(0.25), "zero_point": np.uint8(100)}


def padded(
    sides: list[list[int]], own: list[int], quantizers: str, clip: str, kernel: int, stride: int, dilation: int, groups: int
) -> onnx.ModelProto:
    """Pads in a row and a convolution of images (2, 4, 9, 8); all sums are exact in float32, in any order.

    Args:
        sides: the widths of every Pad: top, left, bottom, right.
        own: the convolution's own.
        quantizers: "behind" the Pads, "before" them, "both" or "none".
        clip: what the quantizers clip, "values", "codes" or "nothing".
    """
    rng = np.random.default_rng(0)
    weight = rng.integers(-9, 10, (6, 4 // groups, kernel, kernel)).astype(np.float32)
    stored = {"weight": weight, "low": np.float32(-8), "high": np.float32(4), "lowest": np.uint8(90), "highest": np.uint8(150), **GRID}
    stored |= {f"widths{i}": np.array([0, 0, *s[:2], 0, 0, *s[2:]]) for i, s in enumerate(sides)}
    nodes, value = [], "x"

    def add(kind: str, *inputs: str, **attributes) -> None:
        nonlocal value
        nodes.append(helper.make_node(kind, [value, *inputs], [f"v{len(nodes)}"], **attributes))
        value = nodes[-1].output[0]

    def quantize() -> None:
        if clip == "values":
            add("Clip", "low", "high")
        add("QuantizeLinear", "scale", "zero_point")
        if clip == "codes":
            add("Clip", "lowest", "highest")
        add("DequantizeLinear", "scale", "zero_point")

    if quantizers in ("before", "both"):
        quantize()
    for i in range(len(sides)):
        add("Pad", f"widths{i}")
    if quantizers in ("behind", "both"):
        quantize()
    add("Conv", "weight", kernel_shape=[kernel] * 2, strides=[stride] * 2, dilations=[dilation] * 2, group=groups, pads=own)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in (("x", [2, 4, 9, 8]), (value, None))]
    graph = helper.make_graph(nodes, "padded", ends[:1], ends[1:], [numpy_helper.from_array(a, n) for n, a in stored.items()])
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def outputs(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """Return what ONNX Runtime computes with all its own rewrites."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@settings(max_examples=40, deadline=None)
@given(
    sides=st.lists(SIDES, min_size=1, max_size=2), own=SIDES, quantizers=st.sampled_from(["behind", "before", "both", "none"]),
    clip=st.sampled_from(["values", "codes", "nothing"]), kernel=st.integers(1, 3), stride=st.integers(1, 3),
    dilation=st.integers(1, 2), groups=st.sampled_from([1, 2]),
)  # fmt: skip
def test_convolutions_pad_as_pads_did(sides, own, quantizers, clip, kernel, stride, dilation, groups):
    model = padded(sides, own, quantizers, clip, kernel, stride, dilation, groups)
    changed = after(model, fold_pads)
    assert "Pad" not in kinds(changed)
    [convolution] = [node for node in changed.graph.node if node.op_type == "Conv"]
    assert next(list(a.ints) for a in convolution.attribute if a.name == "pads") == np.sum([own, *sides], axis=0).tolist()
    x = np.random.default_rng(1).integers(-40, 40, (2, 4, 9, 8)).astype(np.float32) / 4
    assert np.array_equal(*(outputs(m, x) for m in (model, changed)))
    assert np.array_equal(*(next(iter(TorchGraph(m)({"x": x}).values())) for m in (model, changed)))


CONV = "y = Conv<kernel_shape = [3,3]>(v, w)"
QUANTIZER = "q = QuantizeLinear(p, s, z) v = DequantizeLinear(q, s, z)"
WIDTHS = "int64[8] widths = {0,0,0,0,0,0,1,1}"


@pytest.mark.parametrize(
    "pad, behind",
    [
        (f"{WIDTHS}, float one = {{1}}|v = Pad(x, widths, one)", CONV),
        (f"{WIDTHS}|v = Pad<mode = \"edge\">(x, widths)", CONV),
        ("int64[8] widths = {0,1,0,0,0,0,1,1}, float[2,3,3,3] w = {W}|v = Pad(x, widths)", CONV),
        ("int64[8] widths = {1,0,0,0,0,0,1,1}|v = Pad(x, widths)", CONV),
        ("int64[8] widths = {0,0,-1,0,0,0,2,1}|v = Pad(x, widths)", CONV),
        (f"{WIDTHS}|v = Pad(x, widths)", "y = Conv<kernel_shape = [3,3], auto_pad = \"SAME_UPPER\">(v, w)"),
        (f"{WIDTHS}|v = Pad(x, widths)", "y = MaxPool<kernel_shape = [3,3]>(v)"),
        (f"{WIDTHS}|v = Pad(x, widths)", f"{CONV} o = Relu(v)"),
        (f"{WIDTHS}|o = Pad(x, widths) v = Neg(o)", CONV),
        (f"{WIDTHS}|p = Pad(x, widths)", f"q = QuantizeLinear(p, s, z) v = DequantizeLinear(q, s, z2) {CONV}"),
        (f"{WIDTHS}|p = Pad(x, widths)", f"c = Clip(p, s, high) q = QuantizeLinear(c, s, z) v = DequantizeLinear(q, s, z) {CONV}"),
        (f"{WIDTHS}|p = Pad(x, widths)", f"{QUANTIZER} {CONV} o = Relu(v)"),
    ],
    ids=[
        "ones", "edge", "channels", "images", "crop", "auto_pad", "pooling", "read besides", "returned", "other zero point",
        "clip above zero", "read besides as codes",
    ],
)  # fmt: skip
def test_other_pads_stay(pad, behind):
    stored, _, pad = pad.partition("|")
    weight = "" if "{W}" in stored else f", float[2,2,3,3] w = {{{','.join(map(str, range(36)))}}}"
    stored = stored.replace("{W}", f"{{{','.join(map(str, range(54)))}}}")
    outputs = "float[a,b,c,d] y" + (", float[e,f,g,h] o" if "o = " in pad + behind else "")
    model = parsed(f"""g (float[2,2,5,5] x) => ({outputs})
        <{stored}{weight}, float s = {{0.25}}, uint8 z = {{9}}, uint8 z2 = {{8}}, float high = {{2}}> {{ {pad} {behind} }}""")
    changed = after(model, fold_pads)
    assert kinds(changed) == kinds(model) and equal(model, changed)


class Same(nn.Module):
    """Convolutions with TensorFlow's padding: of images, behind a ReLU6, for two readers, and of an even kernel."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = Conv2dSame(3, 8, 3, 2), Conv2dSame(8, 8, 3, 2, groups=8)
        self.left, self.right = nn.Conv2d(8, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)
        self.even, self.head = nn.Conv2d(8, 8, 2, padding="same"), nn.Linear(8, tiny.CLASSES)

    def forward(self, x):
        x = F.relu6(self.depthwise(F.relu6(self.stem(x))))
        x = F.pad(x, (0, 1, 0, 1))
        return self.head(self.even(self.left(x) + self.right(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Returns the folded model and its file for a target and a number of bits."""
    folder = tmp_path_factory.mktemp("padding")

    @functools.cache
    def export(target: str, bits: int):
        qmodel = qwt2.quantize(tiny.randomize(Same()), tiny.batches(), "minmax", qwt2.Precision(bits, bits), target)
        qwt2.compensate(qmodel, tiny.batches(), "cwac")
        folded = qwt2.fold(qmodel)
        return folded, qwt2.export_onnx(folded, folder / f"{target}-{bits}.onnx", tiny.images(2))

    return export


def test_only_what_something_else_reads_needs_an_output_quantizer():
    graph = capture(tiny.randomize(Same()), tiny.images(2))
    assert escaping(graph) == {"left", "right", "even"}


@pytest.mark.parametrize("target, bits", [("portable", 4), *((target, 8) for target in TARGETS)])
def test_files_have_no_pads(target, bits, exported):
    folded, path = exported(target, bits)
    assert "Pad" not in kinds(load_onnx(path))
    if target != "tensorrt":  # its files are not rewritten
        assert rewrite_onnx(path, folded, path.with_suffix(".again")).read_bytes() == path.read_bytes()


RUNS = [
    ("onnxruntime", "portable"), ("torch_int8", "portable"), ("torch_int8", "tensorrt"), ("openvino", "openvino"),
    pytest.param("inductor", "portable", marks=pytest.mark.xdist_group("inductor")),
    pytest.param("tvm", "portable", marks=pytest.mark.xdist_group("tvm")),
]  # fmt: skip


@pytest.mark.parametrize("engine, target", RUNS)
def test_engines_compute_such_convolutions_in_integers(engine, target, exported):
    if engine == "tvm":
        pytest.importorskip("tvm", reason="needs apache-tvm")
    folded, path = exported(target, 8)
    images = tiny.images(4, seed=1)
    with torch.no_grad():
        expected = folded(images).numpy()
    model = qwt2.load_engine(path, engine)
    found = model(images.numpy())
    assert np.median(np.abs(found - expected).max(1)) < 1e-4 * np.abs(expected).max()
    counted = count_operations(model.session(4).operations())
    assert sum(counted["integer"].values()) >= 6 and "Pad" not in counted["float"]


@pytest.mark.parametrize("bits", [8, 4])
def test_modules_by_themselves_read_what_is_padded_already(bits, exported):
    folded, path = exported("portable", bits)
    mismatches = engine_mismatch(load_onnx(path), "onnxruntime", record_modules(folded, tiny.images(4, seed=1)))
    assert {"stem", "depthwise", "left", "right", "even"} <= mismatches.keys()
    assert max(m.steps for m in mismatches.values()) <= 1 + 1e-3
