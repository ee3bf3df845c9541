"""Learned rounding: the relaxation and its regulariser against the papers' equations, the rest on small networks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qwt2
from qwt2.capture.blocks import ends
from qwt2.capture.export import capture
from qwt2.quantization.info import quantization_info, quantized_layers
from qwt2.quantization.methods import brecq
from qwt2.quantization.observers import Grid
from qwt2.quantization.quantizers import UniformQuantizer
from qwt2.quantization.spans import span_of_block
from tests.support import tiny_models as tiny


def logits(seed: int = 0) -> torch.Tensor:
    return 6 * torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_relaxation_is_the_papers():
    v = logits().requires_grad_()
    h = brecq.relaxation(v)
    expected = np.clip(1.2 / (1 + np.exp(-v.detach().numpy())) - 0.1, 0, 1)
    np.testing.assert_allclose(h.detach().numpy(), expected, rtol=0, atol=1e-15)
    assert {0.0, 1.0} < set(h.tolist())  # the stretch reaches both ends
    h.sum().backward()
    sigmoid = 1 / (1 + np.exp(-v.detach().numpy()))
    inside = (expected > 0) & (expected < 1)
    np.testing.assert_allclose(v.grad.numpy(), np.where(inside, 1.2 * sigmoid * (1 - sigmoid), 0), rtol=0, atol=1e-15)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.floats(0, 1), st.floats(2, 20))
def test_the_regulariser_is_the_papers_and_its_inverse_starts_anywhere(share, beta):
    v = brecq.relaxed_by(torch.tensor([share], dtype=torch.float64))
    h = brecq.relaxation(v)
    assert float(h) == pytest.approx(share, abs=1e-12)
    assert float(brecq.regulariser(h, beta)) == pytest.approx(1 - abs(2 * share - 1) ** beta, abs=1e-9)


def test_the_exponent_falls_after_a_fifth_of_the_steps():
    assert brecq.annealed(0.0) is brecq.annealed(0.199) is None
    assert [brecq.annealed(t) for t in (0.2, 0.6, 1.0)] == pytest.approx([20, 11, 2])


def test_relaxed_rounding_starts_with_the_clipped_weight_and_ends_on_a_neighbour():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    quantizer = UniformQuantizer(Grid(2, symmetric=True), "mse", channel_axis=0)
    quantizer.calibrate(weight)
    rounding = brecq.RelaxedRounding(quantizer, weight)
    scale = quantizer.scale[:, None]
    torch.testing.assert_close(rounding(weight).detach(), weight.clamp(-2 * scale, scale), rtol=1e-5, atol=1e-5)
    rounding.v.data = logits()[:24].reshape(6, 4).float()
    up = np.where(rounding.v.detach().numpy() >= 0, 1, 0)
    expected = np.clip(np.floor((weight / scale).numpy()) + up, -2, 1)
    np.testing.assert_array_equal(rounding.hard_codes().numpy(), expected)


def test_dropping_keeps_the_share_and_passes_gradients_inside_the_range():
    quantizer = UniformQuantizer(Grid(3), "minmax")
    quantizer.set_parameters(torch.tensor(0.5), torch.tensor(2.0))  # from -1 to 2.5
    x = torch.linspace(-3, 4, 7001).requires_grad_()
    y = brecq.DroppingQuantizer(quantizer, 0.5, torch.Generator().manual_seed(0))(x)
    kept = y == x
    assert 0.47 < kept.float().mean() < 0.53
    torch.testing.assert_close(y[~kept], quantizer(x)[~kept], rtol=0, atol=1e-6)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (kept | ((x >= -1) & (x <= 2.5))).float())


def block_error(qmodel, exact, block: str, images: torch.Tensor) -> float:
    """Return the squared error of a block's output in the quantized network."""
    found = [model.between(model.inputs[0], [ends(model, block)[1]])(images)[0] for model in (qmodel, exact)]
    return float((found[0] - found[1]).square().sum())


def learned(model, images: torch.Tensor):
    return qwt2.quantize(model, images.split(16), "brecq", qwt2.Precision(3, 8), observer_images=16)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "block"), [("vit", "blocks.0"), ("resnet", "layer2.0")])
@torch.no_grad()
def test_blocks_come_closer_than_by_rounding_to_nearest(name, block, short_learning):
    captured, images = tiny.captured(tiny.BUILDERS[name]), tiny.images(32)
    nearest = qwt2.quantize(captured, [images], "percentile", qwt2.Precision(3, 8), observer_images=16)
    qmodel = learned(captured, images)
    assert span_of_block(qmodel, block) is not None  # learned as a whole
    assert block_error(qmodel, captured, block, images) < 0.9 * block_error(nearest, captured, block, images)
    layers = quantized_layers(qmodel)
    moves = [layer.weight_codes - layer.weight_quantizer.codes(layer.weight) for layer in layers.values()]
    assert max(int(move.abs().max()) for move in moves) == 1
    assert all(type(q) is UniformQuantizer for layer in layers.values() for q in layer.quantizers().values())
    qwt2.fold(qmodel)


class Shared(nn.Module):
    """Two blocks, of which the second reads the network's input too, and a head that runs twice."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([tiny.MLPBlock(6), tiny.MLPBlock(6)])
        self.head = nn.Linear(6, 6)

    def forward(self, x):
        y = self.blocks[1](self.blocks[0](x))
        return self.head(torch.relu(self.head(y))) + y


@torch.no_grad()
def test_a_layer_that_runs_twice_is_learned_on_both_runs_and_always_in_the_same_way(short_learning):
    model = tiny.randomize(Shared())
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    captured = capture(model, x[:2])
    nearest = qwt2.quantize(captured, [x], "percentile", qwt2.Precision(3, 8), observer_images=16)
    first, second = learned(captured, x), learned(captured, x)
    assert quantization_info(first).repeated == ["head"]
    errors = [float((qmodel(x) - model(x)).square().sum()) for qmodel in (nearest, first)]
    assert errors[1] < errors[0]
    for name, layer in quantized_layers(first).items():
        assert torch.equal(layer.codes, quantized_layers(second)[name].codes), name
