"""Folding against a float64 evaluation of alpha * y_q + beta, written from the definition in numpy."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qwt2
from qwt2.compensation.blocks import compensated_blocks
from qwt2.evaluation.mismatch import Mismatch, fold_mismatch
from qwt2.folding.layers import IntegerConv2d, IntegerLayer, IntegerLinear, IntegerMatmul
from qwt2.quantization.layers import QuantizedConv2d, QuantizedLinear, QuantizedModule
from qwt2.quantization.observers import Grid
from qwt2.quantization.quantizers import LogSqrt2Quantizer, Quantizer, UniformQuantizer
from tests.support import tiny_models as tiny

ALPHAS = [1.0, 0.5, 1.03, 0.9, -0.7, -1.0, 0.0, 1e-7, -1e-7, 1e-35, 1e3]
BETAS = [0.0, 0.1, -1.0, 1e-5, 30.0, 1e6, -1e9]


@st.composite
def layers(draw):
    """A calibrated quantized Linear or Conv2d with a compensation (or none), and an input for it."""
    seed = draw(st.integers(0, 10_000))
    weight_bits, activation_bits = draw(st.integers(2, 8)), draw(st.integers(3, 8))
    has_bias, axis = draw(st.booleans()), draw(st.sampled_from([0, None]))
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        module, kind = nn.Linear(draw(st.integers(1, 24)), draw(st.integers(1, 6)), has_bias), QuantizedLinear
        shape = (*draw(st.sampled_from([(4,), (2, 3), (2, 2, 3)])), module.in_features)
    else:
        groups = draw(st.sampled_from([1, 2, 3]))
        channels_in, channels_out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 2))
        kernel, stride, dilation = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
        module = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, dilation, groups, has_bias)
        kind, shape = QuantizedConv2d, (2, channels_in, 7, 6)
    module.requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = draw(st.sampled_from([1.0, 50.0])) * (torch.randn(shape, generator=generator) + draw(st.sampled_from([0.0, 2.0])))
    weight_grid = Grid(weight_bits, symmetric=True, narrow=weight_bits == 8)
    layer = kind(
        module, UniformQuantizer(Grid(activation_bits), "minmax"), UniformQuantizer(weight_grid, "minmax", axis),
        integer_bias=draw(st.booleans()),
    )  # fmt: skip
    layer.calibrate_on(x)
    if draw(st.booleans()):
        count = layer.out_channels
        alpha = draw(st.lists(st.sampled_from(ALPHAS), min_size=count, max_size=count))
        beta = draw(st.lists(st.sampled_from(BETAS), min_size=count, max_size=count))
        layer.set_compensation(torch.tensor(alpha), torch.tensor(beta))
    return layer, x


def integer(layer) -> IntegerLayer:
    return IntegerConv2d(layer) if isinstance(layer, QuantizedConv2d) else IntegerLinear(layer)


def on_grid(x: torch.Tensor, quantizer: UniformQuantizer) -> torch.Tensor:
    """The quantized values in float64, from the definition."""
    scale, zero = quantizer.parameters_for(x)
    codes = np.clip(np.rint((x / scale).numpy()) + zero.numpy(), quantizer.grid.qmin, quantizer.grid.qmax)
    return torch.from_numpy((codes - zero.numpy()) * scale.double().numpy())


class Exact:
    """What a layer should compute, in float64, and how far an integer engine may be from it.

    Attributes:
        y: alpha * op(Q(x), Q(w)) + (alpha * bias + beta).
        bound: half a unit of the bias' grid, what rounding codes to a coarser scale may lose, and float32 rounding.
        step: one output step: an 8-bit step of the output's range (which always holds zero), or a unit of the
            accumulator where that is larger. (Folding switches channels off that alpha scales below 1e-30.)
    """

    def __init__(self, layer, x: torch.Tensor, folded: IntegerLayer):
        xq, wq = on_grid(x, layer.input_quantizer), on_grid(layer.weight, layer.weight_quantizer)
        ones = torch.ones(layer.out_channels, dtype=torch.float64)
        alpha, beta = (ones, 0 * ones) if layer.alpha is None else (layer.alpha.double(), layer.beta.double())
        bias = alpha * (0 if layer.bias is None else layer.bias.double()) + beta

        def shaped(values):
            return values.reshape([-1 if axis == layer.channel_axis % x.dim() else 1 for axis in range(x.dim())])

        self.bias = bias
        self.y = shaped(alpha) * layer.op(xq, wq, None) + shaped(bias)
        self.range = float(self.y.clamp(min=0).max() - self.y.clamp(max=0).min())
        s_x = layer.input_quantizer.scale.double()
        s_w = layer.weight_quantizer.scale.double().expand(layer.out_channels)
        grid = s_x * folded.weight_scale.double()
        # Where a bias does not fit into int32 the codes are rounded to a scale of |bias| / 2^30 / s_x.
        coarsened = folded.weight_scale.double() > 1.0001 * alpha.abs() * s_w
        lost_a_code = torch.where(coarsened, grid / 2, 0.0)
        terms = layer.op(xq.abs(), wq.abs(), None)
        codes = layer.op(xq.abs() / s_x, torch.ones_like(wq), None)
        magnitude = shaped(alpha.abs()) * terms + shaped(bias.abs())
        self.bound = shaped(0.51 * grid) + shaped(lost_a_code) * codes + 40 * 2**-24 * magnitude
        self.step = max(self.range / 255, float((s_x * alpha.abs().clamp(min=1e-30) * s_w).max()))


class TestFoldLayer:
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(layers())
    def test_equals_the_float64_evaluation(self, case):
        layer, x = case
        folded = integer(layer)
        exact = Exact(layer, x, folded)
        error = (folded(x).double() - exact.y).abs()
        assert bool((error <= exact.bound).all()), float((error / exact.bound).max())
        assert float(error.max()) <= exact.step

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(layers())
    def test_equals_the_simulation(self, case):
        layer, x = case
        folded = integer(layer)
        exact = Exact(layer, x, folded)
        # Both round: each is within its bound of the exact value.
        assert bool(((layer(x) - folded(x)).abs() <= 2 * exact.bound).all())

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(layers())
    def test_codes_stay_inside_their_types(self, case):
        layer, x = case
        folded = integer(layer)
        assert folded.weight.dtype == torch.int8 and folded.bias.dtype == torch.int32
        assert int(folded.weight.to(torch.int32).abs().max()) <= 127
        # The accumulator, bias included, fits into int32 for up to 2^30 / (127 * 255) = 33,000 products.
        assert int(folded.bias.to(torch.int64).abs().max()) <= 2**30
        assert torch.isfinite(folded.weight_scale).all() and bool((folded.weight_scale > 0).all())
        assert torch.equal(folded.bias_scale, layer.input_quantizer.scale * folded.weight_scale)
        assert not folded.weight_zero_point.any() and not folded.bias_zero_point.any()

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(layers())
    def test_leaves_the_layer_as_it_was(self, case):
        layer, x = case
        before, y = copy.deepcopy(layer.state_dict()), layer(x)
        integer(layer)(x)
        after = layer.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
        assert torch.equal(layer(x), y)

    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("alpha", [None, 1.0, -1.0, 0.25, -8.0])
    def test_powers_of_two_are_exact(self, bits, alpha):
        layer, x = linear(weight_bits=bits)
        factor = 1.0
        if alpha is not None:
            factor = alpha
            layer.set_compensation(torch.full((5,), alpha), torch.zeros(5))
        folded = integer(layer)
        weight = folded.weight.t() * folded.weight_scale[:, None]
        assert torch.equal(weight, factor * layer.weight_quantizer(layer.weight))

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_other_factors_change_the_scale_alone(self, bits):
        layer, _ = linear(weight_bits=bits)
        plain = integer(layer)
        alpha = torch.tensor([1.1, -1.1, 0.3, 1e-3, 123.0])
        layer.set_compensation(alpha, torch.zeros(5))
        folded = integer(layer)
        assert torch.equal(folded.weight, plain.weight * alpha.sign().to(torch.int8))
        torch.testing.assert_close(folded.weight_scale, plain.weight_scale * alpha.abs(), rtol=2e-7, atol=0)

    def test_alpha_zero_leaves_beta(self):
        layer, x = linear()
        layer.set_compensation(torch.zeros(5), torch.tensor([0.0, 1.0, -2.0, 1e6, 1e-3]))
        folded = integer(layer)
        assert not folded.weight.any()
        torch.testing.assert_close(folded(x), layer.beta.expand(4, 5), rtol=1e-6, atol=1e-9)

    def test_low_bit_codes_leave_room_for_a_fine_bias(self):
        """A 2-bit layer's own bias grid would be 32 times as coarse as needed."""
        layer, x = linear(weight_bits=2)
        folded = integer(layer)
        assert float(folded.bias_scale.max()) <= float(layer.input_quantizer.scale * layer.weight_quantizer.scale.max()) / 32 * 1.001

    def test_output_quantizer_is_kept(self):
        layer, x = linear()
        layer.output_quantizer = UniformQuantizer(Grid(8), "minmax")
        expected = layer.calibrate_on(x)
        torch.testing.assert_close(integer(layer)(x), expected, rtol=0, atol=1.01 * float(layer.output_quantizer.scale))
        assert integer(layer)(100 * x).max() <= expected.max() + layer.output_quantizer.scale


def linear(weight_bits: int = 8, bias: bool = False) -> tuple[QuantizedLinear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(7, 5, bias).requires_grad_(False)
    module.weight.copy_(torch.randn(5, 7, generator=generator))
    grid = Grid(weight_bits, symmetric=True, narrow=weight_bits == 8)
    layer = QuantizedLinear(module, UniformQuantizer(Grid(8), "minmax"), UniformQuantizer(grid, "minmax", 0))
    x = torch.randn(4, 7, generator=generator)
    layer.calibrate_on(x)
    return layer, x


class TestFold:
    @pytest.mark.parametrize("bits", [8, 4, 3])
    @pytest.mark.parametrize("name", tiny.BUILDERS)
    @pytest.mark.parametrize("method", [None, "cwac"])
    def test_every_module_within_one_step_of_the_simulation(self, name, bits, method):
        qmodel = tiny.quantized(name, bits, bits)
        if method:
            qwt2.compensate(qmodel, tiny.batches(), method, gate="none")
        mismatch = fold_mismatch(qmodel, qwt2.fold(qmodel), tiny.images(8, 1))
        assert list(mismatch) == qmodel.quantization.layers
        worst = Mismatch.worst(list(mismatch.values()))
        assert worst.steps <= 1.01 and worst.fraction <= 1e-3

    @torch.no_grad()
    @pytest.mark.parametrize("name", tiny.BUILDERS)
    def test_replaces_every_quantized_module_and_touches_nothing_else(self, name):
        qmodel = tiny.quantized(name)
        qwt2.compensate(qmodel, tiny.batches(8))
        info, before, y = qmodel.quantization, copy.deepcopy(qmodel.state_dict()), qmodel(tiny.images(2))
        folded = qwt2.fold(qmodel)
        for layer in info.layers:
            kind = IntegerConv2d if isinstance(qmodel.get_submodule(layer), QuantizedConv2d) else IntegerLinear
            assert type(folded.get_submodule(layer)) is kind
        assert all(isinstance(folded.get_submodule(m), IntegerMatmul) for m in info.matmuls)
        assert not any(isinstance(m, (QuantizedModule, Quantizer)) for m in folded.modules())
        folded(tiny.images(2))
        after = qmodel.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
        assert torch.equal(qmodel(tiny.images(2)), y)
        shared = {t.data_ptr() for t in qmodel.state_dict().values() if t.numel()}
        assert not shared & {t.data_ptr() for t in folded.state_dict().values() if t.numel()}

    @torch.no_grad()
    @pytest.mark.parametrize("name", tiny.BUILDERS)
    def test_whole_network_at_8_bits(self, name):
        """Roundings that fall differently move 8-bit logits a little, a wrong layer moves them a lot."""
        qmodel = tiny.quantized(name, 8, 8)
        qwt2.compensate(qmodel, tiny.batches(), gate="none")
        expected, y = qmodel(tiny.images(8, 1)), qwt2.fold(qmodel)(tiny.images(8, 1))
        assert float((y - expected).norm() / expected.norm()) < 0.02

    @torch.no_grad()
    def test_two_layers_with_one_bias_tensor(self):
        model = tiny.mlp(2)
        model[3][1].fc2.bias = model[3][0].fc2.bias
        qmodel = qwt2.quantize(model, [tiny.images()], "minmax")
        first, second = (qmodel.get_submodule(f"3.{i}.fc2") for i in (0, 1))
        assert torch.equal(first.bias, second.bias)
        first.set_compensation(torch.full((12,), 2.0), torch.ones(12))
        second.set_compensation(torch.full((12,), -0.5), torch.zeros(12))
        shared = first.bias.clone()
        folded = qwt2.fold(qmodel)
        assert torch.equal(first.bias, shared) and torch.equal(model[3][0].fc2.bias, shared)
        for name, bias in (("3.0.fc2", 2 * shared + 1), ("3.1.fc2", -0.5 * shared)):
            layer = folded.get_submodule(name)
            error = (layer.bias * layer.bias_scale - bias).abs()
            assert bool((error <= 0.51 * layer.bias_scale).all()), name

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["vit", "resnet"])
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_qwt_layers_stay_beside_their_blocks(self, name, dtype):
        qmodel = tiny.quantized(name, 8, 8)
        qwt2.compensate(qmodel, tiny.batches(), "qwt", dtype=dtype)
        folded = qwt2.fold(qmodel)
        assert compensated_blocks(qmodel)
        for block in compensated_blocks(qmodel):
            assert folded.get_submodule(f"{block}.compensation").weight.dtype == getattr(torch, dtype)
        expected, y = qmodel(tiny.images(8, 1)), folded(tiny.images(8, 1))
        assert float((y - expected).norm() / expected.norm()) < 0.02


class TestRefusals:
    """What integer engines do not have is named in one sentence."""

    def refused(self, qmodel: nn.Module, name: str, reason: str) -> None:
        with pytest.raises(qwt2.Qwt2Error) as error:
            qwt2.fold(qmodel)
        message = str(error.value)
        assert message.startswith(name + ": ") and reason in message and "\n" not in message and len(message) < 200

    def test_log_sqrt2_softmax(self):
        qmodel = tiny.quantized("vit")
        attention = qmodel.blocks[1].attn
        attention.matmul2.a_quantizer = LogSqrt2Quantizer(4)
        attention.matmul2.a_quantizer(torch.rand(10))
        self.refused(qmodel, "blocks.1.attn.matmul2.a_quantizer", "log-sqrt2")

    @pytest.mark.parametrize("name", ["vit", "resnet"])
    def test_published_methods(self, name):
        qmodel = tiny.quantized(name, published=True)
        assert not qmodel.quantization.exportable
        with pytest.raises(qwt2.Qwt2Error, match="quantize with another method"):
            qwt2.fold(qmodel)

    def test_fractional_zero_point(self):
        qmodel = tiny.quantized("vit")
        qmodel.head.input_quantizer.zero_point = torch.tensor(3.5)
        self.refused(qmodel, "head.input_quantizer", "fractional")

    @pytest.mark.parametrize("zero_point", [-1.0, 256.0])
    def test_zero_point_outside_the_codes(self, zero_point):
        qmodel = tiny.quantized("vit")
        qmodel.head.input_quantizer.zero_point = torch.tensor(zero_point)
        self.refused(qmodel, "head.input_quantizer", "outside its codes")

    def test_asymmetric_weights(self):
        qmodel = tiny.quantized("vit")
        layer = qmodel.blocks[0].mlp.fc1
        layer.weight_quantizer = UniformQuantizer(Grid(4), "minmax", 0)
        layer.weight_quantizer(layer.weight)
        self.refused(qmodel, "blocks.0.mlp.fc1.weight_quantizer", "zero point")

    def test_input_with_one_scale_a_channel(self):
        qmodel = tiny.quantized("vit")
        quantizer = qmodel.blocks[0].mlp.fc2.input_quantizer
        quantizer.set_parameters(quantizer.scale.expand(64), quantizer.zero_point.expand(64), -1)
        self.refused(qmodel, "blocks.0.mlp.fc2.input_quantizer", "one scale per channel")

    def test_block_compensation(self):
        qmodel = tiny.quantized("vit")
        qwt2.compensate(qmodel, tiny.batches(), "cwac", granularity="block", gate="none")
        self.refused(qmodel, "blocks.0.compensation", "granularity='module'")

    def test_a_float_model(self):
        with pytest.raises(qwt2.Qwt2Error, match="not a quantized model"):
            qwt2.fold(tiny.vit())
