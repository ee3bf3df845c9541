"""`nn.MultiheadAttention` in the ways that people call it: same function, and every product quantized."""

import pytest
import torch
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

import qwt2
from qwt2.capture import wiring
from qwt2.capture.export import capture
from qwt2.quantization.layers import full_precision
from tests.support.graphs import assert_same
from tests.support.tiny_models import batches, images, randomize


class Tokens(nn.Module):
    """Images to 16 tokens of width 8, through `call`, and back to one row per image."""

    def __init__(self, call, **settings):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, **settings)
        self.call, self.context = call, nn.Conv2d(3, settings.get("kdim", 8), 8, 8)

    def forward(self, x):
        tokens, context = (f(x).flatten(2).transpose(1, 2) for f in (self.stem, self.context))
        return self.head(self.call(self.attention, tokens, context).mean(1))


def self_attention(attention, x, context):
    return x + attention(x, x, x)[0]


def without_weights(attention, x, context):
    return attention(x, x, x, need_weights=False)[0]


def cross(attention, x, context):
    return attention(x, context[:, :9], context[:, :9])[0]


def sequence_first(attention, x, context):
    x = x.transpose(0, 1)
    return attention(x, x, x)[0].transpose(0, 1)


def additive_mask(attention, x, context):
    return attention(x, x, x, attn_mask=torch.linspace(-2, 2, 16).expand(16, 16))[0]


def boolean_mask(attention, x, context):
    return attention(x, x, x, attn_mask=torch.ones(16, 16, dtype=torch.bool).triu(1))[0]


def mask_per_head(attention, x, context):
    return attention(x, x, x, attn_mask=torch.linspace(-2, 2, 16).expand(2 * len(x), 16, 16))[0]


def uses_weights(attention, x, context):
    y, weights = attention(x, x, x)
    return y + weights.var(1).unsqueeze(-1) * x


def uses_weights_per_head(attention, x, context):
    y, weights = attention(x, x, x, average_attn_weights=False)
    return y + weights[:, 1].var(1).unsqueeze(-1) * x


def padding_mask(attention, x, context):
    return attention(x, x, x, key_padding_mask=x[:, :, 0] < -1)[0]


def padding_mask_without_weights(attention, x, context):
    return attention(x, x, x, key_padding_mask=x[:, :, 0] < -1, need_weights=False)[0]


def called_in_two_ways(attention, x, context):
    return attention(attention(x, x, x)[0], x, x)[0]


CALLS = [
    (self_attention, {"batch_first": True}), (self_attention, {"batch_first": True, "bias": False}),
    (without_weights, {"batch_first": True}), (cross, {"batch_first": True}),
    (cross, {"batch_first": True, "kdim": 6, "vdim": 6}), (sequence_first, {}),
    (additive_mask, {"batch_first": True}), (boolean_mask, {"batch_first": True}), (mask_per_head, {"batch_first": True}),
    (uses_weights, {"batch_first": True}), (uses_weights_per_head, {"batch_first": True}),
    (self_attention, {"batch_first": True, "add_bias_kv": True}), (self_attention, {"batch_first": True, "add_zero_attn": True}),
    (padding_mask, {"batch_first": True}), (padding_mask_without_weights, {"batch_first": True}),
    (called_in_two_ways, {"batch_first": True}),
]  # fmt: skip


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("call, settings", CALLS)
def test_it_computes_the_same_and_can_be_quantized(call, settings):
    model = randomize(Tokens(call, **settings))
    expected = model(images(4))
    graph = capture(model, images(2))
    assert_same(graph, model, images(4), atol=1e-5)
    qmodel = qwt2.quantize(graph, batches())
    info = qmodel.quantization
    calls = ("", "_repeat1") if call is called_in_two_ways else ("",)  # the second call reads what the first gave
    assert {*info.matmuls} == {f"attention.matmul{n}{again}" for n in (1, 2) for again in calls} and not info.float_modules
    assert wiring.softmax_products(graph) == {f"attention.matmul2{again}" for again in calls}
    # One projection where query, key and value are of one tensor, three where they are not; the output's bears its name.
    projections = [name for name in info.layers if name.startswith("attention.")]
    fused, apart = ["attention.linear1"], ["attention.linear1", "attention.linear2", "attention.linear3"]
    expected_projections = {cross: apart, called_in_two_ways: [*fused, *apart[1:]]}.get(call, fused)
    assert sorted(projections) == [*expected_projections, *(f"attention.out_proj{again}" for again in calls)]
    assert torch.allclose(qmodel(images(4)), expected, atol=0.1 * expected.abs().max())
    with full_precision(qmodel):
        assert torch.allclose(qmodel(images(4)), expected, atol=1e-5)


def test_softmax_gets_the_softmax_grid():
    qmodel = qwt2.quantize(randomize(Tokens(self_attention, batch_first=True)), batches())
    zero_point = qmodel.get_submodule("attention.matmul2").a_quantizer.zero_point
    assert zero_point == 0  # attention probabilities are not negative


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("norm_first", [False, True])
def test_pytorch_s_encoder_whole_chain(norm_first, tmp_path):
    """nn.TransformerEncoderLayer has a fast path of its own that runs no submodule."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.encoder, self.head = nn.Conv2d(3, 8, 8, 8), encoder, nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1))

    whole_chain(randomize(Classifier()), 1, tmp_path)


@pytest.mark.slow
@torch.no_grad()
def test_torchvision_s_vision_transformer_whole_chain(tmp_path):
    whole_chain(randomize(VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=5)), 1, tmp_path)


def whole_chain(model: nn.Module, blocks: int, tmp_path) -> None:
    expected = model(images(4))
    qmodel = qwt2.quantize(model, batches())
    assert len(qmodel.quantization.blocks) == blocks and not qmodel.quantization.float_modules
    assert len(qmodel.quantization.matmuls) == 2 * blocks
    with full_precision(qmodel):
        assert torch.allclose(qmodel(images(4)), expected, atol=1e-5)
    qwt2.compensate(qmodel, batches(), "cwac")
    qwt2.save_quantized(qmodel, tmp_path / "m.safetensors")
    assert torch.equal(qwt2.load_quantized(model, tmp_path / "m.safetensors")(images(4)), qmodel(images(4)))
    folded = qwt2.fold(qmodel)
    path = qwt2.export_onnx(folded, tmp_path / "m.onnx", images(2))
    for engine in ("onnxruntime", "openvino"):
        logits = qwt2.load_engine(path, engine)(images(4).numpy())
        assert abs(logits - expected.numpy()).max() < 0.2 * expected.abs().max()
