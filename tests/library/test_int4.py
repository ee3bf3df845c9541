"""INT4 storage: smaller files, and exactly the int8 model when loaded."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

import qwt2
from qwt2.engines import ENGINES
from qwt2.errors import Qwt2Error
from qwt2.onnx.export import write_onnx
from qwt2.onnx.file import load_onnx, save_onnx, with_batch_size
from qwt2.onnx.int4 import pack_int4, widen_int4
from qwt2.quantization.info import quantized_layers
from tests.support import tiny_models as tiny

pytestmark = pytest.mark.slow

MODELS = tiny.exported_models()


def linear(weight_bits: int, width: int = 256, flip: bool = False) -> nn.Module:
    """A folded stack in which weights are nearly everything; ``flip`` makes half of the alphas negative."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))
    precision = qwt2.Precision(weight_bits, 8, first_last_bits=None)
    qmodel = qwt2.quantize(tiny.randomize(model), [tiny.images()], "minmax", precision)
    if flip:
        for layer in quantized_layers(qmodel).values():
            sign = torch.ones(layer.out_channels)
            sign[::2] = -1
            layer.set_compensation(sign, torch.zeros(layer.out_channels))
    return qwt2.fold(qmodel)


def in_int4(path: Path) -> ir.Model:
    """A file's model with INT4 weights."""
    model = ir.from_proto(load_onnx(path))
    pack_int4(model)
    return model


def types(path: Path) -> set[int]:
    return {tensor.data_type for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits, method", [(4, "cwac"), (3, None)])
def test_the_loaded_model_is_the_int8_model_byte_for_byte(name, bits, method, tmp_path):
    _, path = tiny.exported(name, bits, method)
    model, packed = load_onnx(path), in_int4(path)
    onnx.checker.check_model(ir.to_proto(packed), full_check=True)
    stored = save_onnx(packed, tmp_path / "int4.onnx")
    assert TensorProto.INT4 in types(stored)
    assert load_onnx(stored).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    images = tiny.images(3, seed=1).numpy()
    for engine in ("onnxruntime", "openvino", "torch_int8"):
        assert np.array_equal(qwt2.load_engine(stored, engine)(images), qwt2.load_engine(path, engine)(images))


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_files_are_about_half_as_large(bits, flip, tmp_path):
    folded = linear(bits, flip=flip)
    wide = write_onnx(folded, tmp_path / "int8.onnx", tiny.images(2))
    narrow = save_onnx(in_int4(wide), tmp_path / "int4.onnx")
    assert 0.5 <= narrow.stat().st_size / wide.stat().st_size < 0.53
    assert load_onnx(narrow).SerializeToString(deterministic=True) == wide.read_bytes()
    weights = [t for t in onnx.load(narrow).graph.initializer if t.name.endswith(".weight")]
    assert len(weights) == 3 and {t.data_type for t in weights} == {TensorProto.INT4}
    if flip and bits == 4:  # -8 flipped to +8 does occur, and INT4 has no +8
        assert any(numpy_helper.to_array(t).max() == 8 << 3 for t in load_onnx(narrow).graph.initializer if t.name.endswith(".weight"))


def test_a_file_is_written_in_int4_as_if_packed_afterwards(tmp_path):
    folded = linear(3, flip=True)
    wide = write_onnx(folded, tmp_path / "int8.onnx", tiny.images(2))
    narrow = write_onnx(folded, tmp_path / "int4.onnx", tiny.images(2), weight_storage="int4")
    assert narrow.read_bytes() == save_onnx(in_int4(wide), tmp_path / "packed.onnx").read_bytes()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_file_as_it_is_means_the_same_to_engines_that_know_int4(engine):
    """Without qwt2: the scales in the file bear what the codes lack."""
    folded, path = tiny.exported("vit", 4, "cwac")
    images = tiny.images(2)
    raw = with_batch_size(ir.to_proto(in_int4(path)), 2)
    if engine == "openvino":
        [found] = ENGINES.get(engine)(raw, 1)({"images": images.numpy()}).values()
    else:
        options = onnxruntime.SessionOptions()
        # ONNX Runtime 1.32's further optimizations break graphs of opset 21, whatever their weights.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        session = onnxruntime.InferenceSession(raw.SerializeToString(), options, providers=["CPUExecutionProvider"])
        [found] = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = folded(images).numpy()
    assert np.abs(found - expected).max() < 0.3 * np.abs(expected).max()


def test_weights_of_more_bits_stay_int8(tmp_path):
    """First and last layer keep their 8 bits."""
    _, path = tiny.exported("vit", 4, None)
    before = {t.name: t for t in load_onnx(path).graph.initializer}
    after = {t.name: t for t in ir.to_proto(in_int4(path)).graph.initializer}
    for name in ("patch_embed.proj.weight", "head.weight"):
        assert after[name] == before[name] and after[name].data_type == TensorProto.INT8
    assert after["blocks.0.mlp.fc1.weight"].data_type == TensorProto.INT4


def test_a_model_without_low_bit_weights_is_refused(tmp_path):
    with pytest.raises(Qwt2Error, match="no weight has codes of at most 4 bits"):
        write_onnx(linear(8, 16), tmp_path / "a.onnx", tiny.images(2), weight_storage="int4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight_storage": "int2"}, "unknown weight storage 'int2'; use one of: int8, int4"),
    ],
)
def test_unknown_formats_are_refused(options, message, tmp_path):
    with pytest.raises(Qwt2Error, match=message):
        write_onnx(linear(4, 16), tmp_path / "a.onnx", tiny.images(2), **options)


def test_tensorrt_takes_no_int4_weights(tmp_path):
    folded = qwt2.fold(tiny.quantized("vit", 4, 8, "tensorrt"))
    with pytest.raises(Qwt2Error, match="target 'tensorrt' needs weight storage 'int8'"):
        write_onnx(folded, tmp_path / "a.onnx", tiny.images(2), weight_storage="int4")
    assert list(tmp_path.iterdir()) == []


def test_int8_models_pass_through_widening():
    model = load_onnx(tiny.exported("resnet", 8, None)[1])
    same = ir.from_proto(model)
    widen_int4(same)
    assert ir.to_proto(same) == model
