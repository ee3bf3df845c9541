"""Which modules are quantized, with how many bits, and what each costs at the network's output."""

import json
import math
from functools import partial

import pytest
import timm
import torch
from torch import nn

import qwt2
from qwt2.errors import Qwt2Error
from qwt2.folding.layers import IntegerLinear
from qwt2.quantization.layers import QuantizedMatmul, QuantizedModule
from qwt2.quantization.request import matches
from tests.support import tiny_models as tiny

W4A4 = qwt2.Precision(4, 4)


def captured(name):
    return tiny.captured(tiny.BUILDERS[name])


def quantize(name="vit", **options):
    return qwt2.quantize(captured(name), tiny.batches(), **options)


@pytest.mark.parametrize(
    "name, pattern, expected",
    [
        ("blocks.0.mlp.fc1", "blocks.0", True),
        ("blocks.0.mlp.fc1", "blocks.*.mlp", True),
        ("blocks.0.mlp.fc1", "*.fc1", True),
        ("blocks.0.mlp.fc1", "fc1", False),
        ("blocks.10.mlp.fc1", "blocks.1", False),
        ("head", "head", True),
    ],
)
def test_a_name_stands_for_all_that_the_module_holds(name, pattern, expected):
    assert matches(name, pattern) == expected


def test_what_is_excluded_stays_float_and_is_listed_with_its_share():
    qmodel = quantize(exclude=["blocks.0.mlp", "*.matmul1"])
    info = qmodel.quantization
    assert set(info.float_modules) == {
        "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.0.attn.matmul1", "blocks.1.attn.matmul1"
    }  # fmt: skip
    assert set(info.float_modules.values()) == {"was excluded"}
    assert info.float_macs["blocks.0.mlp.fc1"] == 17 * 16 * 64  # tokens, width, hidden
    assert type(qmodel.get_submodule("blocks.0.mlp.fc1")) is nn.Linear
    assert "blocks.0.mlp.fc1" not in info.layers and "blocks.1.mlp.fc1" in info.layers


def test_modules_have_bits_of_their_own_and_the_last_entry_wins():
    qmodel = quantize(bits={"blocks": qwt2.Precision(4, 6), "*.qkv": qwt2.Precision(3, 5), "head": qwt2.Precision(2, 7)})
    found = {
        name: (layer.weight_quantizer.grid.bits, layer.input_quantizer.grid.bits)
        for name, layer in ((name, qmodel.get_submodule(name)) for name in qmodel.quantization.layers)
    }
    assert found["patch_embed.proj"] == (8, 8) and found["head"] == (2, 7)
    assert found["blocks.0.attn.qkv"] == (3, 5) and found["blocks.1.mlp.fc2"] == (4, 6)
    assert qmodel.get_submodule("blocks.0.attn.matmul1").a_quantizer.grid.bits == 6


def test_it_is_stored_with_the_model(tmp_path):
    qmodel = quantize(exclude=["blocks.1"], bits={"*.fc1": W4A4})
    qwt2.save_quantized(qmodel, tmp_path / "a.safetensors")
    loaded = qwt2.load_quantized(tiny.BUILDERS["vit"](), tmp_path / "a.safetensors")
    assert loaded.quantization == qmodel.quantization
    with torch.no_grad():
        assert torch.equal(loaded(tiny.images()), qmodel(tiny.images()))
    json.dumps(qmodel.quantization.to_dict())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"exclude": ["blcks.0"]}, "exclude: 'blcks.0' matches no module that can be quantized; near names are: blocks.0"),
        ({"bits": {"blocks.7.*": W4A4}}, "bits: 'blocks.7.\\*' matches no module"),
        ({"exclude": ["*"]}, "every layer of VisionTransformer is excluded"),
    ],
)
def test_patterns_that_match_nothing_are_refused_with_near_names(options, message):
    with pytest.raises(Qwt2Error, match=message):
        quantize(**options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_costs_are_what_each_module_alone_costs(name):
    """Against the network with one quantized module at a time: first order is close where the error is small."""
    model, batches = captured(name), tiny.batches()
    precision = qwt2.Precision(6, 6)
    costs = qwt2.sensitivity(model, batches, precision=precision)
    qmodel = qwt2.quantize(model, batches, precision=precision)
    images = torch.cat(batches)[:16]
    modules = {name: qmodel.get_submodule(name) for name in qmodel.calls(QuantizedModule)}
    assert {cost.module for cost in costs} == set(qmodel.quantization.modules)
    with qwt2.full_precision(qmodel), torch.no_grad():
        exact = qmodel(images).double()
        spread = (exact - exact.mean(0)).square().sum()
        for cost in costs:
            modules[cost.module].quantized = True
            error = float((qmodel(images).double() - exact).square().sum() / spread)
            modules[cost.module].quantized = False
            assert abs(cost.sqnr_db + 10 * math.log10(error)) < 4  # three random directions on 16 images
    assert [cost.error for cost in costs] == sorted((cost.error for cost in costs), reverse=True)


def test_costs_take_at_most_ten_forward_passes():
    from torch.utils.flop_counter import FlopCounterMode

    model, batches = captured("vit"), tiny.batches()
    qmodel = qwt2.quantize(model, batches)
    from qwt2.quantization.sensitivity import output_errors, small_batches

    pieces = small_batches(batches, 16)
    with FlopCounterMode(display=False) as one, torch.no_grad(), qwt2.full_precision(qmodel):
        for piece in pieces:
            qmodel(piece)
    with FlopCounterMode(display=False) as whole:
        output_errors(qmodel, pieces)
    assert whole.get_total_flops() <= 10 * one.get_total_flops()


@pytest.mark.slow
def test_a_budget_is_kept_and_spent_on_what_costs_most():
    model, batches = captured("vit"), tiny.batches()
    low = qwt2.allocate(model, batches, precision=W4A4, weight_bytes=10**9)
    count = low.weight_bytes // 1  # all modules at 8 bits: a byte per weight
    some = qwt2.allocate(model, batches, precision=W4A4, weight_bytes=int(0.75 * count))
    assert some.weight_bytes <= 0.75 * count and 0 < len(some.moves) < len(some.bits)
    qmodel = qwt2.quantize(model, batches, **some.settings)
    bits = {n: qmodel.get_submodule(n).weight_quantizer.grid.bits for n in qmodel.quantization.layers}
    stored = sum(qmodel.get_submodule(n).weight.numel() * b for n, b in bits.items()) / 8
    assert stored == some.weight_bytes
    with pytest.raises(Qwt2Error, match="weight_bytes=10 is less than"):
        qwt2.allocate(model, batches, weight_bytes=10)


@pytest.mark.slow
def test_a_target_is_reached_with_the_fewest_moves():
    model, batches = captured("resnet"), tiny.batches()
    found = qwt2.allocate(model, batches, "percentile", W4A4, sqnr_db=15.0)
    images = torch.cat(batches)
    with torch.no_grad():
        exact = model(images).double()
        error = qwt2.quantize(model, batches, "percentile", **found.settings)(images).double() - exact
    reached = 10 * math.log10(float((exact - exact.mean(0)).square().sum() / error.square().sum()))
    assert reached >= 15 and reached == pytest.approx(found.sqnr_db, abs=1e-6)
    assert 0 < len(found.moves) < len(found.bits)
    with pytest.raises(Qwt2Error, match="sqnr_db reaches .* with all but one module in float, not 300"):
        qwt2.allocate(model, batches, "percentile", sqnr_db=300.0)
    with pytest.raises(Qwt2Error, match="2 goals are given"):
        qwt2.allocate(model, batches, sqnr_db=10.0, agreement=90.0)


@pytest.mark.slow
@torch.no_grad()
def test_a_folded_module_that_differs_stays_in_float_and_is_listed(monkeypatch, tmp_path):
    from qwt2.folding import fold as folding

    def wrong(factor, layer):
        integer = IntegerLinear(layer)
        if integer.weight.shape == (16, 64):  # blocks.0.mlp.fc1 and blocks.1.mlp.fc1
            integer.weight_scale *= factor
        return integer

    qmodel = quantize()
    qwt2.compensate(qmodel, tiny.batches())
    sound = qwt2.fold(qmodel)
    for factor in (1.1, math.nan):
        monkeypatch.setattr(folding, "IntegerLinear", partial(wrong, factor))
        with pytest.warns(UserWarning, match="fc1 stays in float: its folded form differs by .* output steps"):
            folded = qwt2.fold(qmodel)
        layers = ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
        assert list(folded.quantization.float_modules) == layers and not qmodel.quantization.float_modules
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
        layer = qmodel.get_submodule(layers[0])
        assert torch.equal(folded.get_submodule(layers[0])(x), nn.functional.linear(x, layer.weight, layer.bias))
        images = tiny.batches()[0]
        assert (folded(images) - sound(images)).norm() < 0.1 * sound(images).norm()
    qwt2.export_onnx(folded, tmp_path / "model.onnx", images)  # an engine agrees
    twin = qwt2.load_engine(tmp_path / "model.onnx", "onnxruntime")(images.numpy())
    assert (torch.from_numpy(twin) - folded(images)).norm() < 0.02 * sound(images).norm()


class Shifted(nn.Module):
    """A convolution whose outputs lie around a large mean, which its BatchNorm removes; another, sound one before it."""

    def __init__(self, mean):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        tiny.randomize(self)
        with torch.no_grad():
            self.second.bias += mean
            self.norm2.running_mean += mean

    def forward(self, x):
        x = self.norm1(self.first(x)).relu()
        return self.fc(self.norm2(self.second(x)).relu().mean((2, 3)))


@pytest.mark.slow
@torch.no_grad()
def test_a_layer_that_loses_precision_with_its_batchnorm_folded_stays_in_float(tmp_path):
    assert not qwt2.quantize(Shifted(0), tiny.batches(), "percentile").quantization.float_modules
    model = Shifted(1e6)
    qmodel = qwt2.quantize(model, tiny.batches(), "percentile")
    info = qmodel.quantization
    assert info.float_modules == {"second": "computes something else once it is rewritten, with its quantizers off"}
    assert info.layers == ["first", "fc"] and 0 < info.float_macs["second"] < info.total_macs
    x = tiny.batches()[1]
    assert (qmodel(x) - model(x)).norm() < 0.1 * model(x).norm()
    qwt2.save_quantized(qmodel, tmp_path / "stored.safetensors")
    assert torch.equal(qwt2.load_quantized(model, tmp_path / "stored.safetensors")(x), qmodel(x))
    qwt2.compensate(qmodel, tiny.batches())
    folded = qwt2.fold(qmodel)
    qwt2.export_onnx(folded, tmp_path / "model.onnx", x)
    found = torch.from_numpy(qwt2.load_engine(tmp_path / "model.onnx", "onnxruntime")(x.numpy()))
    assert (found - folded(x)).norm() < 0.02 * folded(x).norm()


@pytest.mark.slow
@torch.no_grad()
def test_modules_that_are_wrong_for_another_reason_stay_in_float_and_others_are_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedMatmul, "full_precision", lambda self, a, b: 1.01 * (a @ b))
        info = quantize().quantization
    assert list(info.float_modules) == [f"blocks.{i}.attn.matmul{j}" for i in (0, 1) for j in (1, 2)] and not info.matmuls
    damage = lambda model, kept: model.get_submodule("norm").weight.mul_(torch.linspace(1, 2, 16))  # noqa: E731
    monkeypatch.setattr("qwt2.quantization.quantize.fold_batchnorms", damage)
    with pytest.raises(Qwt2Error, match="quantizers off, first in norm, a defect"):
        quantize()


class Best(nn.Module):
    """The features of the four best positions, of which many are almost equally good."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Linear(8, 5)
        tiny.randomize(self)

    def forward(self, x):
        y = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        scores = (y.sum(-1) * 1e6).sin()  # rounding decides
        best = scores.topk(4, dim=1).indices
        return self.fc(y.gather(1, best[..., None].expand(-1, -1, 8)))


@torch.no_grad()
def test_a_network_that_turns_rounding_into_other_outputs_is_not_refused(tmp_path):
    model, x = Best(), tiny.batches()[0]
    qmodel = qwt2.quantize(model, tiny.batches(), "percentile")
    with qwt2.full_precision(qmodel):
        assert (qmodel(x) - model(x)).norm() > 0.1 * model(x).norm()
    assert not qmodel.quantization.float_modules
    qwt2.export_onnx(qwt2.fold(qmodel), tmp_path / "model.onnx", x)
    assert (tmp_path / "model.onnx").exists()


def test_a_norm_of_pooled_values_gets_no_ranges_per_channel():
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5, global_pool="avg"
    )
    qmodel = qwt2.quantize(tiny.randomize(model), tiny.batches(), "repq")
    assert qmodel.quantization.norm_consumers == {
        "blocks.0.norm1": ["blocks.0.attn.qkv"], "blocks.0.norm2": ["blocks.0.mlp.fc1"]
    }  # fmt: skip
