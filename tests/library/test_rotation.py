"""Rotation of the residual stream: the matrix, exactness in float64, what is refused, and engines."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import qwt2
from qwt2.capture.export import capture
from qwt2.capture.rotation import find_streams, rotated, rotation
from qwt2.engines import load_engine
from qwt2.errors import Qwt2Error
from tests.support import tiny_models as tiny

SETTINGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": tiny.CLASSES}
PRE_NORM = {
    "deit_tiny_distilled_patch16_224": {},  # two tokens, two heads
    "vit_small_patch14_reg4_dinov2": {},  # register tokens, LayerScale
    "vit_base_patch16_224_miil": {"global_pool": "avg", "qkv_bias": False},  # the last norm is behind a mean of tokens
}
REFUSED = {
    tiny.swin: "SwinTransformer cannot be rotated: patch_embed.norm",
    tiny.resnet: "ResNet cannot be rotated: no LayerNorm reads a residual stream",
}


@pytest.mark.parametrize("size", [1, 2, 7, 16, 24, 96, 100, 384])
def test_the_matrix_is_orthogonal_keeps_the_mean_and_spreads_every_channel(size):
    q, ones = rotation(size), torch.ones(size, dtype=torch.float64)
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(q @ ones, ones, rtol=0, atol=1e-12)
    if size >= 16:  # as Gaussian entries with deviation size^-1/2 would
        assert q.abs().max() < 4.5 * size**-0.5


@pytest.mark.parametrize("size", [96, 128])
def test_it_commutes_with_layer_norm(size):
    x = torch.randn(50, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    x[:, 5] *= 40
    q = rotation(size)
    turned = F.layer_norm(x @ q, (size,))
    torch.testing.assert_close(turned, F.layer_norm(x, (size,)) @ q, rtol=0, atol=1e-12)
    assert turned.abs().max() < 0.6 * F.layer_norm(x, (size,)).abs().max()  # the outlier is spread


@pytest.mark.parametrize("name", PRE_NORM)
@torch.no_grad()
def test_the_network_stays_exactly_the_same(name):
    model = tiny.randomize(timm.create_model(name, **SETTINGS | PRE_NORM[name]))
    images = tiny.images(3)
    captured = capture(model, images[:2]).double()
    turned = rotated(captured)
    exact = model.double()(images.double())
    torch.testing.assert_close(turned(images.double()), exact, rtol=0, atol=1e-12 * float(exact.abs().max()))
    operations = [[str(node.target) for node in model.graph.nodes] for model in (captured, turned)]
    assert set(operations[1]) <= set(operations[0]) and len(operations[1]) <= len(operations[0])
    before, after = captured.state_dict(), turned.state_dict()
    moved = {key for key in before.keys() & after.keys() if not torch.equal(before[key], after[key])}
    assert {"pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight", "patch_embed.proj.weight"} <= moved
    assert {"blocks.0.attn.proj.bias", "blocks.0.mlp.fc1.bias"} <= moved
    assert not any("norm1" in key or "ls1" in key for key in after)  # norms' weights and LayerScale are in the layers


@pytest.mark.parametrize("build", REFUSED)
def test_networks_whose_streams_have_other_readers_or_writers_are_refused(build):
    with pytest.raises(Qwt2Error, match=f"^{REFUSED[build]}.*leave rotate out$"):
        rotated(tiny.captured(build))


def test_convolutions_may_not_read_the_stream():
    model = timm.create_model("convnext_atto", depths=(1,) * 4, dims=(8, 8, 16, 16), num_classes=tiny.CLASSES)
    with pytest.raises(Qwt2Error, match="ConvNeXt cannot be rotated: stages"):
        qwt2.quantize(model.eval(), tiny.batches(4), rotate=True)


class Branches(nn.Module):
    """A pre-norm block, with one more use of its stream, or of its norm, by name."""

    def __init__(self, extra: str):
        super().__init__()
        self.extra = extra
        self.stem, self.norm, self.fc = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.end, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.position = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        x = self.stem(x) + self.position
        x = torch.relu(x) if self.extra == "relu" else x
        y = self.norm(x)
        x = x + self.fc({"tanh": torch.tanh, "shift": lambda y: y + 1.0}.get(self.extra, lambda y: y)(y))
        z = self.head(self.end(x).mean(1))
        more = {"stream": x, "norm": y, "maximum": x.amax(1), "position": self.position * z[:, :1]}
        if self.extra == "post":  # a norm writes the stream
            return self.head(self.end(x + self.norm(self.fc(x))))
        return (z, more[self.extra]) if self.extra in more else self.fc(self.end(x)) if self.extra == "twice" else z


@pytest.mark.parametrize("extra", ["none", "relu", "tanh", "shift", "stream", "norm", "maximum", "position", "twice", "post"])
@torch.no_grad()
def test_only_streams_of_linear_layers_and_norms_are_rotated(extra):
    model, x = tiny.randomize(Branches(extra)), torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    captured = capture(model, x[:2])
    if extra == "none":
        [stream] = find_streams(captured)
        assert stream.norms == {"norm": ["fc"], "end": ["head"]} and sorted(stream.writers) == ["fc", "stem"]
        torch.testing.assert_close(rotated(captured)(x), model(x), rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(Qwt2Error, match=r"Branches cannot be rotated: .*leave rotate out$"):
            rotated(captured)


@pytest.mark.slow
@torch.no_grad()
def test_a_rotated_model_is_quantized_stored_compensated_and_exported(tmp_path):
    captured, images = tiny.captured(tiny.vit), tiny.images(8)
    before = copy.deepcopy(captured.state_dict())
    qmodel = qwt2.quantize(captured, tiny.batches(), "repq", qwt2.Precision(4, 4), rotate=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in captured.state_dict().items())
    with qwt2.full_precision(qmodel):
        torch.testing.assert_close(qmodel(images), captured(images), rtol=1e-4, atol=1e-4)
    qwt2.save_quantized(qmodel, tmp_path / "model.safetensors")
    loaded = qwt2.load_quantized(captured, tmp_path / "model.safetensors")
    assert torch.equal(loaded(images), qmodel(images))
    assert not torch.equal(qwt2.quantize(captured, tiny.batches(), "repq", qwt2.Precision(4, 4))(images), qmodel(images))
    qwt2.compensate(qmodel, tiny.batches(), "cwac")
    path = qwt2.export_onnx(qwt2.fold(qmodel), tmp_path / "model.onnx", images)
    found, expected = load_engine(path, "onnxruntime")(images.numpy()), qmodel(images).numpy()
    assert np.abs(found - expected).max() <= 2 * np.ptp(expected) / 255  # of steps of the last layer
