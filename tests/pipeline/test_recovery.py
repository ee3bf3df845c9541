"""What methods recover: intervals against closed forms and coverage, comparisons by hand, and the page of a sweep."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from pipeline.common.folders import CELLS, SCORES
from pipeline.comparison import free_accuracy
from pipeline.comparison.benchmark_tables import read_dicts
from pipeline.sweeps import page, sweep
from pipeline.tasks.classification import Classification
from qwt2.data.dataset import UNLABELLED
from qwt2.io import save_arrays, write_array, write_csv, write_json
from qwt2.report import charts, recovery
from qwt2.report.metrics import ACCURACY, HARD_LOSS
from qwt2.report.recovery import Interval, Measured, interval, lines


def measured(
    compensation: str, means: dict[int, float], free: bool = True, group: str = "", task="classification", **more
):
    """A method whose images are all worth the mean, except that the first one differs by a point."""
    scores = {seed: np.float32([mean + 1, mean - 1 / 99] + [mean - 1 / 99] * 98) for seed, mean in means.items()}
    facts = {"name": compensation or "PTQ", "seconds": 2.0} | more
    return Measured(task, "vit", "w2a3", group, compensation=compensation, scores=scores, free=free, **facts)


def test_an_interval_over_images_agrees_with_the_normal_one():
    rng = np.random.default_rng(1)
    differences = 100.0 * rng.choice([-1, 0, 1], (1, 1500), p=[0.02, 0.9, 0.08])
    mean, error = differences.mean(), differences.std() / np.sqrt(1500)
    found = interval(differences)
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)


def test_an_interval_over_seeds_and_images_has_the_variance_of_both():
    """A crossed design: the variance of the mean is the sum of both parts, where a difference is their sum."""
    rng = np.random.default_rng(2)
    seeds, images = rng.normal(0, 1, 40), rng.normal(0, 20, 900)
    found = interval(3 + seeds[:, None] + images[None, :])
    error = np.sqrt(seeds.var() / 40 + images.var() / 900)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.12)


def test_a_figure_without_images_gets_student_s_interval():
    values = np.array([1.0, 2.0, 4.0])
    expected = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    found = interval(values[:, None])
    assert (found.low, found.high) == pytest.approx(expected) and not found.is_significant
    assert interval(np.full((3, 1), 0.0)) == Interval(0.0, 0.0, 0.0)
    assert interval(np.array([[2.5]])) == Interval(2.5, None, None)


def test_equal_methods_are_never_significant_and_clear_gains_are():
    assert not interval(np.zeros((3, 50))).is_significant
    assert interval(np.full((3, 50), 0.5)).is_significant
    assert interval(np.full((3, 50), -0.5)).is_significant


def test_methods_are_compared_seed_by_seed_with_ptq_and_qwt_of_their_group():
    found = lines(
        [
            measured("", {0: 80, 1: 84}),
            measured("qwt", {0: 85, 1: 87}, free=False),
            measured("cwac", {0: 86, 1: 88, 2: 0}),  # seed 2 has no partner
            measured("", {0: 60}, group="images=16"),
            measured("cwac", {0: 70}, group="images=16"),
            measured("cwac", {0: 70}, group="without plain PTQ"),
        ],
        {"vit": 96.0},
    )
    by_name = {(line.measured.group, line.measured.name): line for line in found}
    assert len(found) == 5 and by_name["", "PTQ"].gain is None and by_name["", "PTQ"].recovered is None
    cwac, qwt, few = by_name["", "cwac"], by_name["", "qwt"], by_name["images=16", "cwac"]
    assert cwac.gain.mean == pytest.approx(5, abs=1e-4) and cwac.loss == pytest.approx(14, abs=1e-4)
    assert cwac.recovered == pytest.approx(5 / 14, abs=1e-4) and cwac.against["qwt"].mean == pytest.approx(1, abs=1e-4)
    assert qwt.against == {} and few.against == {} and few.gain.mean == pytest.approx(10, abs=1e-4)


def test_the_first_sentence_says_where_free_methods_lose():
    hard = [
        measured("", {0: 80}),
        measured("qwt", {0: 85}, False),
        measured("cwac", {0: 84}),
        measured("refit", {0: 90}),
    ]
    easy = [
        Measured("classification", "vit", "w8a8", "", name, name, {0: np.full(9, mean)}, 1.0, name != "qwt")
        for name, mean in {"": 95.0, "qwt": 96.0, "cwac": 95.5, "refit": 96.0}.items()
    ]
    [text] = recovery.headline(lines(hard + easy, {"vit": 96.0}))
    assert "Refit is ahead of QwT in 1 of 1 cells (vit-w2a3 +5.0*)" in text
    assert "CWAC is ahead of QwT in 0 of 1 cells (vit-w2a3 -1.0*)" in text
    assert "behind in 1 of 2 comparisons, significantly in CWAC of QwT vit-w8a8 -0.5*" in text
    assert recovery.headline(lines(hard[:1], {"vit": 96.0})) == []


def test_every_task_says_from_which_loss_on_compensation_must_help():
    assert HARD_LOSS.keys() == ACCURACY.keys()
    found = [measured(name, {0: mean}, task="retrieval") for name, mean in (("", 80), ("qwt", 85), ("cwac", 90))]
    [text] = recovery.headline(lines(found, {"vit": 96.0}))
    assert f"plain PTQ loses {HARD_LOSS['retrieval']:.0f} points of recall@1 or more, CWAC is ahead" in text


def test_what_did_not_help_is_what_is_not_surely_above_ptq():
    items = [measured("", {0: 80, 1: 80}), measured("cwac", {0: 80, 1: 80}), measured("refit", {0: 90, 1: 91})]
    [text] = recovery.not_helpful(lines(items, {"vit": 96.0}))
    assert text == "vit-w2a3, cwac: +0.0 [+0.0, +0.0]"


def test_means_are_over_the_hard_cells_of_a_method():
    cells = [measured("", {0: 80}), measured("cwac", {0: 88}, seconds=3.0)]
    other = [
        Measured("detection", "det", precision, "", name, name, {0: np.float32([mean])}, 5.0, True)
        for precision, name, mean in [
            ("w2a3", "", 50.0),
            ("w2a3", "cwac", 55.0),
            ("w8a8", "", 59.0),
            ("w8a8", "cwac", 0.0),
        ]
    ]
    [record] = recovery.means(lines(cells + other, {"vit": 96.0, "det": 60.0}))
    assert (record["cells"], record["seconds"], record["free"]) == (2, 4.0, True)
    assert record["recovered"] == pytest.approx((8 / 16 + 5 / 10) / 2, abs=1e-4)


def test_the_plot_tells_free_methods_from_those_that_add_latency():
    spec = charts.recovery(
        lines([measured("", {0: 80}), measured("qwt", {0: 85}, False), measured("cwac", {0: 84})], {"vit": 96.0})
    )
    values = spec["data"]["values"]
    assert [(point["method"], point["latency"]) for point in values] == [("qwt", "adds latency"), ("cwac", "free")]
    assert [point["recovered"] for point in values] == pytest.approx([100 * 5 / 16, 100 * 4 / 16], abs=1e-2)


def write_cell(number: int, overrides: dict[str, str], ptq: str, top1: dict[str, float], added: int = 0) -> None:
    """Write a finished cell of sweep "s", with its job."""
    folder, own = CELLS / f"{number:016x}", list(top1)[-1]
    figures = {name: {"torch/compensate_seconds": 2.0, "torch/added_modules": added} if "+" in name else
               {"torch/quantize_seconds": 1.0} for name in top1}  # fmt: skip
    config = {"model": {"name": "vit", "timm": "x"}, "precision": {"name": "w2a3"}, "ptq": {"method": ptq, "rotate": "ptq.rotate" in overrides},
              "seeds": [int(overrides["seed"])]}  # fmt: skip
    scores = {name: np.full((1, 4), value, np.float32) for name, value in ({"fp32": 96.0} | top1).items()}
    save_arrays(folder / "evaluate" / SCORES, scores)
    write_json(folder / "cell.json", {"id": folder.name, "status": "finished", "config": config, "method": own,
                                      "figures": figures})  # fmt: skip
    job = {"cell": folder.name, "number": number, "overrides": overrides, "status": "finished"}
    write_json(sweep.job_path("s", overrides), job)


def test_a_sweep_s_cells_are_brought_together_by_seed_and_compared_with_its_first_ptq_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    number = 0
    for ptq, plain in (("repq", 80.0), ("gptq", 85.0)):
        for gate in ("none", "stream"):
            for seed in (0, 1):
                overrides = {"ptq": ptq, "compensation": "cwac", "compensation.gate": gate, "seed": str(seed)}
                write_cell(
                    number, overrides, ptq, {ptq: plain, f"{ptq}+cwac": plain + (4.0 if gate == "none" else 5.0)}
                )
                number += 1
    cells = page.finished("s")
    found = {line.measured.name: line for line in lines(page.measured(cells), {"vit": 96.0})}
    assert {name: line.gain and line.gain.mean for name, line in found.items()} == {
        "PTQ": None, "PTQ + CWAC, gate=none": 4.0, "PTQ + CWAC, gate=stream": 5.0,
        "gptq": 5.0, "gptq + CWAC, gate=none": 9.0, "gptq + CWAC, gate=stream": 10.0,
    }  # fmt: skip
    assert all(len(line.measured.scores) == 2 for line in found.values())
    assert found["PTQ"].measured.seconds == 1.0 and found["gptq + CWAC, gate=none"].measured.seconds == 3.0


def test_every_compensation_of_a_cell_is_shown_but_no_simulated_ptq_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    top1 = {
        "mse": 80.0,
        "mse+cwac": 84.0,
        "mse+qwt": 82.0,
        "mse+refit": 88.0,
        "mse_published": 70.0,
        "mse_published+qwt": 75.0,
    }
    write_cell(0, {"compensation": "all", "seed": "0"}, "mse", top1)
    found = {line.measured.name: line for line in lines(page.measured(page.finished("s")), {"vit": 96.0})}
    assert {name: line.gain and line.gain.mean for name, line in found.items()} == {
        "PTQ": None, "PTQ + CWAC": 4.0, "PTQ + QwT": 2.0, "PTQ + Refit": 8.0
    }  # fmt: skip


def test_the_mean_of_the_scores_is_top1_where_some_images_have_no_label(tmp_path):
    task = Classification.__new__(Classification)
    task.dataset = SimpleNamespace(labels=lambda split: np.array([0, UNLABELLED, 2, 1, UNLABELLED]))
    logits = np.float32([[9, 0, 0], [9, 0, 0], [0, 0, 9], [0, 0, 9], [0, 0, 9]])
    write_array(tmp_path / "logits.npy", logits)
    assert task.scores(tmp_path / "logits").tolist() == [100, 100, 0]
    assert task.scores(tmp_path / "logits").mean() == pytest.approx(200 / 3)


def test_several_experiments_are_compared_with_the_first_one_s_method_and_rotation_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [("fast_more", "gptq", {}), ("fast", "repq", {}), ("fast_rotated", "repq", {"ptq.rotate": "true"})]
    for number, (name, ptq, more) in enumerate(asked):  # each counts its own cells
        label = f"{ptq}_rotated" if more else ptq
        overrides = {"experiment": name, "ptq": ptq, "compensation": "cwac", "seed": "0"} | more
        write_cell(number, overrides, ptq, {label: 80.0 + number, f"{label}+cwac": 85.0 + number})
    found = page.measured(page.finished("s"))
    assert [line.name for line in found] == [
        "PTQ",
        "PTQ + CWAC",
        "gptq",
        "gptq + CWAC",
        "repq_rotated",
        "repq_rotated + CWAC",
    ]
    assert {line.group for line in found} == {""}


def test_other_settings_make_groups_and_the_page_names_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert page.write_page("s") is None
    for number, images in enumerate(("16", "64")):
        overrides = {"compensation": "qwt", "calibration.images": images, "seed": "0"}
        write_cell(number, overrides, "repq", {"repq": 80.0, "repq+qwt": 80.0 + number}, added=3)
    text = page.write_page("s").read_text()
    assert text.count("calibration.images=16") >= 2 and "PTQ + QwT (calibration.images=64)" in text
    assert "adds latency" in text and "vit-w2a3 (calibration.images=16), PTQ + QwT: +0.0" in text


def test_the_file_of_a_sweep_keeps_what_its_page_says(tmp_path, monkeypatch):
    monkeypatch.setattr(free_accuracy, "FILE", tmp_path / "free.csv")
    page = tmp_path / "page.md"
    assert "make free-accuracy" in free_accuracy.free_accuracy_page(page)
    before = lines(
        [
            measured("", {0: 80, 1: 84}),
            measured("qwt", {0: 85, 1: 87}, free=False),
            measured("cwac", {0: 86.25, 1: 88}),
            measured("refit", {0: 79, 1: 80}),
        ],
        {"vit": 96.0},
    )
    write_csv(free_accuracy.FILE, [free_accuracy.row_of(line) | {"cpu": "CPU", "torch": "2"} for line in before])
    after = [free_accuracy.line_of(row) for row in read_dicts(free_accuracy.FILE)]
    for text in (recovery.headline, recovery.significance, recovery.not_helpful):
        assert text(after) == text(before)
    assert [line.measured.mean for line in after] == pytest.approx([82, 86, 87.125, 79.5])
    for kept, record in zip(recovery.means(after), recovery.means(before), strict=True):
        assert kept == pytest.approx(record, abs=1e-4)
    text = free_accuracy.free_accuracy_page(page)
    assert (tmp_path / "report" / "free-accuracy.svg").read_text().startswith("<svg")
    assert "| vit-w2a3 | cwac | 87.1 | 37% | **+5.1 " in text
    assert "- vit-w2a3, refit: -2.5" in text.partition("## What did not help")[2]
