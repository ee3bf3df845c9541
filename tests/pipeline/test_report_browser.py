"""The page in a real browser with no network: charts drawn, tables sorted and filtered, no error, any width, dark."""

import csv
import io
import re
import statistics
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from benchmarks import synthetic
from pipeline.stages.report import report
from qwt2.report.page import render_model

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

# Vega-Lite says so of every chart as wide as its container and as high as its rows, and then does what was asked.
KNOWN = 'WARN Dropping "fit-y" because spec has discrete height.'
DRAWN = "document.querySelectorAll('.chart svg').length >= document.querySelectorAll('.chart').length"
HELPERS = """
const pause = milliseconds => new Promise(done => setTimeout(done, milliseconds));
const all = selector => [...document.querySelectorAll(selector)];
const choose = (element, value) => {
  element.value = value;
  for (const type of ["input", "change"]) element.dispatchEvent(new Event(type, {bubbles: true}));
};
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    synthetic.write_out(folder / "out")
    report(synthetic.CONFIG, folder / "out", folder / "results")
    return (folder / "results" / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def visit(page, tmp_path, chromium_browser):
    """Run a script (the body of an async function) in the open page; returns what it returns, once nothing failed."""
    return lambda script, **window: run_in(chromium_browser, page, tmp_path, script, **window)


@pytest.fixture
def visit_model(tmp_path, chromium_browser):
    """The same in the page of one quantized model."""
    page = render_model(synthetic.MODEL_REPORT)
    return lambda script, **window: run_in(chromium_browser, page, tmp_path, script, **window)


def run_in(browser: Browser, html: str, folder: Path, script: str, width: int = 1280, scheme: str = "light"):
    path, problems = folder / "page.html", []
    path.write_text(html, encoding="utf-8")
    with browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme) as page:
        page.on("console", lambda message: message.type in ("error", "warning") and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_function(DRAWN)
        found = page.evaluate("async () => {" + HELPERS + script + "}")
    assert set(problems) <= {KNOWN}
    return found


def test_every_chart_is_drawn_and_nothing_is_fetched(visit):
    found = visit("""
      return {
        marks: Object.fromEntries(all(".chart").map(chart =>
          [chart.id, chart.querySelectorAll("svg .mark-symbol path, svg .mark-rect path").length])),
        resources: performance.getEntriesByType("resource").map(entry => entry.name),
        specs: Object.keys(specs),
      };
    """)
    models, precisions = len(synthetic.MODELS), len(synthetic.PRECISIONS)
    assert found["resources"] == []
    assert sorted(found["marks"]) == sorted([*found["specs"], "modules-chart"])
    assert len(found["marks"]) == models * 4 + 2  # accuracy, two engines' latency and size each; what is recovered; the modules
    for name in synthetic.MODELS:
        assert found["marks"][f"accuracy-{name}"] == 5 * precisions
        assert found["marks"][f"latency-openvino-{name}"] == 3 * precisions
        assert found["marks"][f"size-{name}"] == 3 * precisions
    assert found["marks"]["modules-chart"] >= 2 * 26


def test_tables_sort_and_filter(visit):
    found = visit("""
      const table = document.querySelector("table[data-model=vit_micro]");
      const rows = () => [...table.tBodies[0].rows].filter(row => !row.hidden);
      const heading = [...table.querySelectorAll(".headings th")].find(th => th.textContent.trim() === "agree %");
      const values = () => rows().map(row => row.cells[heading.cellIndex].dataset.value);
      const form = document.getElementById("filter").elements;
      const shown = () => rows().map(row => [row.dataset.precision, row.dataset.kind]);
      const top5 = all("th.secondary")[0];
      const result = {before: shown()};
      heading.firstElementChild.click();
      result.ascending = values();
      heading.firstElementChild.click();
      result.descending = values();
      result.mark = heading.getAttribute("aria-sort");
      table.querySelector(".headings th button").click();
      result.again = shown();
      choose(form.precision, "w3a3");
      result.w3a3 = shown();
      choose(form.kind, "PTQ + CWAC");
      result.both = shown();
      choose(form.precision, "");
      result.cwac = shown();
      choose(form.kind, "");
      result.all = shown();
      result.narrow = top5.offsetWidth;
      form.secondary.click();
      result.wide = top5.offsetWidth;
      result.spans = [...table.tHead.rows].map(row =>
        [...row.cells].reduce((sum, cell) => sum + (cell.offsetWidth ? cell.colSpan : 0), 0));
      return result;
    """)
    known = sorted(float(value) for value in found["ascending"] if value)
    assert len(known) == 5 * len(synthetic.PRECISIONS)
    assert [float(value) for value in found["ascending"][:-1]] == known
    assert [float(value) for value in found["descending"][:-1]] == known[::-1]
    assert found["ascending"][-1] == found["descending"][-1] == ""  # fp32 has no agreement: last either way
    assert found["mark"] == "descending"
    assert found["again"] == found["before"] == found["all"]
    assert found["before"][0] == ["fp32", "fp32"]
    assert [row[0] for row in found["before"][1::5]] == list(synthetic.PRECISIONS)
    assert {row[0] for row in found["w3a3"]} == {"fp32", "w3a3"} and len(found["w3a3"]) == 6
    assert found["both"] == [["fp32", "fp32"], ["w3a3", "PTQ + CWAC"]]
    assert [row[0] for row in found["cwac"]] == ["fp32", *synthetic.PRECISIONS]
    assert found["narrow"] == 0 and found["wide"] > 0
    assert found["spans"][0] == found["spans"][1]


WIDE = 1366
MODULES = """
      const chart = document.getElementById("modules-chart");
      const form = document.getElementById("module-choice").elements;
      const shown = () => ({
        labels: [...chart.querySelectorAll(".role-axis-label text")].map(text => text.textContent).filter(t => /[a-z]/.test(t)),
        rows: [...document.querySelectorAll("#modules-table tbody tr")].map(row => [...row.cells].map(c => c.textContent)),
        headings: [...document.querySelectorAll("#modules-table .headings th")].map(th => th.textContent),
        panels: [...chart.querySelectorAll(".role-axis-title text")].map(text => text.textContent),
        crosses: chart.querySelectorAll('.mark-symbol path[fill="#dc2626"]').length,
      });
"""


def test_module_chart_and_table_follow_their_selects(visit):
    found = visit(MODULES + """
      const result = {cwac: shown(), options: [...form.method.options].map(option => option.value)};
      choose(form.precision, "w8a8");
      await pause(500);
      result.w8a8 = shown();
      choose(form.method, "PTQ + QwT");
      await pause(500);
      result.qwt = shown();
      choose(form.method, "PTQ");
      await pause(500);
      result.ptq = shown();
      return result;
    """, width=WIDE)
    modules = synthetic.module_names()
    assert found["options"] == ["PTQ + CWAC", "PTQ", "PTQ + QwT"]
    assert found["cwac"]["labels"] == modules == [row[0] for row in found["cwac"]["rows"]]
    assert len(found["cwac"]["panels"]) == 4 and found["cwac"]["crosses"] >= 1
    assert found["w8a8"]["labels"] == modules and found["w8a8"]["rows"] != found["cwac"]["rows"]
    rejected = found["cwac"]["rows"][1]
    assert rejected[1] == "layer" and rejected[-1].startswith("rejected in 3 of 3 seeds (no gain on held-out images: 9.00 dB")
    assert found["cwac"]["headings"][2:7] == ["before dB", "after dB", "gain dB", "α", "β %"]
    assert [row[0] for row in found["qwt"]["rows"]] == [f"blocks.{number}" for number in range(6)]
    assert found["qwt"]["panels"] == ["SQNR of the output, dB"]
    assert found["ptq"]["labels"] == modules and found["ptq"]["panels"] == ["distance of the engine, output steps"]


def test_the_figures_of_the_table_are_those_of_the_record(visit, page):
    found = visit(MODULES + "return [form.model.value, form.precision.value, shown()];")
    model, precision, shown = found
    records = list(csv.DictReader(io.StringIO(synthetic.layers_csv(model, precision))))
    headings = shown["headings"]
    for row in shown["rows"]:
        own = [r for r in records if r["method"].endswith("+cwac") and r["module"] == row[0]]
        cells = dict(zip(headings, row, strict=True))
        assert cells["OpenVINO steps"] == f"{float(own[0]['openvino_steps']):.2f}"
        if own[0]["kind"] == "product":
            assert cells["before dB"] == cells["α"] == ""
            continue
        mean = {name: statistics.fmean(float(r[name]) for r in own) for name in ("sqnr_before_db", "alpha_p50", "beta_p50")}
        assert float(cells["before dB"]) == pytest.approx(mean["sqnr_before_db"], abs=0.006)
        assert float(cells["α"].split()[0]) == pytest.approx(mean["alpha_p50"], rel=1e-3)
        assert float(cells["β %"].split()[0]) == pytest.approx(50 * mean["beta_p50"], rel=1e-3, abs=1e-6)


def test_page_of_one_model(visit_model):
    found = visit_model(MODULES + """
      const result = {before: shown(), resources: performance.getEntriesByType("resource").length};
      const gain = [...all("#modules-table .headings th")].find(th => th.textContent === "gain dB");
      gain.firstElementChild.click();
      gain.firstElementChild.click();
      result.sorted = [...all("#modules-table tbody tr")].map(row => row.cells[gain.cellIndex].dataset.value);
      result.hidden = [...document.querySelectorAll("#module-choice label")].every(label => label.offsetWidth === 0);
      result.words = document.querySelector("main").innerText;
      result.headline = document.querySelector(".lead").textContent;
      return result;
    """, width=WIDE)
    assert found["resources"] == 0 and found["hidden"]
    assert found["before"]["labels"] == [record["module"] for record in synthetic.MODEL_REPORT["modules"]]
    known = [float(value) for value in found["sorted"] if value]
    assert known == sorted(known, reverse=True) and len(known) == 3 and found["sorted"][-1] == ""
    for words in ("rnn: GRU stays in float", "49 FullyConnected", "25 MVN", "rejected (no gain"):
        assert words in found["words"]
    assert "the gate rejected blocks.0.fc2" in found["headline"]


@pytest.mark.parametrize("width", [420, 1366])
@pytest.mark.parametrize("which", ["visit", "visit_model"])
def test_page_fits_its_window(request, which, width):
    found = request.getfixturevalue(which)(
        "return [innerWidth, document.documentElement.scrollWidth, ...all('.chart svg').map(svg =>"
        " svg.getBoundingClientRect().right - svg.closest('figure').getBoundingClientRect().right)];",
        width=width,
    )
    window, needed, *overhang = found
    assert needed <= window
    assert max(overhang) <= 0


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_charts_take_the_colours_of_the_page(visit, scheme):
    found = visit(
        """
        const colour = (element, property) => getComputedStyle(element)[property];
        return {
          text: colour(document.documentElement, "color"),
          ground: colour(document.documentElement, "backgroundColor"),
          labels: [...new Set(all(".role-axis-label text").map(text => colour(text, "fill")))],
        };
        """,
        scheme=scheme,
    )
    assert found["labels"] == [found["text"]]
    assert (_brightness(found["text"]) > _brightness(found["ground"])) == (scheme == "dark")


def _brightness(colour: str) -> int:
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3])
