"""The verdict after a rebuild: its interval against scipy's t test and a simulation, its sentence, where it reads from."""

import subprocess

import numpy as np
import pytest
from scipy import stats

from pipeline.comparison import verdict
from pipeline.comparison.verdict import Judged, Spread, judge, judged, sentence
from qwt2.errors import Qwt2Error
from qwt2.report.results import Row, write_rows


def row(
    value: float,
    std: float | None = 0.5,
    n: int = 3,
    method: str = "repq",
    engine: str = "torch",
    precision: str = "w4a4",
) -> Row:
    return Row("classification", "digits", "vit", precision, method, engine, "top1", value, std, "percent", n)


# Networks that were trained with two CPUs' kernels and differ by no more than seeds explain.
KERNELS = Spread([row(80.0, engine=name, method=method) for name in "ab" for method in ("repq", "repq+cwac")])


def test_without_a_spread_of_cpus_the_interval_is_that_of_the_t_test():
    first, second = row(80.0, 0.7, 3), row(80.0, 0.4, 5)
    found = judged(first, second, Spread([]))
    assert stats.ttest_ind_from_stats(80.0, 0.7, 3, 80.0 + found.expected, 0.4, 5).pvalue == pytest.approx(0.05)
    near = judged(first, second._replace(value=80.6), Spread([]))
    assert near.p == pytest.approx(stats.ttest_ind_from_stats(80.0, 0.7, 3, 80.6, 0.4, 5).pvalue)


def test_the_spread_of_cpus_is_what_seeds_do_not_explain():
    kernels = [
        row(value, std, engine=name) for name, value, std in (("a", 80.0, 0.3), ("b", 82.0, 0.3), ("c", 84.0, 0.6))
    ]
    variance, freedom = Spread(kernels).of(row(80.0))
    assert (variance, freedom) == (pytest.approx(4.0 - (0.09 + 0.09 + 0.36) / 3 / 3), 2)
    assert Spread([row(80.0, 3.0, engine="a"), row(80.1, 3.0, engine="b")]).of(row(80.0)) == (0.0, 1)
    assert Spread(kernels).of(row(80.0)._replace(model="another")) == (variance, freedom)  # nothing better is known
    assert Spread(kernels).of(row(80.0, precision="w8a8")) == (0.0, 0)
    assert Spread(kernels).of(row(80.0)._replace(task="detection", model="detector")) == (0.0, 0)


def test_figures_whose_spread_nobody_measured_are_not_judged():
    far = judged(row(80.0), row(60.0), Spread([]))
    assert not far.known
    text = sentence([judged(row(80.0), row(80.0), KERNELS), far])
    assert text.startswith("This run reproduces the committed results: of 1 headline figures, 1 are equal")
    assert text.endswith("; 1 differ by an amount that nobody measured (`python -m benchmarks.retrained vit`).")
    assert "60.0 (80.0) ?" in verdict.table([far])


def test_two_runs_on_different_cpus_are_within_the_interval_nineteen_times_of_twenty():
    """Runs are drawn from the model that the interval stands for: networks vary by c, seeds on top of them by s."""
    random, inside, runs = np.random.default_rng(0), 0, 2000
    c, s = 1.5, 0.8

    def drawn(engine: str = "torch", method: str = "repq") -> Row:
        values = random.normal(80, c) + random.normal(0, s, 3)
        return row(float(values.mean()), float(values.std(ddof=1)), engine=engine, method=method)

    for _ in range(runs):
        retrained = [drawn(engine, method) for engine in "abc" for method in ("repq", "repq+cwac", "repq+qwt")]
        inside += judged(drawn(), drawn(), Spread(retrained)).reproduced
    assert 0.92 < inside / runs < 0.98


def test_figures_that_differ_are_named():
    committed = [row(80.0, method=method) for method in ("repq", "repq+cwac")]
    fresh = [row(80.0, method="repq"), row(70.0, method="repq+cwac")]
    found = judge(committed, fresh, KERNELS)
    assert [(figure.equal, figure.reproduced) for figure in found] == [(True, True), (False, False)]
    text = sentence(found, missing=1)
    assert text.startswith("This run does not reproduce the committed results: of 2 headline figures, 1 are equal")
    assert text.endswith("vit w4a4 repq+cwac; 1 committed ones are not part of this run.")
    shown = verdict.table(found)
    assert "80.0 =" in shown and "70.0 (80.0 ± 1.1) !" in shown
    assert (
        sentence(found[:1])
        == "This run reproduces the committed results: all 1 headline figures are equal to the last digit."
    )


def test_one_of_twenty_may_be_outside_by_chance():
    near, outside, far = (Judged(row(80.0), row(80.0 + by), 1.0, 1000) for by in (0.5, 2.2, 6.0))
    assert [figure.reproduced for figure in (near, outside, far)] == [True, False, False]
    assert sentence([near] * 39 + [outside]).startswith("This run reproduces")
    assert sentence([near] * 39 + [far]).startswith("This run does not reproduce")
    assert sentence([near] * 30 + [outside] * 10).startswith("This run does not reproduce")
    assert "says nothing" in sentence([])


def test_papers_settings_and_other_methods_engines_are_no_headline():
    rows = [
        row(80.0, method=m, engine=e) for m in ("repq", "repq+cwac", "repq_published") for e in ("torch", "openvino")
    ]
    kept = {(r.method, r.engine) for r in verdict.headline_figures(rows).values()}
    assert kept == {("repq", "torch"), ("repq+cwac", "torch"), ("repq+cwac", "openvino")}


def test_the_committed_results_come_from_git(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Qwt2Error, match="git does not have results/summary.csv of HEAD"):
        verdict.main([])
    write_rows(verdict.SUMMARY, [row(80.0)])
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "results"]):
        subprocess.run([*git, *words], check=True)
    write_rows(verdict.SUMMARY, [row(80.4)])  # what a rebuild leaves in the working tree
    write_rows(verdict.RETRAINED, [row(80.0, engine="a"), row(80.3, engine="b")])
    verdict.main([])
    assert "0 are equal to the last digit and 1 within the interval" in capsys.readouterr().out
    verdict.main(["--against", str(verdict.SUMMARY)])
    assert "all 1 headline figures are equal" in capsys.readouterr().out
