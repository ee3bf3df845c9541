"""The page of all runs: served on loopback, nothing from elsewhere; in a browser, filtered, sorted, two runs compared."""

import json
import os
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Page

from benchmarks import synthetic
from benchmarks.experiments import served
from pipeline.common.unchanged import while_unchanged
from pipeline.comparison import dashboard, plots
from pipeline.comparison.runs import all_runs
from pipeline.stages import resolve
from qwt2.errors import Qwt2Error
from qwt2.report.results import read_layers

pytestmark = pytest.mark.xdist_group("dashboard")  # one worker makes the runs

ROOT = Path(__file__).resolve().parents[2]
CELLS = 1000
COUNT = "Number(document.querySelector('#count').innerText.split(' ')[0])"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A grid of 2 cells and three sweeps of (made-up) cells, a thousand in all, one of them failed."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(ROOT / "conf", folder / "conf")
    (folder / "conf/grid.yaml").write_text(yaml.safe_dump({"grid": {"model": ["vit_micro"], "precision": ["w8a8", "w4a4"]}}))
    synthetic.write_out(folder / "out", ["vit_micro"], ["w8a8", "w4a4"])
    before = Path.cwd()
    os.chdir(folder)
    resolve.main([])
    synthetic.write_cells(CELLS)
    os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def address(results):
    with served(results) as url:
        yield url


@pytest.fixture
def page(chromium_browser):
    """An empty page; what is opened in it must not complain."""
    problems = []
    with chromium_browser.new_page(viewport={"width": 1600, "height": 1400}) as page:
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        yield page
    assert problems == []


def column(field: str) -> str:
    """Values of the rows that the grid has drawn, from top to bottom."""
    return f"""[...document.querySelectorAll('.ag-center-cols-container .ag-row')]
        .sort((a, b) => a.getAttribute('row-index') - b.getAttribute('row-index'))
        .map(row => row.querySelector('[col-id="{field}"]')?.innerText)"""


def type_into_filter(page: Page, heading: str, text: str) -> None:
    page.get_by_label(f"{heading} Filter Input", exact=True).fill(text)


def wait(page: Page, condition: str):
    """The first true value of a JavaScript expression."""
    return page.wait_for_function(condition).json_value()


@pytest.mark.browser
@pytest.mark.timeout(240)
def test_runs_are_filtered_sorted_and_compared(address, page, results):
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    wait(page, "document.querySelectorAll('.ag-center-cols-container .ag-row').length")
    wait(page, "document.querySelectorAll('#bits .points path').length")
    assert page.evaluate(COUNT) == CELLS + 11  # the grid: five methods at two precisions, and fp32

    type_into_filter(page, "sweeps", "sizes")
    wait(page, f"{COUNT} == {CELLS // 3}")
    type_into_filter(page, "model", "vit")
    type_into_filter(page, "bits", "w2a4")
    combinations = len(synthetic.MODELS) * len(synthetic.PRECISIONS) * 2
    wanted = [n for n in range(1, CELLS, 3) if n % combinations in (6, 7)]  # vit_micro at w2a4, qwt and cwac
    wait(page, f"{COUNT} == {len(wanted)}")
    assert set(page.evaluate(column("model"))) == {"vit_micro"} and set(page.evaluate(column("precision"))) == {"w2a4"}
    drawn = wait(page, "document.querySelectorAll('#bits .points path').length")
    assert drawn == page.evaluate(COUNT)  # the plots follow the filter

    assert page.evaluate("document.querySelectorAll('#bits .subplot.xy').length") == 1  # a panel per model
    assert page.evaluate("document.querySelectorAll('#latency .lines .js-line').length") == 1  # the Pareto front

    page.evaluate("window.redrawn = 0; document.querySelector('#bits .js-plotly-plot').on('plotly_afterplot', () => window.redrawn++)")
    heading = "document.querySelector('.ag-header-cell[col-id=accuracy] .ag-header-cell-label')"
    for order in (1, -1):
        page.evaluate(f"{heading}.click()")
        wait(page, f"document.querySelector('.ag-header-cell[col-id=accuracy]').ariaSort == '{'ascending' if order > 0 else 'descending'}'")
        time.sleep(0.3)
        values = [float(value) for value in page.evaluate(column("accuracy")) if value]
        assert len(values) > 5 and values == sorted(values, reverse=order < 0)
    assert page.evaluate("window.redrawn") == 0  # the same runs in another order

    for name in ("sweeps", "model", "bits"):
        type_into_filter(page, name, "")
    for name, text in (("sweeps", "grid"), ("bits", "w8a8"), ("method", "repq+")):
        type_into_filter(page, name, text)
    wait(page, f"{COUNT} == 2")
    assert wait(page, "window.redrawn") > 0
    for number in (0, 1):
        page.evaluate(f"document.querySelectorAll('.ag-row input[type=checkbox]')[{number}].click()")
    wait(page, "document.querySelectorAll('#layers .trace').length == 2")
    assert page.evaluate("document.querySelectorAll('#layers .points path').length") == 26 + 6  # modules, blocks
    shown = page.evaluate("[...document.querySelectorAll('#figures tbody tr')].map(row => [...row.cells].map(c => c.innerText))")
    check_figures(results, dict((row[0], row[1:]) for row in shown))
    differing = page.evaluate("[...document.querySelectorAll('#differences tbody td:first-child')].map(c => c.innerText)")
    assert "compensation.cwac.estimator" in differing and "model.name" not in differing

    link = page.evaluate("document.querySelector('.ag-row [col-id=config] a').href")
    config = yaml.safe_load(urllib.request.urlopen(link).read())
    assert config["model"]["name"] == "vit_micro" and config["precision"]["name"] == "w8a8"
    elsewhere = [url for url in requests if not url.startswith((address, "data:", "blob:", "about:"))]
    assert elsewhere == []
    for path in dashboard.EARLY:
        assert sum(path in url for url in requests) == 1


def check_figures(results: Path, shown: dict[str, list[str]]) -> None:
    rows = synthetic.cell_rows("vit_micro", "w8a8")
    found = {(row.method, row.engine, row.metric): row.value for row in rows}
    for heading, engine, metric in (("top-1 or box AP %", "torch", "top1"), ("OpenVINO ms", "openvino", "latency_ms")):
        expected = sorted(found[f"repq+{name}", engine, metric] for name in ("qwt", "cwac"))
        assert sorted(map(float, shown[heading])) == pytest.approx(expected, abs=1e-4)


def made_up_rows(*figures: tuple[str, str, str, float, float]) -> list[dict]:
    """Rows of the table as the plots read them: model, precision, method, accuracy and latency."""
    return [
        {"model": model, "precision": precision, "method": method, "accuracy": accuracy, "sweeps": "s", "seeds": "0",
         "images": 64, "ms": latency, "engine_accuracy": accuracy}
        for model, precision, method, accuracy, latency in figures
    ]  # fmt: skip


ROWS = made_up_rows(
    ("a", "w8a8", "repq", 90, 1.0), ("a", "w8a8", "repq+qwt", 92, 1.2), ("a", "w8a8", "repq+cwac", 93, 1.0),
    ("b", "w8a8", "percentile", 80, 2.0), ("b", "w8a8", "percentile+cwac", 85, 2.0), ("b", "w4a4", "percentile+qwt", 70, 2.5),
    ("b", "w4a4", "percentile", 60, 2.1), ("b", "w4a4", "percentile_published", 61, 2.1),
)  # fmt: skip


def test_plots_have_a_panel_per_model_and_a_colour_per_compensation():
    figure = plots.against_bits(ROWS, "top-1")
    assert [note.text for note in figure.layout.annotations] == ["a", "b"]
    points = [trace for trace in figure.data if trace.mode == "markers"]
    assert sum(len(trace.x) for trace in points) == len(ROWS)
    colours = {trace.name: {other.marker.color for other in points if other.name == trace.name} for trace in points}
    assert all(len(found) == 1 for found in colours.values())
    assert len({colour for found in colours.values() for colour in found}) == 3  # PTQ, QwT, CWAC
    shown = [trace.name for trace in figure.data if trace.showlegend]
    assert len(shown) == len(set(shown)) == len(colours)  # each once in the legend


def test_gains_are_on_qwt_under_the_same_conditions():
    found = {(row["model"], row["precision"], row["method"]): row["gain_on_qwt"] for row in plots.gains(ROWS)}
    assert found == {("a", "w8a8", "repq"): -2, ("a", "w8a8", "repq+cwac"): 1, ("b", "w4a4", "percentile"): -10}
    other_images = [dict(row, images=32) if row["method"] == "repq+qwt" else row for row in ROWS]
    assert ("a", "w8a8", "repq") not in {(r["model"], r["precision"], r["method"]) for r in plots.gains(other_images)}
    assert len(plots.gains_on_qwt([], "points").data) == 0


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=12))
def test_the_pareto_front_has_what_no_other_run_beats(points):
    def beats(one, other):
        return one != other and one[0] <= other[0] and one[1] >= other[1]

    assert plots.pareto_front(points) == sorted({p for p in points if not any(beats(other, p) for other in points)})


def test_the_front_is_drawn_per_model():
    figure = plots.against_latency(ROWS, "ms", "engine_accuracy", "ms", "top-1")
    fronts = [list(zip(trace.x, trace.y)) for trace in figure.data if trace.mode == "lines"]
    assert fronts == [[(1.0, 93)], [(2.0, 85)]]


@pytest.mark.slow
def test_pages_under_another_name_are_refused(address):
    ours = address.split("/")[2]
    for name, status in (("evil.example", 403), (ours.replace("127.0.0.1", "localhost"), 200), ("127.0.0.1", 200)):  # port 80
        request = urllib.request.Request(address, headers={"Host": name})
        try:
            code = urllib.request.urlopen(request).status
        except urllib.error.HTTPError as error:
            code = error.code
        assert code == status


@pytest.mark.slow
def test_every_script_is_our_own(address):
    page = urllib.request.urlopen(address).read().decode()
    assert "http://" not in page and "https://" not in page


def test_modules_of_a_sweep_s_run_are_its_own(results, monkeypatch):
    monkeypatch.chdir(results)
    run = next(run for run in all_runs() if run.id == f"{1:016x}")
    layers = [layer for layer in read_layers(run.layers_file) if layer.method == run.method]
    assert run.layers() == layers and layers
    assert run.sweeps == ("sizes",) and run.status == "finished"
    assert [run.error for run in all_runs() if run.status == "failed"] == ["out of luck"]


def test_what_is_read_again_is_what_has_changed(tmp_path):
    calls = []
    read = while_unchanged(lambda path: (calls.append(path), path.read_text())[1])
    path = tmp_path / "file"
    path.write_text("one")
    facts = path.stat()
    assert [read(path), read(path)] == ["one", "one"] and len(calls) == 1
    (tmp_path / "other").write_text("two")
    os.utime(tmp_path / "other", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    os.replace(tmp_path / "other", path)  # as long as before and of the same time
    assert [read(path), read(path)] == ["two", "two"] and len(calls) == 2
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read(path)


def test_a_page_that_is_loaded_again_shows_what_is_new(results, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(results, tmp_path / "copy"))
    before = {run.id: run for run in all_runs()}
    record = json.loads(Path(f"out/cells/{1:016x}/cell.json").read_text())
    record["figures"][record["method"]]["torch/top1"] = 12.5
    Path(f"out/cells/{1:016x}/cell.json").write_text(json.dumps(record))
    shutil.rmtree(f"out/cells/{2:016x}")
    after = {run.id: run for run in all_runs()}
    assert before.keys() - after.keys() == {f"{2:016x}"} and after[f"{1:016x}"].figures["torch/top1"] == 12.5
    assert {run for run in after if after[run] != before[run]} == {f"{1:016x}"}


def test_without_results_nothing_is_served(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "conf", "conf")
    with pytest.raises(Qwt2Error, match="there are no results yet"):
        dashboard.main([])
