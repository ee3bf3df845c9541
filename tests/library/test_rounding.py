"""Rows of layers, rounding with error feedback and the ridge regression, against plain float64 computations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qwt2
from qwt2.compensation.methods.refit import moments, refitted
from qwt2.compensation.moments import Moments
from qwt2.quantization.info import quantized_layers
from qwt2.quantization.layers import QuantizedConv2d, QuantizedLinear
from qwt2.quantization.methods.erq import reduce_activation_error, reduce_weight_error
from qwt2.quantization.observers import Grid
from qwt2.quantization.quantizers import UniformQuantizer
from qwt2.quantization.regression import Regression
from qwt2.quantization.rounding import Feedback
from qwt2.quantization.rows import rows, weight_rows
from tests.support import tiny_models as tiny
from tests.support.golden_data import arrays
from tests.support.oracles import full_precision_copy

LAYERS = {
    "linear": (nn.Linear(6, 5), (4, 3, 6)),
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (5, 4, 7, 6)),
    "strided": (nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (5, 4, 8, 9)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (5, 6, 6, 6)),
    "depthwise": (nn.Conv2d(6, 12, 3, padding=1, groups=6), (5, 6, 6, 6)),
}


def quantized_layer(layer: nn.Module):
    kind = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedConv2d
    return kind(layer, UniformQuantizer(Grid(8), "minmax"), UniformQuantizer(Grid(4, True), "minmax", 0))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_is_the_product_of_its_rows(name, monkeypatch):
    layer, shape = quantized_layer(LAYERS[name][0]), LAYERS[name][1]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = layer.op(x, layer.weight, None)
    for limit in (2**24, 1):  # all images together, and one at a time
        monkeypatch.setattr("qwt2.quantization.rows._VALUES", limit)
        parts = list(rows(layer, x, y))
        assert len(parts) == (shape[0] if limit == 1 and name != "linear" else 1)
        for inputs, outputs in parts:
            torch.testing.assert_close(inputs @ weight_rows(layer, layer.weight).transpose(1, 2), outputs)
        assert sum(outputs.numel() for _, outputs in parts) == y.numel()


def optimal_brain_rounding(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, grid: Grid, damping: float):
    """OBQ's step for each input, the largest diagonal first, with the inverse of what is left computed anew."""
    weight, left = weight.astype(np.float64).copy(), list(np.argsort(-np.diag(gram), kind="stable"))
    gram = gram + damping * np.diag(gram).mean() * np.eye(len(gram))
    codes = np.empty_like(weight)
    while left:
        q = left[0]
        inverse = np.linalg.inv(gram[np.ix_(left, left)])
        codes[:, q] = np.clip(np.rint(weight[:, q] / scale), grid.qmin, grid.qmax)
        error = weight[:, q] - codes[:, q] * scale
        weight[:, left] -= np.outer(error, inverse[0]) / inverse[0, 0]
        left = left[1:]
    return codes


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 12), st.sampled_from([2, 4, 8]))
def test_rounding_follows_the_steps_of_obq(seed, groups, outputs, inputs, bits):
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(groups, outputs, inputs))
    x = generator.normal(size=(groups, 40, inputs)) @ generator.normal(size=(groups, inputs, inputs))
    gram, grid = np.swapaxes(x, 1, 2) @ x, Grid(bits, symmetric=True)
    scale = np.abs(weight).max(2, keepdims=True) / grid.qmax
    found = Feedback(torch.from_numpy(gram)).rounded(
        torch.from_numpy(weight), torch.from_numpy(scale), torch.zeros(1), grid
    )
    for g in range(groups):
        expected = optimal_brain_rounding(weight[g], gram[g], scale[g, :, 0], grid, 0.01)
        np.testing.assert_array_equal(found[g].numpy(), expected)


def test_feedback_across_blocks_of_inputs_follows_the_steps_too():
    generator = np.random.default_rng(1)
    weight, x = generator.normal(size=(1, 4, 150)), generator.normal(size=(1, 300, 150))
    x[:, :, 7] = 0  # an input that is always zero
    gram, grid = np.swapaxes(x, 1, 2) @ x, Grid(3, symmetric=True)
    scale = np.abs(weight).max(2, keepdims=True) / grid.qmax
    found = Feedback(torch.from_numpy(gram)).rounded(
        torch.from_numpy(weight), torch.from_numpy(scale), torch.zeros(1), grid
    )
    expected = optimal_brain_rounding(weight[0], gram[0], scale[0, :, 0], grid, 0.01)
    assert (found[0].numpy() != expected).mean() < 0.01  # ties
    error = [float(np.square((weight[0] - q * scale[0]) @ x[0].T).sum()) for q in (found[0].numpy(), expected)]
    nearest = np.clip(np.rint(weight[0] / scale[0]), grid.qmin, grid.qmax)
    assert error[0] == pytest.approx(error[1], rel=0.02)
    assert error[0] < 0.8 * np.square((weight[0] - nearest * scale[0]) @ x[0].T).sum()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 8), st.sampled_from([0.01, 0.3, 5.0]))
def test_the_regression_is_ridge_regression_towards_the_weight(seed, groups, outputs, inputs, ridge):
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(groups, outputs, inputs))
    x, y = generator.normal(1, 1, (groups, 60, inputs)), generator.normal(2, 3, (groups, 60, outputs))
    halves = [Regression.of(torch.from_numpy(x[:, p]), torch.from_numpy(y[:, p])) for p in (slice(25), slice(25, 60))]
    sums = halves[0] + halves[1]
    found = refitted(torch.from_numpy(weight), sums, ridge).numpy()
    for g in range(groups):
        a, b = x[g] - x[g].mean(0), y[g] - y[g].mean(0)
        pull = np.sqrt(ridge * np.square(a).sum(0).mean()) * np.eye(inputs)
        change = np.linalg.lstsq(np.concatenate([a, pull]), np.concatenate([b - a @ weight[g].T, 0 * pull[:, :1].repeat(outputs, 1)]), rcond=None)[0]  # fmt: skip
        np.testing.assert_allclose(found[g], weight[g] + change.T, rtol=1e-7, atol=1e-9)
        expected = Moments.of(torch.from_numpy(x[g] @ weight[g].T), torch.from_numpy(y[g]), -1)
        mine = moments(sums, torch.from_numpy(weight))
        for name in ("mean_q", "mean_f", "var_q", "var_f", "cov"):
            of_group = getattr(mine, name).reshape(groups, outputs)[g]
            torch.testing.assert_close(of_group, getattr(expected, name), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("problem", ["small", "large"])
class TestVectors:
    """The codes and weights that the authors' public code gives."""

    def read(self, problem: str) -> dict:
        prefix = f"{problem}_"
        found = {name: array for name, array in arrays("e_rounding").items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): torch.from_numpy(array).double() for name, array in found.items()}

    @pytest.mark.parametrize("method", ["gptq", "gptaq"])
    def test_gptq_and_gptaq(self, problem, method):
        known = self.read(problem)
        x, grid = known["quantized"], Grid(int(known["bits"]), symmetric=True)
        cross = 0.25 * (known["exact"] - x).T @ x if method == "gptaq" else torch.zeros(x.shape[1], x.shape[1])
        scale = known["scale"][None, :, None]
        feedback = Feedback((x.T @ x)[None], None if method == "gptq" else cross[None])
        found = feedback.rounded(known["weight"][None], scale, torch.zeros(1), grid) * scale
        torch.testing.assert_close(found[0], known[method], rtol=0, atol=1e-9)

    def test_erq(self, problem):
        known = self.read(problem)
        a = torch.cat([known["quantized"], torch.ones_like(known["quantized"][:, :1])], 1)
        weight = torch.cat([known["weight"], known["bias"][:, None]], 1)
        y = known["exact"] @ known["weight"].T + known["bias"]
        fitted = reduce_activation_error(weight, a.T @ a, a.T @ y, ridge=20.0)
        torch.testing.assert_close(fitted, known["erq_activation"], rtol=1e-9, atol=1e-9)
        scale, grid = known["scale"][:, None], Grid(int(known["bits"]), symmetric=True)
        codes, bias = reduce_weight_error(fitted, a.T @ a, len(a), scale, torch.zeros(1), grid, ridge=20.0)
        torch.testing.assert_close(codes * scale, known["erq"][:, :-1], rtol=0, atol=1e-9)
        torch.testing.assert_close(bias, known["erq"][:, -1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["gptq", "gptaq", "erq"])
@pytest.mark.parametrize("name", ["vit", "resnet", "mobilenet"])
@torch.no_grad()
def test_methods_bring_the_network_closer_than_rounding_to_nearest(name, method):
    """On images that were not calibrated on, with the float network unchanged."""
    images, errors = tiny.images(32, 5), {}
    captured = tiny.captured(tiny.BUILDERS[name])
    for ptq in ("percentile", method):
        qmodel = qwt2.quantize(captured, tiny.batches(64, 16), ptq, qwt2.Precision(3, 8))
        torch.testing.assert_close(full_precision_copy(qmodel)(images), captured(images), rtol=1e-4, atol=1e-4)
        errors[ptq] = float((qmodel(images) - captured(images)).square().sum())
    assert errors[method] < errors["percentile"]
    assert all(layer.codes is not None for layer in quantized_layers(qmodel).values())
    qwt2.fold(qmodel)


@torch.no_grad()
def test_gptq_uses_all_calibration_images():
    batches = tiny.batches(16, 4)
    some, every = (qwt2.quantize(tiny.captured(tiny.vit), part, "gptq", qwt2.Precision(3, 8), observer_images=4) for part in (batches[:1], batches))
    first, second = (quantized_layers(qmodel)["blocks.1.mlp.fc1"] for qmodel in (some, every))
    assert not torch.equal(first.codes, second.codes)
    assert torch.equal(*(quantized_layers(qmodel)["patch_embed.proj"].input_quantizer.scale for qmodel in (some, every)))
