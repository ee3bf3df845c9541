"""The page in a real browser with no network: charts drawn, tables sorted and filtered, no error, any width, dark."""

import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import pytest

import synthetic
from pipeline.report import report

CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=30000", "--dump-dom"),
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian package chromium)"),
    pytest.mark.timeout(180),
]

# Vega-Lite says so of every chart as wide as its container and as high as its rows, and then does what was asked.
KNOWN = 'WARN Dropping "fit-y" because spec has discrete height.'

# Before anything else runs: keep every complaint.
LISTEN = """
<script>
const problems = [];
for (const level of ["error", "warn"]) {
  const before = console[level];
  console[level] = (...words) => { problems.push(words.join(" ")); before(...words); };
}
for (const type of ["error", "unhandledrejection", "securitypolicyviolation"]) {
  addEventListener(type, event => problems.push(`${type}: ${event.message || event.reason || event.blockedURI}`));
}
</script>
"""

# Last: wait for the charts, do what the test asks, and leave what it found in the page.
ACT = """
<script>
const pause = milliseconds => new Promise(done => setTimeout(done, milliseconds));
const all = selector => [...document.querySelectorAll(selector)];
const choose = (element, value) => {
  element.value = value;
  for (const type of ["input", "change"]) element.dispatchEvent(new Event(type, {bubbles: true}));
};
(async () => {
  for (let i = 0; i < 200 && all(".chart svg").length < all(".chart").length; i++) await pause(50);
  const found = await (async () => {SCRIPT})();
  const probe = document.createElement("pre");
  probe.id = "probe";
  probe.textContent = encodeURIComponent(JSON.stringify({found, problems}));
  document.body.append(probe);
})();
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    synthetic.write_out(folder / "out")
    report(synthetic.CONFIG, folder / "out", folder / "results")
    return (folder / "results" / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def visit(page, tmp_path):
    """Run a script (the body of an async function) in the open page; returns what it returns, once nothing failed."""

    def run(script: str, *flags: str):
        path = tmp_path / "page.html"
        body, _, end = page.replace("<head>", "<head>" + LISTEN, 1).rpartition("</body>")
        path.write_text(body + ACT.replace("SCRIPT", script) + "</body>" + end, encoding="utf-8")
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [CHROMIUM, *FLAGS, *flags, profile, path.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=150, check=True).stdout
        probe = re.search(r'<pre id="probe">(.*?)</pre>', shown)
        assert probe, "the page's script did not come to its end"
        answer = json.loads(unquote(probe[1]))
        assert set(answer["problems"]) <= {KNOWN}
        return answer["found"]

    return run


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
    assert sorted(found["marks"]) == sorted(found["specs"])
    assert len(found["marks"]) == models * 4 + 1  # accuracy, two engines' latency and size each; the layers
    for name in synthetic.MODELS:
        assert found["marks"][f"accuracy-{name}"] == 5 * precisions
        assert found["marks"][f"latency-openvino-{name}"] == 3 * precisions
        assert found["marks"][f"size-{name}"] == 3 * precisions
    assert found["marks"]["layers"] >= 2 * 26


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


def test_module_chart_follows_its_selects(visit):
    found = visit("""
      const chart = document.getElementById("layers");
      const select = name => [...chart.querySelectorAll(".vega-bind")]
        .find(bind => bind.textContent.trim().startsWith(name)).querySelector("select");
      const labels = () => [...chart.querySelectorAll(".role-axis-label text")].map(text => text.textContent);
      const modules = () => labels().filter(label => /[a-z]/.test(label));
      const paths = () => [...chart.querySelectorAll(".mark-rule line")].map(line => line.getAttribute("x2")).join();
      const result = {cwac: modules(), options: [...select("method").options].map(option => option.value)};
      const w2a4 = paths();
      choose(select("precision"), "w8a8");
      await pause(500);
      result.moved = paths() !== w2a4;
      choose(select("method"), "PTQ + QwT");
      await pause(500);
      result.qwt = modules();
      return result;
    """)
    assert found["options"] == ["PTQ + CWAC", "PTQ + QwT"]
    assert found["cwac"][0] == "patch_embed.proj" and found["cwac"][-1] == "head" and len(found["cwac"]) == 26
    assert found["moved"]
    assert found["qwt"] == [f"blocks.{number}" for number in range(6)]


@pytest.mark.parametrize("width", [420, 1366])
def test_page_fits_its_window(visit, width):
    found = visit(
        "return [innerWidth, document.documentElement.scrollWidth, ...all('.chart svg').map(svg =>"
        " svg.getBoundingClientRect().right - svg.closest('figure').getBoundingClientRect().right)];",
        f"--window-size={width},900",
    )
    window, needed, *overhang = found
    assert needed <= window
    assert max(overhang) <= 0


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_charts_take_the_colours_of_the_page(visit, scheme):
    number = {"dark": 0, "light": 1}[scheme]
    found = visit(
        """
        const colour = (element, property) => getComputedStyle(element)[property];
        return {
          text: colour(document.documentElement, "color"),
          ground: colour(document.documentElement, "backgroundColor"),
          labels: [...new Set(all(".role-axis-label text").map(text => colour(text, "fill")))],
        };
        """,
        f"--blink-settings=preferredColorScheme={number}",
    )
    assert found["labels"] == [found["text"]]
    assert (_brightness(found["text"]) > _brightness(found["ground"])) == (scheme == "dark")


def _brightness(colour: str) -> int:
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3])
