"""Capturing: the graph computes what the model computes, is called as the model is, and knows who reads what."""

import copy
import functools
import inspect
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import qwt2
from qwt2.capture import wiring
from qwt2.capture.blocks import check_blocks, find_blocks
from qwt2.capture.check import check_captured
from qwt2.capture.export import capture
from qwt2.capture.graph import GraphModel
from qwt2.capture.normalise import fold_batchnorms
from qwt2.errors import Qwt2Error
from qwt2.quantization.layers import QuantizedModule, full_precision
from tests.support.graphs import ATOL, Calling, assert_same, operations
from tests.support.tiny_models import BUILDERS, captured, dense, images, mlp, pyramid, randomize


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


class Tokens(nn.Module):
    """Images to 16 tokens of width 8, through `layer`, and back to one row per image."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, 8, 8, 8), layer, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


def captured_tokens(forward, **parts) -> GraphModel:
    model = randomize(Tokens(Calling(forward, **parts)))
    graph = capture(model, images(2))
    assert_same(graph, model, images(5))
    return graph


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


def by_einsum(q, k, v, mask):
    return torch.einsum("bhlm,bmhd->bhld", torch.einsum("bhld,bhmd->bhlm", q, k).softmax(-1), v.transpose(1, 2))


def masked_afterwards(q, k, v, mask):
    return (q @ k.transpose(-2, -1)).softmax(-1).masked_fill(~mask, 0) @ v


def additive(q):
    return torch.linspace(-1, 1, 16).expand(16, 16)


def boolean(q):
    return torch.ones(16, 16, dtype=torch.bool).tril()


def of_the_values(q):
    """A mask that is known only when the images are: some keys are padding."""
    return (q.mean((1, 3)) > 0)[:, None, None, :]


@pytest.mark.parametrize("product, mask", [(by_hand, None), (by_hand, additive), (fused, None), (fused, additive), (fused, boolean),
                                           (fused_scaled, boolean), (by_einsum, None), (fused, of_the_values),
                                           (masked_afterwards, boolean)])  # fmt: skip
def test_attention_is_found_whatever_way_it_is_written(product, mask):
    model = randomize(Tokens(Attention(product, mask)))
    graph = capture(model, images(2))
    assert_same(graph, model, images(4), atol=1e-6)
    assert list(graph.calls(wiring.Product)) == ["layer.matmul1", "layer.matmul2"] and not wiring.float_operations(graph)
    assert wiring.softmax_products(graph) == {"layer.matmul2"}
    qmodel = qwt2.quantize(graph, images(8).split(4))
    assert qmodel.quantization.matmuls == ["layer.matmul1", "layer.matmul2"]
    with full_precision(qmodel):
        assert torch.allclose(outputs(qmodel, images(4)), outputs(model, images(4)), atol=1e-6)


NETWORKS = [*BUILDERS.values(), dense, pyramid]


@pytest.mark.slow
@pytest.mark.parametrize("build, captured_with", [*((build, 1) for build in NETWORKS), (mlp, 2), (mlp, 3)])
def test_whole_networks_keep_their_function_for_any_number_of_images(build, captured_with):
    model = build()
    expected = outputs(model, images(4))
    graph = capture(model, images(captured_with))
    for count in (1, 2, 7):
        assert_same(graph, model, images(count))
    graph.edit(fold_batchnorms)
    assert_same(graph, model, images(4))
    assert not any("batch_norm" in operation for operation in operations(graph))
    assert len(graph.calls(wiring.Product)) == {"vit": 4, "swin": 6}.get(build.__name__, 0)
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert sorted(wiring.layers(graph)) == sorted(layers) and not wiring.float_operations(graph)
    assert torch.equal(outputs(model, images(4)), expected)  # the original is as it was


# How a captured model is called.


class TwoInputs(nn.Module):
    def __init__(self, function, **layers):
        super().__init__()
        self.conv, self.embed, self.fc, self.function = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(4, 8), nn.Linear(16, 5), function

    def forward(self, image, meta, flip=False):
        x = torch.cat([self.conv(image.flip(-1) if flip else image).mean((2, 3)), self.embed(meta)], 1)
        return self.function(self.fc(x), x)


def named_inputs(count: int) -> dict[str, torch.Tensor]:
    return {"image": images(count), "meta": torch.randn(count, 4, generator=torch.Generator().manual_seed(2))}


def test_a_model_is_called_by_position_and_by_keyword():
    model = randomize(TwoInputs(lambda y, x: y))
    graph = capture(model, named_inputs(2))
    image, meta = named_inputs(5).values()
    expected = outputs(lambda x: model(x, meta), image)
    for found in (graph(image, meta), graph(image, meta=meta), graph(meta=meta, image=image), graph(image, meta, False)):
        assert torch.equal(found, expected)
    assert list(inspect.signature(graph.forward).parameters) == ["image", "meta", "flip"]


@functools.cache
def two_inputs() -> GraphModel:
    return capture(randomize(TwoInputs(lambda y, x: y)), named_inputs(2))


@pytest.mark.parametrize("arguments, named", [((1,), {}), ((1, 2, True), {}), ((1, 2, 3, 4), {}), ((1, 2), {"other": 1}), ((1, None), {})])
def test_calls_of_another_kind_are_refused(arguments, named):
    """What the graph was not captured for would be computed as if it had not been asked for."""
    graph = two_inputs()
    image, meta = named_inputs(2).values()
    values = {1: image, 2: meta}
    with pytest.raises(Qwt2Error, match="captured"):
        graph(*(values.get(a, a) if not isinstance(a, bool) else a for a in arguments), **named)


def test_the_same_tensor_may_be_given_for_two_inputs():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, a, b):
            return self.a(a) - 2 * self.b(b)

    model, x, y = randomize(Sum()), torch.randn(2, 4), torch.randn(2, 4)
    for example in ({"a": x, "b": x}, {"b": x, "a": x}):
        assert_same(capture(model, example), model, {"a": x, "b": y})


def test_named_inputs_may_come_in_any_order():
    model = randomize(TwoInputs(lambda y, x: y))
    inputs = dict(reversed(named_inputs(5).items()))
    for graph in (capture(model, inputs), capture(model, named_inputs(2))):
        assert_same(graph, model, inputs)
        assert_same(graph, model, named_inputs(4))
    qmodel = qwt2.quantize(graph, [inputs, named_inputs(4)])
    assert torch.equal(outputs(lambda x: qmodel(**x), inputs), outputs(lambda x: qmodel(**x), named_inputs(5)))


Pair = namedtuple("Pair", "logits features")


@dataclass
class Result:
    logits: torch.Tensor
    features: torch.Tensor


torch.export.register_dataclass(Result, serialized_type_name="tests.Result")


@pytest.mark.parametrize(
    "pack",
    [
        lambda y, x: (y, x), lambda y, x: [y, (x, x + 1)], lambda y, x: {"logits": y, "features": [x]}, lambda y, x: Pair(y, x), Result,
        lambda y, x: OrderedDict(b=y, a=x), lambda y, x: (y, None, 3, "name"), lambda y, x: (y, y), lambda y, x: [y],
    ],
)  # fmt: skip
def test_outputs_have_the_kind_that_the_model_gives(pack):
    model, inputs = randomize(TwoInputs(pack)), named_inputs(5)
    graph = capture(model, named_inputs(2))
    assert_same(graph, model, inputs)
    with torch.no_grad():
        assert type(graph(**inputs)) is type(model(**inputs))
    qmodel = qwt2.quantize(graph, [inputs])
    assert type(qmodel(**inputs)) is type(model(**inputs)) and qmodel.quantization.layers == ["conv", "embed", "fc"]


def test_a_parameter_that_is_an_output_is_given_as_it_is():
    model = randomize(Calling(lambda self, x: (self.fc(x), self.fc.weight, x), fc=nn.Linear(4, 3)))
    assert_same(capture(model, torch.randn(2, 4)), model, torch.randn(5, 4))


def test_the_number_of_images_may_be_asked_for_as_a_length():
    """`len(x)` is a Python number, so that the graph would take batches of one size only."""

    def forward(self, x):
        start = torch.zeros(len(x), 8).unsqueeze(1)
        return self.fc(torch.cat([start, x], 1)).reshape(len(x), -1, 8) / len(self.fc.weight)

    captured_tokens(forward, fc=nn.Linear(8, 8))


def test_a_fixed_number_of_images_is_refused():
    model = Tokens(Calling(lambda self, x: self.fc(x).reshape(2, -1, 8), fc=nn.Linear(8, 8)))
    with pytest.raises(Qwt2Error, match="takes the number of images for a constant") as error:
        capture(model, images(2))
    assert "\n" not in str(error.value)


def convnet() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2), nn.AdaptiveAvgPool2d(1)]
    return randomize(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5)))


@pytest.mark.slow
@pytest.mark.parametrize("build", [convnet, pyramid])
def test_images_of_another_size_are_computed_as_the_model_does(build):
    model = build()
    graph = capture(model, images(2))
    graph.edit(fold_batchnorms)
    for size in ((48, 48), (32, 64), (32, 32), (48, 48)):
        x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
        expected = outputs(model, x)
        torch.testing.assert_close(outputs(graph, x), expected, rtol=1e-4, atol=ATOL)
    assert len(graph.other_sizes.graphs) == 2
    x = torch.randn(3, 3, 48, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(outputs(copy.deepcopy(graph), x), outputs(model, x), rtol=1e-4, atol=ATOL)


def test_images_of_another_size_run_the_same_quantized_modules():
    model = convnet()
    qmodel = qwt2.quantize(model, images(8).split(4), "minmax")
    x = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with full_precision(qmodel):
        torch.testing.assert_close(outputs(qmodel, x), outputs(model, x), rtol=1e-4, atol=ATOL)
    quantized = outputs(qmodel, x)
    assert 0 < (quantized - outputs(model, x)).norm() < 0.1 * outputs(model, x).norm()
    other = qmodel.of_size([x])
    assert other is not qmodel and other is qmodel.of_size([x])
    assert all(other.get_submodule(n) is m for n, m in qmodel.named_modules() if isinstance(m, QuantizedModule))
    qmodel.quantization = None
    with torch.no_grad():
        qmodel.get_submodule("0").input_quantizer.scale.mul_(30)
    assert not torch.allclose(outputs(qmodel, x), quantized)


# What models do besides calling layers.


def assert_quantizes(model: nn.Module, inputs=None, layers: int | None = None) -> nn.Module:
    """Captured, folded and quantized it is the same function; returns the quantized model."""
    inputs = images(6) if inputs is None else inputs
    graph = capture(model, {n: t[:2] for n, t in inputs.items()} if isinstance(inputs, dict) else inputs[:2])
    assert_same(graph, model, inputs)
    qmodel = qwt2.quantize(graph, [inputs], "minmax")
    graph.edit(fold_batchnorms)
    assert_same(graph, model, inputs)
    with full_precision(qmodel):
        assert_same(qmodel, model, inputs)
    assert not qmodel.quantization.float_modules and layers in (None, len(qmodel.quantization.layers))
    return qmodel


def test_layers_and_functions_called_by_keyword():
    def forward(self, x):
        return self.fc(input=torch.relu(input=self.conv(input=x)).mean(dim=(2, 3)))

    assert_quantizes(randomize(Calling(forward, conv=nn.Conv2d(3, 8, 3, 2, 1), fc=nn.Linear(8, 5))), layers=2)


def test_a_transposed_convolution_that_is_told_its_output_size():
    def forward(self, x):
        y = self.up(torch.relu(self.down(x)), output_size=x.shape[-2:])
        return self.head(torch.cat([torch.relu(y), x], 1))

    parts = {"down": nn.Conv2d(3, 8, 3, 2, 1), "up": nn.ConvTranspose2d(8, 8, 2, 2), "head": nn.Conv2d(11, 4, 3, padding=1)}
    assert_quantizes(randomize(Calling(forward, **parts)), layers=3)


def test_a_decoder_that_uses_the_encoder_s_weight():
    """RepQ-ViT changes the encoder's weight when it moves scales into it; the decoder must not see that."""

    def forward(self, x):
        x = F.pixel_unshuffle(x, 4).flatten(2).transpose(1, 2)
        return F.linear(torch.relu(self.fc(self.norm(x))), self.fc.weight.t())

    model = randomize(Calling(forward, norm=nn.LayerNorm(48), fc=nn.Linear(48, 16)))
    with torch.no_grad():
        model.norm.weight.copy_(torch.logspace(-1, 1, 48))
    assert_quantizes(model, layers=2)
    qmodel = qwt2.quantize(model, [images(6)], "repq")
    assert qmodel.quantization.norm_consumers == {"norm": ["fc"]}
    with full_precision(qmodel):
        assert_same(qmodel, model, images(6))


def test_convolutions_with_kernels_of_other_kinds():
    """A buffer's, a parameter's that is no layer's, and one of a subclass that computes its own."""

    class Standardized(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias, self.stride)

    class Wrapped(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    def forward(self, x):
        x = F.conv2d(F.pad(self.b(self.a(x)), (1, 1, 1, 1), mode="reflect"), self.blur, stride=2, groups=4)
        return F.conv2d(x, self.kernel, padding=1).mean((2, 3))

    parts = {"a": Standardized(3, 4, 4, 4), "b": Wrapped(4, 4, 1), "blur": torch.ones(4, 1, 3, 3) / 9, "kernel": nn.Parameter(torch.zeros(5, 4, 3, 3))}
    model = randomize(Calling(forward, **parts))
    qmodel = assert_quantizes(model, layers=4)
    assert qmodel.quantization.layers == ["a", "b", "conv2d1", "conv2d2"]
    torch.testing.assert_close(qmodel.a.weight, model.a.weight - model.a.weight.mean())


def test_inputs_cast_to_a_weight_s_type_and_sizes_asked_of_layers():
    def forward(self, x):
        x = F.max_pool2d(self.conv(x.to(self.conv.weight.dtype)), self.conv.stride[0])
        return self.fc(self.norm(x.reshape(-1, self.fc.in_features)).to(self.fc.weight.dtype))

    assert_quantizes(randomize(Calling(forward, conv=nn.Conv2d(3, 8, 3, 2, 1), norm=nn.LayerNorm(512), fc=nn.Linear(512, 5))), layers=2)


def test_subclasses_of_attention_with_a_forward_of_their_own():
    class SelfAttention(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    assert len(assert_quantizes(randomize(Tokens(SelfAttention(8, 2, batch_first=True)))).quantization.matmuls) == 2


@pytest.mark.slow
def test_a_decoder_with_learned_queries_and_a_causal_mask():
    def forward(self, x):
        target = self.queries.weight[None].expand(x.shape[0], -1, -1)
        return self.decoder(target, x, tgt_mask=torch.ones(6, 6, dtype=torch.bool).triu(1))

    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.1, batch_first=True), 2)
    model = randomize(Tokens(Calling(forward, queries=nn.Embedding(6, 8), decoder=decoder)))
    assert len(assert_quantizes(model).quantization.matmuls) == 8


def test_values_written_in_place_are_values_of_their_own():
    """A mask token over some of a LayerNorm's output: what reads it reads more than the LayerNorm."""

    def forward(self, x):
        y = self.norm(x)
        y[:, :8] = self.token
        y[:, 8:] *= 0.5
        return self.fc(y).relu_().add_(1.0)

    graph = captured_tokens(forward, norm=nn.LayerNorm(8), fc=nn.Linear(8, 8), token=nn.Parameter(torch.zeros(8)))
    assert not wiring.norm_consumers(graph)


def test_inputs_are_not_written_to():
    model = Calling(lambda self, x: self.fc(x.mul_(2)), fc=nn.Linear(4, 3))
    try:
        graph = capture(model, torch.ones(2, 4))
    except Qwt2Error:
        return
    x = torch.ones(3, 4)
    torch.testing.assert_close(graph(x), model(torch.ones(3, 4)))
    assert torch.equal(x, torch.ones(3, 4))


def test_one_module_called_twice_with_other_arguments():
    def attention(self, x, sharpness=1.0, mirrored=False):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(torch.softmax(q @ k.transpose(-2, -1) * sharpness, dim=-1) @ (v.flip(1) if mirrored else v))

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        forward = attention

    def forward(self, x):
        x = x + self.attention(x, 0.1)
        return x + self.attention(x, sharpness=8.0, mirrored=True)

    model = randomize(Tokens(Calling(forward, attention=Shared())))
    qmodel = assert_quantizes(model, layers=5)
    calls = {name: len(own) for name, own in qmodel.calls(QuantizedModule).items() if "attention" in name}
    once = [f"layer.attention.{name}{call}" for call in ("", "_repeat1") for name in ("matmul1", "matmul2", "proj")]
    assert calls == {"layer.attention.qkv": 2} | dict.fromkeys(once, 1)  # copies of qkv would be large in this model
    assert qmodel.quantization.repeated == ["layer.attention.qkv"]
    assert {*qmodel.quantization.matmuls} == {name for name in once if "matmul" in name}


def test_modules_under_two_names_are_one():
    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).relu()
        return x

    one, two = nn.Linear(8, 8), nn.Linear(8, 8)
    model = randomize(Tokens(Calling(forward, layers=nn.ModuleList([one, two, one]))))
    qmodel = assert_quantizes(model, layers=5)
    assert [name for name in qmodel.quantization.layers if name.startswith("layer")] == [
        "layer.layers.0", "layer.layers.1", "layer.layers.0_repeat1",
    ]  # fmt: skip


def test_products_with_parameters_that_are_no_layer_s():
    def forward(self, x):
        x = F.gelu(torch.mm(self.stem(x).flatten(2).mean(2), self.w))
        x = F.normalize(x @ self.u.t(), dim=-1)
        return torch.mm(x, F.normalize(self.prototypes, dim=-1).t()) * 10

    parts = {"w": (16, 16), "u": (32, 16), "prototypes": (5, 32)}
    model = Calling(forward, stem=nn.Conv2d(3, 16, 8, 8), **{n: nn.Parameter(torch.zeros(s)) for n, s in parts.items()})
    qmodel = assert_quantizes(randomize(model), layers=4)
    assert qmodel.quantization.layers == ["stem", "linear1", "linear2", "linear3"]


def test_batches_by_name_may_hold_labels():
    model = randomize(TwoInputs(lambda y, x: y))
    with pytest.warns(UserWarning, match="label, which the model does not take"):
        qmodel = qwt2.quantize(model, [named_inputs(4) | {"label": torch.zeros(4, dtype=torch.long)}], "minmax")
    assert qmodel.quantization.layers == ["conv", "embed", "fc"]
    assert_quantizes(model, named_inputs(6), layers=3)


def parametrized(kind: str) -> nn.Module:
    new, spectral = torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm
    wrap = {"old weight norm": torch.nn.utils.weight_norm, "new weight norm": new, "spectral norm": spectral,
            "old spectral norm": torch.nn.utils.spectral_norm}[kind]  # fmt: skip
    return nn.Sequential(wrap(nn.Conv2d(3, 8, 3, 2, 1)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), wrap(nn.Linear(8, 5)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["old weight norm", "new weight norm", "spectral norm", "old spectral norm"])
@pytest.mark.parametrize("trained", [False, True])
def test_weights_that_are_computed_are_constants(kind, trained):
    torch.manual_seed(0)
    model = parametrized(kind)
    if trained:  # the first run in training mode changes what spectral norm knows
        model(images(2))
    model.eval().requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qmodel = assert_quantizes(model, layers=2)
    assert qmodel.quantization.layers == ["0", "4"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_hooks_are_part_of_the_function():
    model = convnet()
    model[0].register_forward_pre_hook(lambda module, args: ((args[0] - 0.5) / 0.25,))
    model[4].register_forward_hook(lambda module, args, output: output * 3 + 1)
    assert_quantizes(model, layers=3)


def test_capturing_leaves_no_mark():
    model = BUILDERS["resnet"]().train()
    model.layer1.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    graph = capture(model, images(2))
    assert model.training and not model.layer1.training and not graph.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.zero_()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())  # nothing is shared


# What is refused.


def branches(self, x):
    y = self.fc(x)
    if y.sum() > 0:
        return y
    return -y


def leaves_early(self, x):
    for _ in range(int(x.abs().max())):
        x = self.fc(x)
    return x


@pytest.mark.parametrize("forward, line", [(branches, 2), (leaves_early, 1)])
def test_control_flow_on_values_is_refused_in_one_sentence_that_names_the_line(forward, line):
    """A graph holds the way that one batch took."""
    model = randomize(Tokens(Calling(forward, fc=nn.Linear(8, 8))))
    with pytest.raises(Qwt2Error, match="Tokens cannot be captured") as error:
        capture(model, images(2))
    code = forward.__code__
    assert f"{code.co_filename}:{code.co_firstlineno + line}" in str(error.value) and "\n" not in str(error.value)
    assert "branches on the values of tensors" in str(error.value)


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class AlwaysDropping(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


@pytest.mark.parametrize("module", [Noise(), AlwaysDropping()])
def test_random_numbers_in_evaluation_mode_are_refused_with_the_module_that_draws_them(module):
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), module), nn.Conv2d(8, 3, 3)))
    with pytest.raises(Qwt2Error, match=r"traced, first in 1\.1; random numbers, and branches on values, cannot be captured"):
        qwt2.quantize(model, [images(4)])


def test_a_graph_that_computes_something_else_is_found():
    model = BUILDERS["vit"]()
    graph = copy.deepcopy(captured(BUILDERS["vit"]))
    check_captured(model, graph, images(4))
    with torch.no_grad():
        graph.blocks[1].mlp.fc1.weight[0].mul_(1.5)
    with pytest.raises(Qwt2Error, match=r"first in blocks\.1\.mlp\.fc1"):
        check_captured(model, graph, images(4))


def test_buffers_written_in_evaluation_mode_are_refused():
    def forward(self, x):
        self.count += 1
        return self.fc(x) * self.count

    with pytest.raises(Qwt2Error, match="writes its buffer count in evaluation mode"):
        capture(Calling(forward, fc=nn.Linear(4, 3), count=torch.zeros(1)), torch.ones(2, 4))


def test_a_model_without_layers_is_refused():
    with pytest.raises(Qwt2Error, match="Flatten runs no Linear or Conv2d layer"):
        qwt2.quantize(nn.Flatten(), [images(2)])


def test_images_that_the_model_cannot_take_are_refused():
    with pytest.raises(Qwt2Error, match=r"Tokens cannot run on .*\(2, 5, 32, 32\).*; give images as it takes them"):
        capture(Tokens(nn.Identity()), torch.zeros(2, 5, 32, 32))


OTHER_ARITHMETIC = {
    "conv3d": lambda: Calling(lambda s, x: s.c(x[:, None])[:, 0], c=nn.Conv3d(1, 2, 3, padding=1)),
    "bilinear": lambda: Calling(lambda s, x: s.b(x, x.flip(1)), b=nn.Bilinear(8, 8, 8)),
    "gru": lambda: Calling(lambda s, x: s.r(x)[0], r=nn.GRU(8, 8, batch_first=True)),
    "lstm": lambda: Calling(lambda s, x: s.r(x)[0], r=nn.LSTM(8, 8, batch_first=True)),
    "rnn": lambda: Calling(lambda s, x: s.r(x)[0], r=nn.RNN(8, 8, batch_first=True)),
    "tensordot": lambda: Calling(lambda s, x: torch.tensordot(x, s.w, 1), w=nn.Parameter(torch.zeros(8, 8))),
    "inner": lambda: Calling(lambda s, x: torch.inner(x, s.w), w=nn.Parameter(torch.zeros(8, 8))),
    "matmul": lambda: Calling(lambda s, x: s.w @ x, w=nn.Parameter(torch.zeros(16, 16))),
    "einsum": lambda: Calling(lambda s, x: torch.einsum("bij,bij->bij", x, x)),
}


@pytest.mark.parametrize("name", OTHER_ARITHMETIC)
def test_arithmetic_that_stays_in_float_is_told_with_its_share_of_the_work(name):
    layer = OTHER_ARITHMETIC[name]()
    if name == "conv3d":
        model = nn.Sequential(Calling(lambda s, x: s.c(x[:, None]).mean((1, 2)), c=nn.Conv3d(1, 2, 3, padding=1)), nn.Linear(32, 3))
    else:
        model = Tokens(layer)
    model = randomize(model)
    qmodel = qwt2.quantize(model, [images(4)], "minmax")
    [(where, reason)] = qmodel.quantization.float_modules.items()
    assert name in reason and "stays in float" in reason and where.startswith("0" if name == "conv3d" else "layer")
    with full_precision(qmodel):
        assert_same(qmodel, model, images(4))


def test_deformable_convolutions_stay_in_float_and_are_told():
    from torchvision.ops import DeformConv2d

    def forward(self, x):
        return self.deform(x, self.offset(x)).mean((2, 3))

    model = Calling(forward, offset=nn.Conv2d(3, 18, 3, padding=1), deform=DeformConv2d(3, 4, 3, padding=1))
    qmodel = qwt2.quantize(randomize(model), [images(4)], "minmax")
    assert qmodel.quantization.float_modules == {"deform": "deform_conv2d stays in float"}


# Who reads what.


def test_wiring_of_a_transformer():
    graph = captured(BUILDERS["vit"])
    names, norms = wiring.layers(graph), wiring.norm_consumers(graph)
    assert names[0] == "patch_embed.proj" and names[-1] == "head"
    assert names[1:5] == ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    assert all(len(calls) == 1 for calls in graph.calls(wiring.LAYER_TYPES).values())
    assert list(graph.calls(wiring.Product)) == [f"blocks.{b}.attn.matmul{n}" for b in (0, 1) for n in (1, 2)]
    assert wiring.softmax_products(graph) == {"blocks.0.attn.matmul2", "blocks.1.attn.matmul2"}
    assert norms["blocks.0.norm1"] == ["blocks.0.attn.qkv"] and norms["blocks.1.norm2"] == ["blocks.1.mlp.fc1"]
    assert "norm" not in norms  # the class token is cut out between the norm and the head
    assert wiring.output_layers(graph) == {"head"} and wiring.escaping(graph) == {"patch_embed.proj"}
    assert find_blocks(graph) == ["blocks.0", "blocks.1"]


@pytest.mark.slow
def test_wiring_of_swin_finds_patch_merging_and_shifted_windows():
    graph = captured(BUILDERS["swin"])
    norms = wiring.norm_consumers(graph)
    assert norms["layers.1.downsample.norm"] == ["layers.1.downsample.reduction"]
    for block in ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"):
        assert norms[f"{block}.norm1"] == [f"{block}.attn.qkv"]
    assert find_blocks(graph) == ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]


def test_wiring_of_a_residual_network():
    graph = copy.deepcopy(captured(BUILDERS["resnet"]))
    assert "layer1.0.conv1" in wiring.escaping(graph)  # as long as a BatchNorm is between
    graph.edit(fold_batchnorms)
    escaping = wiring.escaping(graph)
    assert {"layer1.0.conv2", "layer2.0.downsample.0"} <= escaping  # read by the addition
    assert "layer1.0.conv1" not in escaping  # read, through a ReLU, by the next convolution alone
    assert wiring.layer_readers(graph)["layer1.0.conv1"] == ["layer1.0.conv2"]
    assert wiring.residual_sums(graph)["layer2.0.add1"] == ("layer2.0.conv2", "layer2.0.downsample.0")
    assert wiring.kernel_poolings(graph) == ["global_pool.pool"]


def test_multiply_accumulates_are_those_of_closed_forms():
    graph = captured(BUILDERS["vit"])
    counts = {node.target: count for node, count in wiring.multiply_accumulates(graph, images(3)).items()}
    tokens, width, heads, images_ = 17, 16, 2, 3
    assert counts["patch_embed.proj"] == images_ * 16 * width * 3 * 64 and counts["head"] == images_ * width * 5
    assert counts["blocks.0.attn.qkv"] == images_ * tokens * width * 3 * width
    assert counts["blocks.0.attn.matmul1"] == counts["blocks.1.attn.matmul2"] == images_ * heads * tokens**2 * width // heads


def residual(self, x):
    y = self.norm(x)
    return self.fc1(y) + y


def second_linear(self, x):
    y = self.norm(x)
    return self.fc1(y) + self.fc2(torch.cat([y, x], -1))


def permuted(self, x):
    return self.wide(self.norm(x).transpose(1, 2)).transpose(1, 2)


def rolled(self, x):
    return self.fc1(self.norm(x).roll(1, -1))


def merged(self, x):
    return self.fc2(self.norm(x).reshape(x.shape[0], 8, 16)).repeat(1, 2, 1)


def other_feeds(self, x):
    return self.fc1(self.norm(x)) + self.fc1(x)


def scaled(self, x):
    return self.fc1(self.norm(x) * 2)


def product(self, x):
    return self.fc1(y := self.norm(x)) + y @ y.transpose(1, 2) @ x


@pytest.mark.parametrize("reader", [residual, second_linear, permuted, rolled, merged, other_feeds, scaled, product])
def test_a_norm_that_something_else_reads_is_left_alone(reader):
    """RepQ-ViT divides a norm's weight and multiplies its readers': one that is overlooked computes something else."""
    parts = {"norm": nn.LayerNorm(8), "fc1": nn.Linear(8, 8), "fc2": nn.Linear(16, 8), "wide": nn.Linear(16, 16)}
    assert not wiring.norm_consumers(captured_tokens(reader, **parts))


def test_a_norm_s_readers_are_all_found():
    def forward(self, x):
        y = self.norm(x)
        return x + self.k(y) + self.q(y.reshape(-1, 8)).reshape(x.shape) + self.q(y.roll(3, 1))

    graph = captured_tokens(forward, norm=nn.LayerNorm(8), q=nn.Linear(8, 8), k=nn.Linear(8, 8))
    assert wiring.norm_consumers(graph) == {"layer.norm": ["layer.k", "layer.q"]}


def test_a_shared_norm_s_readers_are_those_of_all_its_calls():
    def forward(self, x):
        return self.q(self.norm(x)) + self.k(self.norm(x + 1))

    graph = captured_tokens(forward, norm=nn.LayerNorm(8), q=nn.Linear(8, 8), k=nn.Linear(8, 8))
    assert wiring.norm_consumers(graph) == {"layer.norm": ["layer.q", "layer.k"]}


class Nested(nn.Module):
    """Blocks in lists, one of them below another list's member that has more layers."""

    def __init__(self):
        super().__init__()
        pair = lambda: nn.Sequential(OrderedDict(a=nn.Linear(8, 8), act=nn.ReLU(), b=nn.Linear(8, 8)))  # noqa: E731
        stage = nn.Module()
        stage.blocks, stage.down = nn.ModuleList([pair()]), nn.Linear(8, 8)
        self.stem, self.layers, self.head = nn.Conv2d(3, 8, 8, 8), nn.ModuleList([pair(), stage]), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.layers[0](x)
        return self.head(self.layers[1].down(x + self.layers[1].blocks[0](x)).mean(1))


def test_blocks_are_the_smallest_numbered_children_with_two_layers():
    graph = capture(randomize(Nested()), images(2))
    assert find_blocks(graph) == ["layers.0", "layers.1.blocks.0"]
    assert check_blocks(graph, ["layers.1.blocks.0", "layers.0"]) == ["layers.0", "layers.1.blocks.0"]  # as they run
    for blocks, message in [
        (["tail"], "'tail' holds no quantized layer"),
        (["layers.1", "layers.1.blocks.0"], "'layers.1' holds another block"),
        (["layers"], "'layers' does not read one activation and give one"),
    ]:
        with pytest.raises(Qwt2Error, match=message):
            check_blocks(graph, blocks)


def test_a_block_that_reads_two_activations_is_none():
    def forward(self, x):
        y = self.first(x)
        return self.blocks[0](y, x) + self.blocks[1](y, y)

    def both():
        return Added(nn.Linear(8, 8), nn.Linear(8, 8))

    class Added(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.a, self.b = a, b

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    graph = captured_tokens(forward, first=nn.Linear(8, 8), blocks=nn.ModuleList([both(), both()]))
    assert find_blocks(graph) == ["layer.blocks.1"]


def deeper_resnet() -> nn.Module:
    """Two blocks in the first stage, the second of which adds what is no convolution's."""
    return randomize(ResNet(BasicBlock, layers=(2, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=5))


def test_what_is_added_to_a_convolution_is_quantized_and_the_convolution_not_twice():
    expected = outputs(deeper_resnet(), images(4))
    qmodel = qwt2.quantize(captured(deeper_resnet), images(8).split(4), "percentile")
    # The other blocks add two convolutions (the stem's, behind its pooling, is one), with quantizers at their outputs.
    assert qmodel.quantization.additions == ["layer1.1.add1"]
    addition = qmodel.get_submodule("layer1.1.add1")
    assert addition.a_quantizer is None and addition.b_quantizer.grid.bits == 8
    with full_precision(qmodel):
        assert torch.allclose(outputs(qmodel, images(4)), expected, atol=2e-5)


def test_openvino_rounds_what_is_added_and_clips_the_convolution_in_whose_kernel_it_is():
    qmodel = qwt2.quantize(captured(deeper_resnet), images(8).split(4), "percentile", target="openvino")
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

    qmodel = qwt2.quantize(randomize(Swapped()), images(8).split(4), "percentile", target="openvino")
    assert not qmodel.add1.a_quantizer.rounds and qmodel.add1.b_quantizer.rounds


def test_published_methods_leave_additions_alone():
    qmodel = qwt2.quantize(captured(BUILDERS["resnet"]), images(8).split(4), "percentile_published")
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
@pytest.mark.slow
def test_openvino_quantizes_what_a_pooling_alone_reads_of_a_convolution(adds, activation, read, reads_again):
    model = randomize(Pooled(adds, activation, reads_again))
    expected, graph = outputs(model, images(4)), capture(model, images(2))
    qmodel = qwt2.quantize(graph, images(8).split(4), "minmax", target="openvino")
    assert qmodel.quantization.poolings == (["pool"] if read and not reads_again else [])
    assert not qwt2.quantize(graph, images(8).split(4), "minmax").quantization.poolings
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


class Masked(nn.Module):
    """Blocks that read a mask beside what they work on, as text encoders do."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x, mask):
            return x + self.fc2((self.fc1(x) * mask).relu())

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, ids, mask):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, mask[..., None].float())
        return x


def test_blocks_that_read_a_mask_beside_their_activation():
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"ids": torch.randint(20, (4, 6), generator=generator), "mask": torch.ones(4, 6, dtype=torch.int64)} for _ in range(2)
    ]
    qmodel = qwt2.quantize(Masked(), batches, "minmax", qwt2.Precision(3, 4, None))
    assert qmodel.quantization.blocks == ["layers.0", "layers.1"]
    fits = qwt2.compensate(qmodel, batches, "qwt", dtype="float32").modules
    assert [fit.module for fit in fits] == ["layers.0", "layers.1"]
    assert all(fit.kept and fit.sqnr_after_db > fit.sqnr_before_db for fit in fits)
