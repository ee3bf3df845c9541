"""Observers and quantizers against their definitions, on arbitrary data."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qwt2.errors import Qwt2Error
from qwt2.quantization.observers import MSE_SHRINKS, OBSERVERS, PERCENTILES, Grid, observe, quantiles
from qwt2.quantization.quantizers import LogSqrt2Quantizer, UniformQuantizer

VALUES = st.floats(-1e3, 1e3, width=32).map(lambda v: 0.0 if abs(v) < 1e-3 else v)
ROWS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24), elements=VALUES)
GRIDS = st.builds(
    Grid, bits=st.integers(2, 8), symmetric=st.booleans(), zero_in_range=st.booleans(), narrow=st.booleans(),
    centred=st.booleans(),
)  # fmt: skip
FAST = settings(max_examples=60, deadline=None)


def quantized(x: torch.Tensor, grid: Grid, observer: str):
    scale, zero_point = observe(observer, x, grid)
    return scale[:, None], zero_point[:, None], grid.fake_quantize(x, scale[:, None], zero_point[:, None])


@FAST
@given(ROWS, GRIDS, st.sampled_from(sorted(OBSERVERS)))
def test_parameters_are_usable(rows, grid, observer):
    x = torch.from_numpy(rows)
    scale, zero_point, y = quantized(x, grid, observer)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert torch.equal(zero_point, zero_point.round())
    if grid.symmetric:
        assert not zero_point.any()
    elif grid.zero_in_range:
        # An integer engine holds the zero point in one of its codes.
        assert (zero_point >= grid.qmin).all() and (zero_point <= grid.qmax).all()
        assert torch.equal(grid.fake_quantize(torch.zeros_like(x), scale, zero_point), torch.zeros_like(x))
    codes = y / scale + zero_point
    assert (codes >= grid.qmin - 1e-2).all() and (codes <= grid.qmax + 1e-2).all()
    assert torch.allclose(grid.fake_quantize(y, scale, zero_point), y, atol=float(scale.max()) * 1e-3)


@FAST
@given(ROWS, st.integers(2, 8))
def test_a_centred_grid_is_symmetric_for_both_signs_and_the_plain_one_for_one(rows, bits):
    x, centred = torch.from_numpy(rows), Grid(bits, centred=True)
    scale, zero_point = observe("minmax", x, centred)
    both = (x.amin(1) < 0) & (x.amax(1) > 0)
    assert (zero_point[both] == 2 ** (bits - 1)).all()
    torch.testing.assert_close(scale[both] * (2 ** (bits - 1) - 1), x.abs().amax(1)[both])
    plain_scale, plain_zero_point = observe("minmax", x, Grid(bits))
    assert torch.equal(scale[~both], plain_scale[~both]) and torch.equal(zero_point[~both], plain_zero_point[~both])


@FAST
@given(ROWS, st.integers(2, 8))
def test_minmax_is_off_by_half_a_step_at_most(rows, bits):
    x = torch.from_numpy(rows)
    scale, _, y = quantized(x, Grid(bits), "minmax")
    # The rounded zero point moves the range by up to half a step, and clipping there costs another half.
    assert ((y - x).abs() <= scale * 1.001 + 1e-6).all()


@FAST
@given(ROWS, st.integers(2, 8), st.booleans())
def test_searching_observers_are_never_worse_than_their_best_candidate(rows, bits, symmetric):
    """Brute force in float64 over the ranges that each observer promises to try."""
    grid = Grid(bits, symmetric)
    x = rows.astype(np.float64)
    for observer in ("mse", "percentile"):
        _, _, y = quantized(torch.from_numpy(rows), grid, observer)
        error = np.square(y.double().numpy() - x).mean(1)
        for low, high in candidate_ranges(x, observer):
            best = brute_force(x, low, high, grid)
            assert (error <= best * (1 + 1e-3) + 1e-6 * np.square(x).mean(1) + 1e-12).all()


def candidate_ranges(x: np.ndarray, observer: str):
    if observer == "mse":
        return [(x.min(1) * s, x.max(1) * s) for s in MSE_SHRINKS]
    return [(np.quantile(x, 1 - p, axis=1), np.quantile(x, p, axis=1)) for p in PERCENTILES]


def brute_force(x: np.ndarray, low: np.ndarray, high: np.ndarray, grid: Grid) -> np.ndarray:
    """Mean squared error (rows,) of a range; of the worse zero point where it falls on a rounding tie."""
    if grid.symmetric:
        scale, zero = np.maximum(abs(low), abs(high)) / grid.qmax, np.zeros_like(low)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = (high - low) / grid.qmax
        zero = -low / np.where(scale > 0, scale, 1)
    usable = scale > 1e-30
    scale = np.where(usable, scale, 1)[:, None]
    errors = []
    for rounded in (np.round(zero - 1e-5), np.round(zero + 1e-5)):
        codes = np.clip(np.round(x / scale) + rounded[:, None], grid.qmin, grid.qmax)
        errors.append(np.square((codes - rounded[:, None]) * scale - x).mean(1))
    return np.where(usable, np.maximum(*errors), np.inf)


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("constant", [0.0, 3.7, -0.002, 1e-20])
def test_constant_channels_are_exact(observer, symmetric, constant):
    """Where the reference implementations crash: no range has a width."""
    x = torch.full((2, 9), constant)
    _, _, y = quantized(x, Grid(4, symmetric), observer)
    assert torch.allclose(y, x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_values_that_are_not_finite_are_refused(observer, bad):
    with pytest.raises(Qwt2Error, match="NaN or infinity"):
        observe(observer, torch.tensor([[0.0, bad, 1.0]]), Grid(8))


def test_nothing_to_see_and_unknown_observers_are_refused():
    with pytest.raises(Qwt2Error, match="empty tensor"):
        observe("minmax", torch.zeros(1, 0), Grid(8))
    with pytest.raises(Qwt2Error, match="use one of: minmax, percentile, mse"):
        observe("entropy", torch.ones(1, 4), Grid(8))


def test_more_values_than_torch_can_sort_are_thinned_out(monkeypatch):
    monkeypatch.setattr("qwt2.quantization.observers.QUANTILE_LIMIT", 1000)
    x = torch.randn(1, 100_003, generator=torch.Generator().manual_seed(0))
    scale, _ = observe("percentile", x, Grid(8))
    exact = float(np.quantile(x.numpy(), 0.99999) - np.quantile(x.numpy(), 0.00001)) / 255
    assert exact / 2 < float(scale) < exact * 1.1


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_channel_s_parameters_depend_on_that_channel_alone(axis):
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)
    quantizer = UniformQuantizer(Grid(4), "mse", channel_axis=axis)
    quantizer.calibrate(x)
    y = quantizer(x)
    assert quantizer.scale.shape == (x.shape[axis],)
    for index in range(x.shape[axis]):
        alone = UniformQuantizer(Grid(4), "mse")
        alone.calibrate(x.select(axis, index))
        assert torch.equal(alone(x.select(axis, index)), y.select(axis, index))


@FAST
@given(ROWS, GRIDS)
def test_codes_and_values_say_the_same(rows, grid):
    x = torch.from_numpy(rows)
    quantizer = UniformQuantizer(grid, "minmax")
    quantizer.calibrate(x)
    y = quantizer(x)
    codes = quantizer.codes(x)
    assert codes.dtype == torch.int32 and int(codes.min()) >= grid.qmin and int(codes.max()) <= grid.qmax
    assert torch.equal((codes - quantizer.zero_point) * quantizer.scale, y)


def test_a_quantizer_keeps_what_it_was_calibrated_on():
    quantizer = UniformQuantizer(Grid(8), "minmax")
    quantizer.calibrate(torch.tensor([-1.0, 1.0]))
    scale = quantizer.scale.clone()
    quantizer(torch.tensor([-100.0, 100.0]))
    assert torch.equal(quantizer.scale, scale)
    quantizer.calibrate(torch.tensor([-100.0, 100.0]))
    assert torch.allclose(quantizer.scale, scale * 100)


@pytest.mark.parametrize("low", [0, -4, -12])
def test_no_value_of_a_grid_lies_between_two_codes(low):
    """Values on a grid whose range ends on one of them: a third of them would be exact halves of a step, and be rounded
    otherwise by engines that multiply by the inverse of the scale and add the zero point before they round."""
    grid, x = Grid(3), torch.arange(low, low + 29).float() * 0.7
    scale, zero_point = (value[0] for value in observe("minmax", x[None], grid))
    assert (((x / scale).frac().abs() - 0.5).abs() < 1e-5).float().mean() > 0.1
    quantizer = UniformQuantizer(grid, "minmax")
    quantizer.calibrate(x)
    assert scale < quantizer.scale < 1.005 * scale and quantizer.zero_point == zero_point
    for codes in (torch.round(x * (1 / quantizer.scale) + zero_point), torch.floor(x / quantizer.scale + zero_point + 0.5)):
        assert torch.equal(codes.clamp(0, 7).int(), quantizer.codes(x))


def test_errors_name_the_module():
    quantizer = UniformQuantizer(Grid(8), "minmax")
    quantizer.where = "blocks.3.attn.qkv.input_quantizer"
    with pytest.raises(Qwt2Error, match="^blocks.3.attn.qkv.input_quantizer: saw NaN"):
        quantizer.calibrate(torch.tensor([math.nan]))


@FAST
@given(hnp.arrays(np.float32, st.integers(2, 200), elements=st.floats(2.0**-10, 1.0, width=32)), st.sampled_from([4, 6, 8]))
def test_logarithmic_quantizer_is_off_by_a_quarter_octave_at_most(values, bits):
    x = torch.from_numpy(values)
    quantizer = LogSqrt2Quantizer(bits)
    quantizer.calibrate(x)
    y = quantizer(x).double()
    scale = float(quantizer.scale)
    inside = (x <= scale) & (x > scale * 2 ** (-(2**bits - 1) / 2))
    octaves = (torch.log2(y[inside]) - torch.log2(x[inside].double())).abs()
    assert (octaves <= 0.25 + 1e-4).all()
    assert (y <= scale * (1 + 1e-6)).all()


def test_logarithmic_quantizer_keeps_zero_and_powers_of_sqrt_2():
    x = torch.tensor([2 ** (-k / 2) for k in range(16)], dtype=torch.float64).float()
    quantizer = LogSqrt2Quantizer(4)
    quantizer.scale, quantizer.calibrated = torch.tensor(1.0), True
    assert torch.allclose(quantizer(x), x, rtol=1e-6)
    assert torch.equal(quantizer(torch.tensor([0.0, 2**-8.5])), torch.zeros(2))


@FAST
@given(st.integers(1, 3), st.integers(1, 4000), st.integers(0, 2**31))
def test_quantiles_are_those_of_torch(rows, count, seed):
    x = torch.randn(rows, count, generator=torch.Generator().manual_seed(seed))
    points = [0.0, 0.001, 0.00001, 0.37, 0.999, 0.99999, 1.0]
    assert torch.equal(quantiles(x, points), torch.quantile(x, torch.tensor(points), dim=1))
