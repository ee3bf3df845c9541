"""QwT's regression against vectors from its public code and against float64 least squares on the same data."""

import functools
import operator

import numpy as np
import pytest
import torch

from qwt2.compensation.blocks import LinearCompensation
from qwt2.compensation.methods.qwt import Patches, QwT, Tokens
from qwt2.quantization.regression import Regression
from tests.support.golden_data import arrays

VECTORS = arrays("b_regression")
LINEAR = sorted({k.split("/")[1] for k in VECTORS if k.startswith("linear/")})
CONV = sorted({k.split("/")[1] for k in VECTORS if k.startswith("conv/")})
# Fewer equations than unknowns, or a target without variance: only predictions can be compared.
UNDETERMINED = {"fewer_rows_than_unknowns_k3", "constant_target_negative_or_nan_r2"}


def vector(key: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(VECTORS[key]))


def fitted(rows, x: torch.Tensor, y: torch.Tensor, damping: float):
    """The regression, its coefficients, and the layer's weight and bias; any batch size gives the same sums."""
    parts = [Regression.of(rows.of_input(a), rows.of_output(b)) for a, b in zip(x.split(5), y.split(5))]
    regression = functools.reduce(operator.add, parts)
    coefficients, intercept = regression.solve(damping)
    return regression, coefficients, *rows.layer(coefficients, intercept)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@pytest.mark.parametrize("case", LINEAR)
def test_linear(case):
    x, y = vector(f"linear/{case}/X"), vector(f"linear/{case}/Y")
    regression, coefficients, weight, bias = fitted(Tokens(), x, y, damping=0.0)
    r2 = regression.r2(coefficients)
    applied = r2 > 0
    assert applied == bool(np.any(VECTORS[f"linear/{case}/applied_W"]))
    if case in UNDETERMINED:
        assert r2 == -np.inf
        return
    assert r2 == pytest.approx(float(VECTORS[f"linear/{case}/r2_f64"].item()), abs=1e-5)
    assert r2 == pytest.approx(float(VECTORS[f"linear/{case}/r2"].item()), abs=1e-3)
    # The float64 solution tightly; the reference's float32 inverse as far as it is itself from that.
    exact, reference = vector(f"linear/{case}/W_f64"), vector(f"linear/{case}/W")
    assert relative(weight.T, exact) < 1e-5
    assert relative(weight.T, reference) < relative(reference, exact) + 1e-5
    assert relative(bias, vector(f"linear/{case}/b_f64")) < 1e-4


def settings(case: str) -> QwT:
    channels, groups = VECTORS[f"conv/{case}/X"].shape[1], int(VECTORS[f"conv/{case}/groups"].item())
    return QwT(kernel_size=int(VECTORS[f"conv/{case}/kernel_size"].item()), channels_per_group=channels // groups)


@pytest.mark.parametrize("case", CONV)
def test_grouped_convolution(case):
    x, y = vector(f"conv/{case}/X"), vector(f"conv/{case}/Y")
    rows = Patches(x.shape, y.shape, settings(case))
    stride = int(VECTORS[f"conv/{case}/stride"].item())
    assert rows.stride == (stride, stride) and rows.groups == int(VECTORS[f"conv/{case}/groups"].item())
    regression, coefficients, weight, bias = fitted(rows, x, y, damping=1e-9)
    r2 = rows.positional_r2(regression, coefficients, float(y.double().square().sum()))
    kept = r2 > 0
    assert kept == bool(np.any(VECTORS[f"conv/{case}/applied_W"]))
    assert r2 == pytest.approx(float(VECTORS[f"conv/{case}/r2_f64"].item()), rel=2e-3, abs=2e-3)
    if case not in UNDETERMINED:
        # The reference adds 1e-3 to the Gram matrix' diagonal, the bias' row included; that shrinks the solution of
        # the case with the fewest rows an unknown (192 for 36) by 0.4 %.
        assert relative(weight, vector(f"conv/{case}/W_f64")) < 5e-3
        assert relative(bias, vector(f"conv/{case}/b_f64")) < 5e-3
    layer = LinearCompensation(weight, bias, rows.stride, rows.groups)
    residual = (layer.added(x) - y).double().square().sum()
    exact = 1 - float(VECTORS[f"conv/{case}/r2_f64"].item())
    about_positions = (y - y.mean(0)).double().square().sum()
    assert float(residual / about_positions) == pytest.approx(exact, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("case", CONV)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_compensation_term(case, dtype):
    """The layer alone, with the reference's own weights, in half and in single precision."""
    x = vector(f"conv/{case}/X")[:2]
    weight, bias = vector(f"conv/{case}/applied_W"), vector(f"conv/{case}/applied_b")
    stride, groups = int(VECTORS[f"conv/{case}/stride"].item()), int(VECTORS[f"conv/{case}/groups"].item())
    layer = LinearCompensation(weight.to(dtype), bias, stride, groups, str(dtype).removeprefix("torch."))
    expected = vector(f"conv/{case}/comp_{'half' if dtype == torch.float16 else 'fp32'}")
    # Half precision has 11 bits; sums may be ordered differently.
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    assert (layer.added(x) - expected).abs().max() <= tolerance * expected.abs().max()
