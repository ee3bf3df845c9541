"""Tracing and surgery: what is found in a model, and that taking it apart changes no output."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from tiny_models import BUILDERS, images, randomize
from torch import nn

import qwt2
from qwt2.capture.blocks import execution_units, find_blocks
from qwt2.errors import Qwt2Error
from qwt2.quantization.layers import QuantizedMatmul, full_precision
from qwt2.capture.rewrite import expose_operations, fold_batchnorms
from qwt2.capture.trace import trace


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


class Attention(nn.Module):
    """Self-attention in one of the ways that people write it; tokens of width 8, two heads."""

    def __init__(self, product, mask=None):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.product, self.mask = product, mask

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mask = self.mask(q) if self.mask else None
        return self.proj(self.product(q, k, v, mask).transpose(1, 2).reshape(x.shape))


def by_hand(q, k, v, mask):
    scores = (q * 4**-0.5) @ k.transpose(-2, -1)
    return (scores if mask is None else scores + mask).softmax(-1) @ v


def fused(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def fused_scaled(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)


class Tokens(nn.Module):
    """Images to tokens of width 8, through `layer`, and back to one row per image."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, 8, 8, 8), layer, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


def additive(q):
    return torch.linspace(-1, 1, 16).expand(16, 16)


def boolean(q):
    return torch.ones(16, 16, dtype=torch.bool).tril()


@pytest.mark.parametrize("product, mask", [(by_hand, None), (by_hand, additive), (fused, None), (fused, additive),
                                           (fused, boolean), (fused_scaled, boolean)])  # fmt: skip
def test_attention_taken_apart_computes_the_same(product, mask):
    model = randomize(Tokens(Attention(product, mask)))
    expected = outputs(model, images(4))
    exposed = expose_operations(model, trace(model, images(1)), additions={})
    names = exposed.matmuls
    assert names == ["layer.matmul1", "layer.matmul2"] and not exposed.skipped
    first, second = (model.get_submodule(name) for name in names)
    assert isinstance(first, QuantizedMatmul) and isinstance(second, QuantizedMatmul)
    assert not first.a_quantizer.is_softmax and second.a_quantizer.is_softmax
    for matmul in (first, second):
        matmul.quantized = False
    assert torch.allclose(outputs(model, images(4)), expected, atol=1e-6)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_whole_networks_taken_apart_compute_the_same(name):
    model = BUILDERS[name]()
    expected = outputs(model, images(4))
    changed = copy.deepcopy(model)
    fold_batchnorms(changed, trace(changed, images(1)))
    exposed = expose_operations(changed, trace(changed, images(1)), additions={})
    assert not exposed.skipped
    for matmul in exposed.matmuls:
        changed.get_submodule(matmul).quantized = False
    assert torch.allclose(outputs(changed, images(4)), expected, atol=2e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in changed.modules())
    assert len(exposed.matmuls) == {"vit": 4, "swin": 6, "resnet": 0, "mobilenet": 0}[name]
    assert torch.equal(outputs(model, images(4)), expected)  # the original is as it was


def test_attention_that_cannot_be_rewritten_stays_in_float_with_its_reason():
    class DataDependent(nn.Module):
        def forward(self, x):
            return x @ x.transpose(1, 2) @ x if x.sum() > 0 else x

    model = randomize(Tokens(DataDependent()))
    with torch.no_grad():
        model.stem.bias.add_(10.0)
    exposed = expose_operations(model, trace(model, images(1)), additions={})
    assert not exposed.matmuls and "cannot be traced" in exposed.skipped["layer"]


def test_wiring_of_a_transformer():
    found = trace(BUILDERS["vit"](), images(1))
    assert found.layers[0] == "patch_embed.proj" and found.layers[-1] == "head"
    assert found.layers[1:5] == ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    assert set(found.calls.values()) == {1}
    assert [name for name, site in found.sites.items() if site.products] == ["blocks.0.attn", "blocks.1.attn"]
    assert found.norm_consumers["blocks.0.norm1"] == ["blocks.0.attn.qkv"]
    assert found.norm_consumers["blocks.1.norm2"] == ["blocks.1.mlp.fc1"]
    assert "norm" not in found.norm_consumers  # the class token is cut out between the norm and the head


def test_wiring_of_swin_finds_patch_merging_and_shifted_windows():
    model = BUILDERS["swin"]()
    found = trace(model, images(1))
    assert found.norm_consumers["layers.1.downsample.norm"] == ["layers.1.downsample.reduction"]
    for block in ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"):
        assert found.norm_consumers[f"{block}.norm1"] == [f"{block}.attn.qkv"]
    assert find_blocks(model, found.layers) == ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]


def test_wiring_of_a_residual_network():
    found = trace(BUILDERS["resnet"](), images(1))
    assert found.batchnorm_of["layer1.0.conv1"] == "layer1.0.bn1"
    assert found.batchnorm_of["layer2.0.downsample.0"] == "layer2.0.downsample.1"
    folded = BUILDERS["resnet"]()
    fold_batchnorms(folded, trace(folded, images(1)))
    escaping = trace(folded, images(1)).escaping
    assert {"layer1.0.conv2", "layer2.0.downsample.0"} <= escaping  # read by the addition
    assert "layer1.0.conv1" not in escaping  # read, through a ReLU, by the next convolution alone


@pytest.mark.parametrize("reader", ["residual", "second linear", "permuted"])
def test_a_norm_that_something_else_reads_is_left_alone(reader):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(16, 8)

        def forward(self, x):
            y = self.norm(x)
            if reader == "residual":
                return self.fc1(y) + y
            if reader == "permuted":
                return self.fc2(y.transpose(1, 2)).transpose(1, 2)
            return self.fc1(y) + self.fc2(torch.cat([y, x], -1))

    assert "layer.norm" not in trace(Tokens(Block()), images(1)).norm_consumers


def test_a_norm_s_readers_are_all_found():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.q, self.k = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.norm(x)
            return x + self.k(y) + self.q(y.reshape(-1, 8)).reshape(x.shape)

    assert trace(Tokens(Block()), images(1)).norm_consumers["layer.norm"] == ["layer.k", "layer.q"]


def test_a_batchnorm_with_a_second_reader_is_not_folded():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    assert not trace(Block(), images(1)).batchnorm_of


def test_layers_with_arithmetic_of_their_own_stay_in_float():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias, self.stride)

    class Wrapped(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    found = trace(nn.Sequential(Standardized(3, 4, 8, 8), Wrapped(4, 4, 1)), images(1))
    assert found.layers == ["1"] and "forward method of its own" in str(found.unsupported["0"])


def test_a_linear_that_other_than_the_norm_feeds_is_not_the_norm_s():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.norm(x)) + self.fc(x)

    assert not trace(Tokens(Block()), images(1)).norm_consumers


def test_a_batchnorm_with_a_second_input_is_not_folded():
    class Block(nn.Module):
        def __init__(self, second):
            super().__init__()
            self.conv, self.other, self.bn, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), second

        def forward(self, x):
            return self.bn(self.conv(x)) + self.bn(self.second(self, x))

    assert not trace(Block(lambda block, x: x), images(1)).batchnorm_of
    assert trace(Block(lambda block, x: block.other(x)), images(1)).batchnorm_of == {"conv": "bn", "other": "bn"}


def test_a_model_without_layers_is_refused():
    with pytest.raises(Qwt2Error, match="Flatten runs no Linear or Conv2d layer"):
        trace(nn.Flatten(), images(1))


def test_tracing_leaves_no_mark():
    model = BUILDERS["resnet"]().train()
    model.layer1.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    trace(model, images(2))
    assert model.training and not model.layer1.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_blocks_and_units():
    layers = ["stem", "layers.0.a", "layers.0.b", "layers.1.blocks.0.a", "layers.1.blocks.0.b", "layers.1.down", "head"]
    assert find_blocks(nn.Identity(), layers) == ["layers.0", "layers.1.blocks.0"]
    assert execution_units(layers, ["layers.0", "layers.1.blocks.0"]) == [
        "stem", "layers.0", "layers.1.blocks.0", "layers.1.down", "head",
    ]  # fmt: skip
    with pytest.raises(Qwt2Error, match="'tail' holds no quantized layer"):
        execution_units(layers, ["tail"])
    with pytest.raises(Qwt2Error, match="'layers.1' holds another block"):
        execution_units(layers, ["layers.1", "layers.1.blocks.0"])


def test_what_is_added_to_a_convolution_is_quantized_and_the_convolution_not_twice():
    model = randomize(ResNet(BasicBlock, layers=(2, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=5))
    expected = outputs(model, images(4))
    qmodel = qwt2.quantize(model, images(8).split(4), "percentile")
    # The other blocks add two convolutions (the stem's, behind its pooling, is one), with quantizers at their outputs.
    assert qmodel.quantization.additions == ["layer1.1.add1"]
    addition = qmodel.get_submodule("layer1.1.add1")
    assert addition.a_quantizer is None and addition.b_quantizer.grid.bits == 8
    with full_precision(qmodel):
        assert torch.allclose(outputs(qmodel, images(4)), expected, atol=2e-5)


def test_openvino_rounds_what_is_added_and_clips_the_convolution_in_whose_kernel_it_is():
    model = randomize(ResNet(BasicBlock, layers=(2, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=5))
    qmodel = qwt2.quantize(model, images(8).split(4), "percentile", variant="openvino")
    info = qmodel.quantization
    assert all(qmodel.get_submodule(name).output_quantizer is None for name in info.layers)
    assert info.additions == ["layer1.0.add1", "layer1.1.add1", "layer2.0.add1", "layer3.0.add1", "layer4.0.add1"]
    for name in info.additions:  # y += shortcut(x), and y is a convolution's output
        addition = qmodel.get_submodule(name)
        assert not addition.a_quantizer.rounds and addition.b_quantizer.rounds
    x = torch.linspace(-100, 100, 999)
    low, high = addition.a_quantizer(x).aminmax()
    step = addition.a_quantizer.scale
    assert torch.equal(addition.a_quantizer(x), x.clamp(low, high)) and torch.isclose(high - low, 255 * step)


def test_of_two_convolutions_openvino_adds_in_the_kernel_of_the_first_operand():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 30)

        def forward(self, x):
            a = self.a(x)
            return self.c(torch.relu(self.b(x) + a)).flatten(1)

    qmodel = qwt2.quantize(randomize(Swapped()), images(8).split(4), "percentile", variant="openvino")
    assert not qmodel.add1.a_quantizer.rounds and qmodel.add1.b_quantizer.rounds


def test_published_variants_leave_additions_alone():
    qmodel = qwt2.quantize(BUILDERS["resnet"](), images(8).split(4), "percentile", variant="published")
    assert not qmodel.quantization.additions and not qmodel.quantization.poolings


class Pooled(nn.Module):
    """A convolution, activated, perhaps added to another, pooled, and perhaps read by something else too."""

    def __init__(self, adds: bool, activation: nn.Module, reads_again: bool):
        super().__init__()
        self.a, self.b, self.adds, self.reads_again = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), adds, reads_again
        self.act, self.pool, self.fc = activation, nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        y = self.act(self.a(x) + self.b(x) if self.adds else self.a(x))
        z = self.pool(y)
        if self.reads_again:
            z = z * y.amax((2, 3), keepdim=True)
        return self.fc(z.flatten(1))


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("activation, read", [(nn.ReLU(), True), (nn.ReLU(inplace=True), True), (nn.Identity(), True), (nn.GELU(), False)])
@pytest.mark.parametrize("reads_again", [False, True])
def test_openvino_quantizes_what_a_pooling_alone_reads_of_a_convolution(adds, activation, read, reads_again):
    model = randomize(Pooled(adds, activation, reads_again))
    expected = outputs(model, images(4))
    qmodel = qwt2.quantize(model, images(8).split(4), "minmax", variant="openvino")
    assert qmodel.quantization.poolings == (["pool"] if read and not reads_again else [])
    assert not qwt2.quantize(model, images(8).split(4), "minmax").quantization.poolings
    with full_precision(qmodel):
        assert torch.allclose(outputs(qmodel, images(4)), expected, atol=2e-5)
    if qmodel.quantization.poolings:
        seen = []
        qmodel.pool.pooling.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        qmodel(images(4))
        quantizer = qmodel.pool.input_quantizer
        codes = seen[0] / quantizer.scale
        assert torch.allclose(codes, codes.round(), atol=1e-3) and codes.unique().numel() <= 256
        assert torch.allclose(outputs(qwt2.fold(qmodel), images(4)), outputs(qmodel, images(4)), atol=1e-4)
