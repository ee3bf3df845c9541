"""`qwt2.quantize`: what it makes of models it has never seen, and what it refuses."""

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import qwt2
from qwt2.errors import Qwt2Error
from qwt2.quantization.info import quantized_layers
from qwt2.quantization.layers import QuantizedMatmul, full_precision
from qwt2.quantization.methods import PTQ_METHODS
from tests.support.tiny_models import BUILDERS, captured, images, mlp, quantized, randomize, vit

ALL_BITS = [(w, a) for w in range(2, 9) for a in range(3, 9)]


def logits(model: nn.Module, count: int = 8) -> torch.Tensor:
    with torch.no_grad():
        return model(images(count, seed=1))


@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.parametrize("method", PTQ_METHODS.names())
def test_every_layer_and_product_is_quantized(name, method, short_learning):
    check_quantized_whole(BUILDERS[name], method)


@pytest.mark.slow
def test_learning_for_as_many_steps_as_by_default_quantizes_every_layer_and_product():
    check_quantized_whole(functools.partial(vit, depth=1), "brecq")


def check_quantized_whole(build: Callable[[], nn.Module], method: str) -> None:
    model, graph = build(), captured(build)
    original = copy.deepcopy(graph.state_dict())
    qmodel = qwt2.quantize(graph, [images()], method)
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert sorted(qmodel.quantization.layers) == sorted(layers)
    assert not qmodel.quantization.float_modules
    products = [n for n, m in qmodel.named_modules() if isinstance(m, QuantizedMatmul)]
    assert products == qmodel.quantization.matmuls
    error = (logits(qmodel) - logits(model)).norm() / logits(model).norm()
    assert 0 < error < 0.2  # random weights; a dozen roundings to 8 bits
    with full_precision(qmodel):
        assert torch.allclose(logits(qmodel), logits(model), atol=1e-4)
    assert all(torch.equal(v, original[k]) for k, v in graph.state_dict().items())  # a copy was quantized


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("weight_bits, activation_bits", ALL_BITS)
def test_any_mix_of_bits(name, weight_bits, activation_bits):
    qmodel = quantized(name, weight_bits, activation_bits)
    assert torch.isfinite(logits(qmodel)).all()
    edges = qmodel.quantization.first_last_layers
    assert edges
    for layer_name, layer in quantized_layers(qmodel).items():
        bits = (8, 8) if layer_name in edges else (weight_bits, activation_bits)
        assert (layer.weight_quantizer.grid.bits, layer.input_quantizer.grid.bits) == bits
        codes = layer.weight_quantizer.codes(layer.weight)
        assert int(codes.abs().max()) <= 2 ** (bits[0] - 1)


@pytest.mark.parametrize("first_last_bits, expected", [(None, 4), (6, 6)])
def test_bits_of_the_first_and_the_last_layer(first_last_bits, expected):
    precision = qwt2.Precision(weight_bits=4, activation_bits=4, first_last_bits=first_last_bits)
    qmodel = qwt2.quantize(captured(BUILDERS["vit"]), [images()], "minmax", precision)
    for name in ("patch_embed.proj", "head"):
        assert qmodel.get_submodule(name).weight_quantizer.grid.bits == expected
    assert qmodel.blocks[0].mlp.fc1.weight_quantizer.grid.bits == 4


@pytest.mark.parametrize("name", list(BUILDERS))
def test_more_bits_are_never_much_worse(name):
    exact = logits(BUILDERS[name]())
    errors = [float((logits(quantized(name, bits, bits)) - exact).norm()) for bits in (3, 4, 6, 8)]
    assert all(after < before for before, after in zip(errors, errors[1:]))
    assert errors[-1] < 0.4 * errors[0]


def test_the_first_images_alone_choose_the_ranges_whatever_the_batches():
    model, x = captured(BUILDERS["swin"]), images(16)
    whole = qwt2.quantize(model, [x], observer_images=8)
    pieces = qwt2.quantize(model, [(x[:3], None), (x[3:7], None), (x[7:], None)], observer_images=8)
    assert all(torch.equal(v, pieces.state_dict()[k]) for k, v in whole.state_dict().items())
    other = qwt2.quantize(model, [x.flip(0)], observer_images=8)
    assert any(not torch.equal(v, other.state_dict()[k]) for k, v in whole.state_dict().items())


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_reparameterisation_keeps_the_float_function(name):
    """RepQ-ViT moves scales between LayerNorm and Linear; the float network must not change."""
    model = BUILDERS[name]()
    qmodel = qwt2.quantize(captured(BUILDERS[name]), [images()], "repq", qwt2.Precision(4, 4))
    norm = next(n for n in qmodel.quantization.norm_consumers)
    assert not torch.equal(qmodel.get_submodule(norm).weight, model.get_submodule(norm).weight)
    with full_precision(qmodel):
        assert torch.allclose(logits(qmodel), logits(model), atol=2e-5)
    for layer in quantized_layers(qmodel).values():
        assert layer.input_quantizer.channel_axis is None  # one scale a tensor is left


@pytest.mark.parametrize("method", ["repq", "percentile"])
def test_published_methods_run_in_simulation_only(method):
    assert PTQ_METHODS.get(method).recipe.exportable
    assert not PTQ_METHODS.get(f"{method}_published").recipe.exportable
    with pytest.raises(Qwt2Error, match=f"{method}_published runs in simulation only; leave out target='openvino'"):
        qwt2.quantize(mlp(), [images()], f"{method}_published", target="openvino")


def test_unknown_targets_are_refused_with_the_known_ones():
    with pytest.raises(Qwt2Error, match="unknown target 'coreml'; use one of: portable, openvino, tensorrt"):
        qwt2.quantize(mlp(), [images()], target="coreml")


def test_shared_layers_and_layers_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared, self.head = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.stem(x).flatten(2).transpose(1, 2)
            return self.head(self.shared(torch.relu(self.shared(x))).mean(1))

    model = randomize(Twice())
    qmodel = qwt2.quantize(model, [images()])
    assert (logits(qmodel) - logits(model)).norm() < 0.1 * logits(model).norm()


def test_what_stays_in_float_is_reported():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 2, 3, padding=1)

        def forward(self, x):
            return self.conv(x[:, None])

    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), Block(), nn.Flatten(), nn.Linear(128, 3))
    qmodel = qwt2.quantize(randomize(model), [images()])
    info = qmodel.quantization
    assert info.float_modules == {"2.conv": "conv3d stays in float"} and info.layers == ["0", "4"]
    # 64 output pixels and 2 channels of 27 products each, beside what the two layers multiply.
    assert info.float_macs == {"2.conv": 2 * 64 * 27} and info.total_macs == 2 * 64 * 27 + 16 * 4 * 192 + 128 * 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"weight_bits": 1}, "weight_bits is 1; use a whole number from 2 to 8"),
        ({"weight_bits": 9}, "weight_bits is 9"),
        ({"activation_bits": 2}, "activation_bits is 2; use a whole number from 3 to 8"),
        ({"activation_bits": 4.0}, "activation_bits is 4.0"),
        ({"weight_bits": True}, "weight_bits is True"),
        ({"first_last_bits": 0}, "first_last_bits is 0"),
        ({"softmax_bits": 16}, "softmax_bits is 16"),
    ],
)
def test_bits_out_of_range_are_refused(settings, message):
    with pytest.raises(Qwt2Error, match=message):
        qwt2.Precision(**settings)


def half(model):
    return model.half()


def poison(value):
    def change(model):
        with torch.no_grad():
            model[3][1].fc1.weight[0] = value
        return model

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (half, r"2.weight is torch.float16; convert the model with model.float\(\)"),
        (poison(math.nan), "3.1.fc1.weight holds NaN or infinity; load a sound checkpoint"),
        (poison(math.inf), "3.1.fc1.weight holds NaN or infinity"),
        (poison(3e38), "3.1.fc2.input_quantizer: saw NaN or infinity in calibration"),
    ],
)
def test_models_that_cannot_be_quantized_are_refused(change, message):
    with pytest.raises(Qwt2Error, match=message):
        qwt2.quantize(change(mlp()), [images() * 10])


NAN_IMAGE = images(4)
NAN_IMAGE[2, 0, 5, 5] = math.nan


@pytest.mark.parametrize(
    "calibration, message",
    [
        ([], "calibration set is empty; give at least one batch"),
        ([torch.zeros(0, 3, 32, 32)], "calibration batch is empty"),
        ([images(2), torch.zeros(2, 3, 24, 24)], r"differ in image shape \[\(3, 24, 24\), \(3, 32, 32\)\]; resize"),
        ([{"images": images(2)}], "calibration batch is a dict; give tensors"),
        ([torch.tensor(1.0)], "calibration batch is a Tensor"),
        ([images(2).double()], r"images are torch.float64; convert them to float32"),
        ([images(2).to("meta")], r"images are on meta, but 2.weight is on cpu; move one to the other"),
        ([torch.zeros(2, 5, 32, 32)], r"Sequential cannot run on \{'images': \(2, 5, 32, 32\)\} \(.*\); give images as it takes them"),
        ([NAN_IMAGE], "2.input_quantizer: saw NaN or infinity in calibration"),
    ],
)
def test_bad_calibration_sets_are_refused(calibration, message):
    with pytest.raises(Qwt2Error, match=message):
        qwt2.quantize(mlp(), calibration)


def test_unknown_methods_are_refused_with_the_known_ones():
    with pytest.raises(Qwt2Error, match="adaround.*repq"):
        qwt2.quantize(mlp(), [images()], "adaround")


def test_a_float_model_is_no_quantized_model():
    with pytest.raises(Qwt2Error, match="Sequential is not a quantized model; call qwt2.quantize"):
        qwt2.compensate(mlp(), [images()])
