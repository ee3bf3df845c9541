"""Streaming statistics against numpy on the whole data at once."""

import functools
import math
import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwt2.compensation.methods.cwac import affine
from qwt2.compensation.moments import Moments
from qwt2.decibel import decibel
from qwt2.quantization.regression import Regression


def paired(rows: int, channels: int, mean: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A full-precision output and a noisy, shifted version of it, float64 (rows, channels)."""
    rng = np.random.default_rng(seed)
    f = rng.standard_normal((rows, channels)) * rng.uniform(0.5, 2, channels) + mean
    q = 0.7 * f + 0.3 + 0.2 * rng.standard_normal((rows, channels))
    return q, f


def moments_of(q: np.ndarray, f: np.ndarray, cuts: list[int] = ()) -> Moments:
    parts = zip(np.split(q, cuts), np.split(f, cuts))
    return functools.reduce(
        operator.add, [Moments.of(torch.from_numpy(a), torch.from_numpy(b), 1) for a, b in parts if len(a)]
    )


def assert_moments(moments: Moments, q: np.ndarray, f: np.ndarray, rtol: float = 1e-10) -> None:
    assert moments.count == len(q)
    centred_q, centred_f = q - q.mean(0), f - f.mean(0)
    expected = {
        "mean_q": q.mean(0), "mean_f": f.mean(0), "var_q": q.var(0), "var_f": f.var(0),
        "cov": (centred_q * centred_f).mean(0),
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(moments, name).numpy(), value, rtol=rtol, atol=1e-12, err_msg=name)


class TestMoments:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        rows=st.integers(2, 200),
        channels=st.integers(1, 5),
        cuts=st.lists(st.integers(0, 200), max_size=6),
        mean=st.sampled_from([0.0, -3.0, 1e3, 1e6]),
        seed=st.integers(0, 100),
    )
    def test_equals_numpy_for_every_split_and_mean(self, rows, channels, cuts, mean, seed):
        q, f = paired(rows, channels, mean, seed)
        # At a mean of 1e6 numpy's own two-pass variance carries 1e6 * 2^-52 of rounding.
        assert_moments(moments_of(q, f, sorted(cuts)), q, f, rtol=1e-10 if mean < 1e6 else 1e-8)

    @pytest.mark.parametrize("shape, axis", [((4, 3, 5, 2), 1), ((4, 7, 3), -1), ((6, 3), -1)])
    def test_runs_over_every_axis_but_the_channels(self, shape, axis):
        rng = np.random.default_rng(1)
        q, f = rng.standard_normal((2, *shape))
        moments = Moments.of(torch.from_numpy(q), torch.from_numpy(f), axis)
        assert_moments(moments, *(np.moveaxis(y, axis, -1).reshape(-1, 3) for y in (q, f)))

    def test_accumulates_in_float64(self):
        """Float32 sums of a million values around 1000 would lose the variance."""
        f = np.random.default_rng(0).standard_normal((200_000, 1)).astype(np.float32) + np.float32(1000)
        q = f + np.float32(0.125)
        assert_moments(moments_of(q, f, [50_000, 150_000]), q.astype(np.float64), f.astype(np.float64), rtol=1e-9)

    def test_a_sum_equals_one_pass_and_leaves_its_terms_alone(self):
        q, f = paired(50, 3, mean=7)
        first, second = moments_of(q[:20], f[:20]), moments_of(q[20:], f[20:])
        assert_moments(first + second, q, f)
        assert_moments(first, q[:20], f[:20])
        assert_moments(second, q[20:], f[20:])

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_notices_values_that_are_not_finite(self, bad):
        q, f = paired(10, 2)
        assert moments_of(q, f).is_finite
        for pair in (q, f):
            broken = [q.copy(), f.copy()]
            broken[0 if pair is q else 1][3, 1] = bad
            assert not moments_of(*broken).is_finite


class TestAffine:
    def test_least_squares_equals_lstsq(self):
        q, f = paired(300, 4, mean=2)
        alpha, beta = affine(moments_of(q, f, [100]), "least_squares")
        for c in range(4):
            expected, *_ = np.linalg.lstsq(np.stack([q[:, c], np.ones(300)], 1), f[:, c], rcond=None)
            np.testing.assert_allclose([alpha[c], beta[c]], expected, rtol=1e-10)

    def test_moment_matches_mean_and_deviation(self):
        q, f = paired(300, 4, mean=2)
        alpha, beta = (p.numpy() for p in affine(moments_of(q, f), "moment"))
        np.testing.assert_allclose((alpha * q + beta).mean(0), f.mean(0), rtol=1e-12)
        np.testing.assert_allclose((alpha * q + beta).std(0), f.std(0), rtol=1e-12)

    def test_bias_only_matches_the_mean(self):
        q, f = paired(300, 4, mean=2)
        alpha, beta = affine(moments_of(q, f), "bias_only")
        assert (alpha == 1).all()
        np.testing.assert_allclose(beta, (f - q).mean(0), rtol=1e-10)

    @pytest.mark.parametrize("estimator", ["least_squares", "moment", "bias_only"])
    @pytest.mark.parametrize("value", [0.0, -4.0, 1e5])
    def test_constant_channels_are_only_shifted(self, estimator, value):
        """Quantization can flatten a channel; alpha would be noise over noise there."""
        q, f = paired(100, 2)
        q[:, 0] = value + 1e-9 * value * np.random.default_rng(0).standard_normal(100)
        alpha, beta = affine(moments_of(q, f), estimator)
        assert alpha[0] == 1
        np.testing.assert_allclose(beta[0], (f - q).mean(0)[0], rtol=1e-9)
        assert (alpha[1] == 1) == (estimator == "bias_only")

    def test_no_other_affine_map_has_a_smaller_error(self):
        moments = moments_of(*paired(200, 3))
        alpha, beta = affine(moments, "least_squares")
        best = moments.squared_error(alpha, beta)
        for da, db in [(1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)]:
            assert (moments.squared_error(alpha + da, beta + db) > best).all()


class TestErrors:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(alpha=st.floats(-3, 3), beta=st.floats(-10, 10), mean=st.sampled_from([0.0, 100.0]))
    def test_squared_error_in_closed_form(self, alpha, beta, mean):
        q, f = paired(150, 3, mean)
        error = moments_of(q, f, [31]).squared_error(torch.full((3,), alpha).double(), beta)
        np.testing.assert_allclose(error, ((np.float32(alpha) * q + beta - f) ** 2).mean(0), rtol=1e-6, atol=1e-9)

    def test_sqnr_in_closed_form(self):
        q, f = paired(150, 3, mean=1)
        moments = moments_of(q, f)
        expected = 10 * np.log10((f**2).sum() / ((q - f) ** 2).sum())
        assert moments.sqnr_db() == pytest.approx(expected, abs=1e-9)
        alpha, beta = affine(moments, "least_squares")
        after = 10 * np.log10((f**2).sum() / ((alpha.numpy() * q + beta.numpy() - f) ** 2).sum())
        assert moments.sqnr_db(alpha, beta) == pytest.approx(after, abs=1e-9)
        assert after > expected

    def test_error_of_equal_outputs_is_zero_not_negative(self):
        _, f = paired(100, 3, mean=1e4)
        moments = moments_of(f, f, [10, 60])
        assert (moments.squared_error() >= 0).all() and moments.sqnr_db() > 200

    def test_decibel_at_its_ends(self):
        assert decibel(1.0, 0.0) == math.inf
        assert decibel(0.0, 1.0) == -math.inf
        assert decibel(100.0, 1.0) == pytest.approx(20)


def regression_data(rows=120, inputs=6, outputs=3, groups=2, mean=0.0, seed=0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((groups, rows, inputs)) + mean
    truth = rng.standard_normal((groups, inputs, outputs))
    return x, x @ truth + 2 + 0.3 * rng.standard_normal((groups, rows, outputs))


def regression_of(x: np.ndarray, t: np.ndarray, cuts: list[int] = ()) -> Regression:
    parts = zip(np.split(x, cuts, axis=1), np.split(t, cuts, axis=1))
    return functools.reduce(
        operator.add, [Regression.of(torch.from_numpy(a), torch.from_numpy(b)) for a, b in parts if a.shape[1]]
    )


def lstsq(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Coefficients and intercept, (d + 1, o), of one group."""
    return np.linalg.lstsq(np.concatenate([x, np.ones((len(x), 1))], 1), t, rcond=None)[0]


class TestRegression:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        groups=st.integers(1, 3),
        inputs=st.integers(1, 6),
        outputs=st.integers(1, 4),
        cuts=st.lists(st.integers(0, 80), max_size=5),
        mean=st.sampled_from([0.0, 1e4]),
    )
    def test_equals_lstsq_for_every_split_and_mean(self, groups, inputs, outputs, cuts, mean):
        x, t = regression_data(80, inputs, outputs, groups, mean)
        weight, intercept = regression_of(x, t, sorted(cuts)).solve(damping=0.0)
        for g in range(groups):
            # The same problem about the means is well conditioned for numpy too.
            expected = lstsq(x[g] - x[g].mean(0), t[g])
            np.testing.assert_allclose(weight[g], expected[:-1], rtol=1e-7, atol=1e-9)
            at_zero = expected[-1] - x[g].mean(0) @ expected[:-1]
            np.testing.assert_allclose(intercept[g], at_zero, rtol=1e-7, atol=1e-9 * max(1, mean))

    def test_damping_is_a_share_of_the_mean_diagonal(self):
        x, t = regression_data(groups=1)
        weight, _ = regression_of(x, t).solve(damping=0.1)
        xc, tc = x[0] - x[0].mean(0), t[0] - t[0].mean(0)
        gram = xc.T @ xc
        ridge = gram + 0.1 * np.diag(gram).mean() * np.eye(len(gram))
        np.testing.assert_allclose(weight[0], np.linalg.solve(ridge, xc.T @ tc), rtol=1e-10)

    @pytest.mark.parametrize("damping", [0.0, 1e-6])
    @pytest.mark.parametrize("kind", ["constant", "duplicate", "sums to a constant", "fewer rows than inputs", "all zero"])
    def test_singular_inputs_are_solved(self, kind, damping):
        x, t = regression_data(groups=1)
        if kind == "constant":
            x[..., 0] = 3.0
        elif kind == "duplicate":
            x[..., 0] = x[..., 1]
        elif kind == "sums to a constant":  # the output of a LayerNorm
            x -= x.mean(-1, keepdims=True)
        elif kind == "fewer rows than inputs":
            x, t = x[:, :4], t[:, :4]
        else:
            x[:] = 0.0
        weight, intercept = regression_of(x, t).solve(damping)
        assert torch.isfinite(weight).all() and torch.isfinite(intercept).all()
        design = np.concatenate([x[0], np.ones((x.shape[1], 1))], 1)
        best = ((design @ lstsq(x[0], t[0]) - t[0]) ** 2).sum()
        found = ((x[0] @ weight[0].numpy() + intercept[0].numpy() - t[0]) ** 2).sum()
        assert found <= best + 1e-4 * (t**2).sum()

    def test_r2_and_residual_in_closed_form(self):
        x, t = regression_data(mean=5)
        regression = regression_of(x, t, [40])
        weight, intercept = regression.solve(damping=1e-3)
        residual = ((x @ weight.numpy() + intercept.numpy()[:, None] - t) ** 2).sum()
        assert regression.residual(weight) == pytest.approx(residual, rel=1e-9)
        total = ((t - t.mean(1, keepdims=True)) ** 2).sum()
        assert regression.r2(weight) == pytest.approx(1 - residual / total, rel=1e-9)

    def test_r2_where_nothing_is_to_explain(self):
        x, t = regression_data()
        assert regression_of(x, np.ones_like(t)).r2(torch.zeros(2, 6, 3)) == -math.inf

    def test_r2_of_coefficients_that_do_harm_is_negative(self):
        x, t = regression_data()
        regression = regression_of(x, t)
        weight, _ = regression.solve(0.0)
        assert regression.r2(-weight) < 0 < regression.r2(weight)
