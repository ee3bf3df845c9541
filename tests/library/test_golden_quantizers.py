"""Observers and quantizers against vectors from the public RepQ-ViT and QwT code."""

import re

import numpy as np
import pytest
import torch

from qwt2.quantization.observers import Grid, observe
from qwt2.quantization.quantizers import LogSqrt2Quantizer, UniformQuantizer
from tests.support.golden_data import arrays

VECTORS = arrays("a_quantizers")
UNIFORM = sorted(k[: -len("/delta")] for k in VECTORS if re.match(r"uniform/.*/delta$", k))
LOGARITHMIC = sorted(k[: -len("/delta")] for k in VECTORS if re.match(r"logsqrt2/.*/delta$", k))


def vector(key: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(VECTORS[key]))


def channel_axis(case: str, x: torch.Tensor) -> int | None:
    if vector(f"{case}/delta").numel() == 1:
        return None
    return -1 if "cw_act" in case else 0


def assert_same_steps(y: torch.Tensor, reference: torch.Tensor, delta: torch.Tensor) -> None:
    """Equal to 1e-5 steps, except that one element in a thousand may be one step off (a tie that rounds otherwise)."""
    steps = ((y - reference) / delta).abs()
    flipped = steps > 1e-5 * (1 + (reference / delta).abs())
    assert flipped.sum() <= max(0, steps.numel() // 1000)
    assert steps.max() <= 1 + 1e-3


@pytest.mark.parametrize("case", UNIFORM)
def test_percentile_observer_and_uniform_quantizer(case):
    x = vector(f"{case.rsplit('/', 1)[0]}/x")
    bits = int(re.search(r"/b(\d)$", case)[1])
    quantizer = UniformQuantizer(Grid(bits, zero_in_range=False), "percentile", channel_axis(case, x))
    quantizer.calibrate(x)
    y = quantizer(x)
    delta = vector(f"{case}/delta")
    assert torch.allclose(quantizer.scale.reshape(-1), delta.reshape(-1), rtol=1e-5, atol=0)
    assert torch.equal(quantizer.zero_point.reshape(-1), vector(f"{case}/zero_point").reshape(-1))
    assert_same_steps(y, vector(f"{case}/y"), delta)


@pytest.mark.parametrize("case", LOGARITHMIC)
def test_logarithmic_quantizer(case):
    x = vector(f"{case.rsplit('/', 2)[0]}/x")
    bits, variant = re.search(r"/b(\d)/(\w+)$", case).groups()
    quantizer = LogSqrt2Quantizer(int(bits), floor=1e-6 if variant == "qwt" else 0.0)
    quantizer.calibrate(x)
    y = quantizer(x)
    delta = vector(f"{case}/delta")
    assert torch.allclose(quantizer.scale.reshape(-1), delta.reshape(-1), rtol=1e-5, atol=0)
    reference = vector(f"{case}/y")
    # Neighbouring codes are a factor of sqrt(2) apart, so a tie shows as a relative difference.
    different = (y - reference).abs() > 1e-5 * reference.abs()
    assert different.sum() <= y.numel() // 1000
    assert torch.all(y[different] <= reference[different] * 1.5)


@pytest.mark.parametrize("case", [c for c in UNIFORM if "cw_" not in c])
def test_the_candidate_of_least_error_wins(case):
    """The reference's own errors per candidate tell which of three it must have chosen."""
    x = vector(f"{case.rsplit('/', 1)[0]}/x").reshape(1, -1)
    bits = int(re.search(r"/b(\d)$", case)[1])
    grid = Grid(bits, zero_in_range=False)
    scale, zero_point = observe("percentile", x, grid)
    error = float((grid.fake_quantize(x, scale[:, None], zero_point[:, None]) - x).double().square().mean())
    assert error == pytest.approx(float(np.nanmin(VECTORS[f"{case}/cand_mse"])), rel=1e-4)
