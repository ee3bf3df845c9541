"""Exported files: integer weights, no float copies, equal bytes for equal models, nothing half-written."""

import copy
import errno
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import qwt2
from qwt2.engines.operations import count_operations
from qwt2.evaluation.metrics import sqnr_db
from qwt2.folding.layers import IntegerLayer, QuantizeDequantize
from qwt2.onnx.export import write_onnx
from qwt2.onnx.file import load_onnx, with_batch_size
from qwt2.onnx.graph import constant, readers
from qwt2.onnx.passes import PASSES, clip_values, fold_zero_points
from qwt2.onnx.templates import Exporter, rewrite_onnx
from tests.support import tiny_models as tiny
from tests.support.onnx_graphs import after, values_of

pytestmark = pytest.mark.slow

MODELS = tiny.exported_models()
ONE_OF_EACH_KIND = tiny.exported_models(["vit", "resnet"])  # an export takes seconds
TINY = pytest.mark.xdist_group("export-resnet")  # tests that export small things of their own go with one group


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Every array in the file: initializers and constant nodes."""
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                arrays[f"{node.name}/{attribute.name}"] = numpy_helper.to_array(attribute.t)
    return arrays


def nodes(path: Path) -> list[bytes]:
    return [node.SerializeToString(deterministic=True) for node in onnx.load(path).graph.node]


def integer_layers(folded: nn.Module) -> dict[str, IntegerLayer]:
    return {name: m for name, m in folded.named_modules() if isinstance(m, IntegerLayer)}


def is_projection(layer: str) -> bool:
    """Whether a layer makes query, key and value; files have a layer for each."""
    return layer.endswith(".qkv")


def taken_off(module: IntegerLayer, weight: str, model: onnx.ModelProto) -> np.ndarray:
    """What the input's zero point adds to every accumulator, if the file's layer reads codes without it."""
    [dequantize] = readers(values_of(model)[weight])
    source = readers(dequantize.outputs[0])[0].inputs[0].producer()
    while source.op_type != "DequantizeLinear":
        source = source.inputs[0].producer()
    left = int(constant(source.inputs[2]))
    channel = 1 if module.weight.dim() == 2 else 0
    sums = module.weight.double().sum([axis for axis in range(module.weight.dim()) if axis != channel])
    return ((int(module.input.zero_point) - left) * sums).numpy().astype(np.int32)


def small(bits: int = 8, seed: int = 0, target: str = "portable") -> nn.Module:
    """A folded convolution and Linear, quick to export."""
    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(64, tiny.CLASSES))
    precision = qwt2.Precision(bits, bits, first_last_bits=None)
    return qwt2.fold(qwt2.quantize(tiny.randomize(model, seed), [tiny.images()], "minmax", precision, target))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [8, 4])
class TestFileContents:
    def test_weights_are_int8_and_biases_int32(self, name, bits):
        folded, path = tiny.exported(name, bits)
        model = onnx.load(path)
        stored = {t.name: t for t in model.graph.initializer}
        for layer, module in integer_layers(folded).items():
            weight = next(name for name in stored if name.split("/")[0] == f"{layer}.weight")
            for part, kind in (("weight", TensorProto.INT8), ("bias", TensorProto.INT32)):
                names = [f"{layer}.{part}/{i}of3" for i in range(3)] if is_projection(layer) else [f"{layer}.{part}"]
                assert {stored[name].data_type for name in names} == {kind}
                values = np.concatenate([numpy_helper.to_array(stored[name]) for name in names], -1)
                wanted = getattr(module, part).numpy()
                assert np.array_equal(values, wanted - taken_off(module, weight, model) if part == "bias" else wanted), layer

    def test_no_float_copy_of_a_quantized_weight(self, name, bits):
        folded, path = tiny.exported(name, bits)
        floats = [a for a in constants(onnx.load(path)).values() if a.dtype.kind == "f"]
        by_size: dict[int, list[np.ndarray]] = {}
        for array in floats:
            by_size.setdefault(array.size, []).append(np.sort(array.astype(np.float64).ravel()))
        for layer, module in integer_layers(folded).items():
            axis = 1 if module.weight.dim() == 2 else 0
            shape = [-1 if a == axis else 1 for a in range(module.weight.dim())]
            for values in (module.weight * module.weight_scale.reshape(shape), module.weight.float()):
                for piece in [values, *(values.chunk(3, -1) if is_projection(layer) else [])]:
                    wanted = np.sort(piece.double().numpy().ravel())
                    assert not any(np.allclose(found, wanted) for found in by_size.get(wanted.size, [])), layer

    def test_every_product_reads_dequantized_operands(self, name, bits):
        model = onnx.load(tiny.exported(name, bits)[1])
        maker = {output: node for node in model.graph.node for output in node.output}
        through = ("Reshape", "Transpose")
        count = Counter()
        for node in model.graph.node:
            if node.op_type in ("Conv", "Gemm", "MatMul"):
                count[node.op_type] += 1
                for operand in node.input:
                    source = maker[operand]
                    while source.op_type in through:
                        source = maker[source.input[0]]
                    assert source.op_type == "DequantizeLinear", (node.name, source.op_type)
        folded, _ = tiny.exported(name, bits)
        convolutions = sum(m.weight.dim() == 4 for m in integer_layers(folded).values())
        linears = len(integer_layers(folded)) - convolutions + 2 * sum(map(is_projection, integer_layers(folded)))
        assert count == Counter(Conv=convolutions, Gemm=linears, MatMul=len(folded.quantization.matmuls))

    def test_is_a_valid_file_that_says_nothing_of_where_it_was_made(self, name, bits):
        path = tiny.exported(name, bits)[1]
        onnx.checker.check_model(str(path), full_check=True)
        data = path.read_bytes()
        for trace in (str(Path.home()), str(Path(__file__).parents[2]), "site-packages", "forward(", ".py"):
            assert trace.encode() not in data, trace

    def test_compensated_and_plain_files_differ_in_numbers_alone(self, name, bits):
        """No operator and no byte more: compensation has gone into scales and biases."""
        _, plain = tiny.exported(name, bits)
        folded, compensated = tiny.exported(name, bits, "cwac")
        assert nodes(plain) == nodes(compensated)
        assert plain.stat().st_size == compensated.stat().st_size
        assert plain.read_bytes() != compensated.read_bytes()


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_rewriting_a_file_equals_exporting_anew(name, tmp_path):
    """Two independent exports, of plain PTQ and of CWAC; the second must be what rewriting the first gives."""
    _, plain = tiny.exported(name, 4)
    folded, rewritten = tiny.exported(name, 4, "cwac")
    exported = write_onnx(folded, tmp_path / "exported.onnx", tiny.images(2))
    assert nodes(exported) == nodes(plain)
    assert exported.read_bytes() == rewritten.read_bytes()


@TINY
def test_equal_models_give_equal_bytes(tmp_path):
    first, second = small(), small()
    a = write_onnx(first, tmp_path / "a.onnx", tiny.images(2))
    b = write_onnx(second, tmp_path / "b.onnx", tiny.images(7, 3))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_batch_is_dynamic(name):
    import onnxruntime

    path = tiny.exported(name)[1]
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].name == "images" and session.get_outputs()[0].name == "logits"
    images = tiny.images(5, 2).numpy()
    together = session.run(None, {"images": images})[0]
    assert together.shape == (5, tiny.CLASSES)
    for i in range(5):
        alone = session.run(None, {"images": images[i : i + 1]})[0]
        np.testing.assert_allclose(alone[0], together[i], atol=0.05 * np.abs(together).max())


@TINY
def test_an_example_of_one_image_does_not_fix_the_batch(tmp_path):
    path = write_onnx(small(), tmp_path / "a.onnx", tiny.images(1))
    for value in (*onnx.load(path).graph.input, *onnx.load(path).graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param


@TINY
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_below_8_bits_are_clipped_8_bit_codes(bits, tmp_path):
    folded = small(bits)
    model = onnx.load(write_onnx(folded, tmp_path / "a.onnx", tiny.images(2)))
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert len(clips) == (0 if bits == 8 else 2)  # the inputs of both layers
    stored = constants(model)
    for node in clips:
        lowest, highest = (stored[name] for name in node.input[1:])
        zero_point = stored[node.input[1].replace(".lowest", ".zero_point")]
        assert lowest.dtype == highest.dtype == zero_point.dtype == np.uint8
        assert int(highest) - int(lowest) == 2**bits - 1 and lowest <= zero_point <= highest


@TINY
@pytest.mark.parametrize("target, signed", [("portable", False), ("tensorrt", True)])
def test_clipping_values_in_place_of_codes_changes_no_output(target, signed, tmp_path, monkeypatch):
    if signed:  # with zero points in biases, codes stay as they are
        monkeypatch.setattr("qwt2.onnx.passes.PASSES", [(p, targets) for p, targets in PASSES if p is not fold_zero_points])
    model = load_onnx(write_onnx(small(4, target=target), tmp_path / "a.onnx", tiny.images(2)))
    x = {"images": 3 * tiny.images(4).numpy()}
    expected = ReferenceEvaluator(model).run(None, x)
    model = after(model, clip_values)
    kinds = [node.op_type for node in model.graph.node]
    behind_clips = [kinds[i + 1 : i + 3] for i, kind in enumerate(kinds) if kind == "Clip"]
    assert behind_clips == [["QuantizeLinear", "DequantizeLinear"]] * 2
    zero_points = [a for name, a in constants(model).items() if name.endswith("input.zero_point")]
    assert [a.dtype == np.int8 and a == 0 for a in zero_points] == [signed] * 2
    assert all(np.array_equal(y, wanted) for y, wanted in zip(ReferenceEvaluator(model).run(None, x), expected))


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_onnx_runtime_computes_every_layer_in_integers_at_every_precision(bits, name):
    counted = count_operations(qwt2.load_engine(tiny.exported(name, bits)[1]).session(1).operations())
    assert not [kind for kind in counted["float"] if any(product in kind for product in ("Clip", "Conv", "Gemm"))]
    assert "MatMul" not in counted["float"]


@TINY
def test_with_batch_size_fixes_inputs_and_outputs_of_a_copy():
    model = load_onnx(tiny.exported("resnet")[1])
    before = model.SerializeToString(deterministic=True)
    fixed = with_batch_size(model, 3)
    for value in (*fixed.graph.input, *fixed.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_value == 3
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_qwt_s_layers_stay_in_half_precision_in_the_file(name):
    folded, path = tiny.exported(name, 8, "qwt")
    halves = [a for a in constants(onnx.load(path)).values() if a.dtype == np.float16]
    kept = [m for m in folded.modules() if type(m).__name__ == "WidenedCompensation"]
    assert kept and len(halves) == len(kept)
    onnx.checker.check_model(str(path), full_check=True)


@TINY
@torch.no_grad()
def test_float_models_can_be_exported_as_baselines(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(64, tiny.CLASSES))
    path = write_onnx(model, tmp_path / "float.onnx", tiny.images(2))
    logits = qwt2.load_engine(path)(tiny.images(3).numpy())
    np.testing.assert_allclose(logits, model.eval()(tiny.images(3)), atol=1e-5)
    assert not any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
@torch.no_grad()
def test_every_opset_gives_the_same_outputs(name, tmp_path):
    """Opset 18 has no GELU, and its quantizers lack attributes that later ones have."""
    folded, images = qwt2.fold(tiny.quantized(name)), tiny.images(3).numpy()
    outputs = []
    for opset in (18, 20):
        path = write_onnx(folded, tmp_path / f"{opset}.onnx", tiny.images(2), opset=opset)
        onnx.checker.check_model(str(path), full_check=True)
        assert [entry.version for entry in onnx.load(path).opset_import if not entry.domain] == [opset]
        outputs.append([qwt2.load_engine(path, engine)(images) for engine in ("onnxruntime", "openvino", "torch_int8")])
    for older, newer in zip(*outputs):
        np.testing.assert_allclose(older, newer, atol=1e-5)


@torch.no_grad()
def test_what_openvino_reads_with_both_signs_has_signed_codes(tmp_path):
    """The image and the operands of additions, whose unsigned codes with a zero point are the same values."""
    qmodel = tiny.quantized("resnet", 8, 8, "openvino")
    first = qmodel.get_submodule(qmodel.quantization.layers[0]).input_quantizer
    assert int(first.zero_point) == 128
    path = write_onnx(qwt2.fold(qmodel), tmp_path / "signed.onnx", tiny.images(2))
    graph = onnx.load(path).graph
    [quantize] = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "images"]
    zero_point = next(numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name == quantize.input[2])
    assert zero_point.dtype == np.int8 and not zero_point.any()
    images = 3 * tiny.images(3)  # some beyond the range
    assert torch.equal(QuantizeDequantize(first)(images), first(images))


class Bottleneck(nn.Module):
    """Ends in a convolution without activation, as MobileNet's blocks do: what the next block reads has both signs."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(3 * width, width, 1)

    def forward(self, x):
        return self.conv2(self.conv1(x).relu()) + x


@pytest.mark.parametrize("bits", [4, 8])
def test_for_openvino_layer_and_addition_that_read_one_tensor_share_a_quantizer(tmp_path, bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *[Bottleneck() for _ in range(3)], nn.Flatten(), nn.Linear(8 * 36, 4))
    images = torch.randn(16, 3, 8, 8)
    qmodel = qwt2.quantize(model, [images], "percentile", qwt2.Precision(bits, bits), target="openvino")
    path = write_onnx(qwt2.fold(qmodel), tmp_path / "m.onnx", images[:2])
    readers = Counter(node.input[0] for node in onnx.load(path).graph.node if node.op_type == "QuantizeLinear")
    several = sum(count > 1 for count in readers.values())
    assert several == (0 if bits == 8 else 3)  # operands of additions have 8 bits
    with torch.no_grad():
        expected = qmodel(images).numpy()
    actual = qwt2.load_engine(path, "openvino")(images.numpy())
    assert sqnr_db(actual, expected) > (35 if bits == 8 else 20)


@TINY
def test_leaves_mode_logging_and_console_alone(tmp_path, capfd):
    folded = small().train()
    level = logging.getLogger("torch.onnx").level
    write_onnx(folded, tmp_path / "a.onnx", tiny.images(2))
    assert folded.training and folded.get_submodule("0").training
    assert logging.getLogger("torch.onnx").level == level
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


class Undecided(nn.Module):
    """Branches on the values of its input, which no graph can hold."""

    def forward(self, x):
        return x.sum((2, 3)) if x.mean() > 0 else x.mean((2, 3))


@TINY
class TestRefusals:
    def test_a_quantized_model_that_was_not_folded(self, tmp_path):
        with pytest.raises(qwt2.Qwt2Error, match="not folded; call qwt2.fold"):
            write_onnx(tiny.quantized("resnet"), tmp_path / "a.onnx", tiny.images(2))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("opset", [11, 17, 21])
    def test_an_unsupported_opset(self, opset, tmp_path):
        with pytest.raises(qwt2.Qwt2Error, match=f"opset {opset} is not supported; use one of: 18, 19, 20"):
            write_onnx(small(), tmp_path / "a.onnx", tiny.images(2), opset=opset)
        assert list(tmp_path.iterdir()) == []

    def test_a_model_that_cannot_be_exported(self, tmp_path):
        (tmp_path / "a.onnx").write_bytes(b"earlier")
        with pytest.raises(qwt2.Qwt2Error, match="^Undecided cannot be exported: ") as error:
            write_onnx(Undecided(), tmp_path / "a.onnx", tiny.images(2))
        assert "\n" not in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
        assert (tmp_path / "a.onnx").read_bytes() == b"earlier"

    @pytest.mark.parametrize("write", ["export", "rewrite"])
    def test_a_full_disk_leaves_the_earlier_file(self, write, tmp_path, monkeypatch):
        folded, path = tiny.exported("resnet")
        (tmp_path / "a.onnx").write_bytes(b"earlier")

        def full(self, data):
            with open(self, "wb") as file:
                file.write(data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            if write == "export":
                write_onnx(small(), tmp_path / "a.onnx", tiny.images(2))
            else:
                rewrite_onnx(path, folded, tmp_path / "a.onnx")
        monkeypatch.undo()
        assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
        assert (tmp_path / "a.onnx").read_bytes() == b"earlier"

    @pytest.mark.parametrize("content, message", [(None, "does not exist"), (b"", "not"), (b"\x89PNG nonsense", "is not an ONNX file"), ("foreign", "was not exported by qwt2")])
    def test_files_that_are_not_ours(self, content, message, tmp_path):
        path = tmp_path / "other.onnx"
        if content == "foreign":
            graph = onnx.helper.make_graph([], "g", [], [])
            onnx.save(onnx.helper.make_model(graph), path)
        elif content is not None:
            path.write_bytes(content)
        for call in (
            lambda: load_onnx(path), lambda: qwt2.load_engine(path),
            lambda: rewrite_onnx(path, tiny.exported("resnet")[0], tmp_path / "new.onnx"),
        ):  # fmt: skip
            with pytest.raises(qwt2.Qwt2Error, match=message) as error:
                call()
            assert str(path) in str(error.value) and "qwt2.export_onnx" in str(error.value)
        assert not (tmp_path / "new.onnx").exists()

    def test_a_truncated_file(self, tmp_path):
        path = tmp_path / "cut.onnx"
        path.write_bytes(tiny.exported("resnet")[1].read_bytes()[:-1000])
        with pytest.raises(qwt2.Qwt2Error, match=r"cut\.onnx"):
            load_onnx(path)

    @pytest.mark.parametrize("change", ["fewer layers", "other shapes", "other bits"])
    def test_rewriting_a_file_of_another_structure(self, change, tmp_path):
        template = write_onnx(small(), tmp_path / "template.onnx", tiny.images(2))
        other = small(4) if change == "other bits" else copy.deepcopy(small())
        if change == "fewer layers":  # every number it stores is in the file, which holds more
            other.set_module("0", nn.Identity())
        elif change == "other shapes":
            first = other.get_submodule("0")
            first.weight = first.weight[:, :, :4]
        with pytest.raises(qwt2.Qwt2Error, match=r"template\.onnx holds a model of another structure"):
            rewrite_onnx(template, other, tmp_path / "new.onnx")
        assert not (tmp_path / "new.onnx").exists()


@TINY
def test_exporter_exports_a_structure_once(tmp_path, monkeypatch):
    from qwt2.onnx import templates

    exports = []
    monkeypatch.setattr(templates, "write_onnx", lambda *args, **names: (exports.append(1), write_onnx(*args, **names))[1])
    exporter = Exporter(tiny.images(2))
    models = small(), small(seed=1), small(4), small(4, seed=1)
    paths = [exporter.export(model, tmp_path / f"{i}.onnx") for i, model in enumerate(models)]
    assert len(exports) == 2 and len({p.read_bytes() for p in paths}) == 4
    other = Exporter(tiny.images(2))
    other.learn(paths[0])
    assert other.export(models[1], tmp_path / "learned.onnx").read_bytes() == paths[1].read_bytes()
    assert len(exports) == 2
