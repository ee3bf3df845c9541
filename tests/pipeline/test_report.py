"""Stage `report` and the README's table: the figures shown are the figures measured, all of them, and no others."""

import csv
import json
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from benchmarks import synthetic
from pipeline.comparison import benchmark_tables, grid_tables, markdown
from pipeline.comparison.static_page import static_page
from pipeline.stages.report import collect, report
from qwt2.errors import Qwt2Error
from qwt2.evaluation import machine
from qwt2.report import findings
from qwt2.report.page import Conditions, render, render_model
from qwt2.report.results import COLUMNS, Results, read_rows, write_rows

pytestmark = pytest.mark.xdist_group("report")  # one worker makes the grid's results

ROOT = Path(__file__).parents[2]
BEGIN, END = markdown.marked("results", "").split("\n\n")
CONDITIONS = Conditions({"digits": None}, [256], {"batch_size": 1, "threads": 2}, [9], [synthetic.MACHINE])


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with ``out`` of the whole grid, and ``results`` made from it."""
    folder = tmp_path_factory.mktemp("built")
    synthetic.write_out(folder / "out")
    report(synthetic.CONFIG, folder / "out", folder / "results")
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    """Outputs of a single cell."""
    synthetic.write_out(tmp_path / "out", models=["vit_micro"], precisions=["w3a3"])
    return tmp_path / "out"


def config(models=("vit_micro",), precisions=("w3a3",)):
    return synthetic.CONFIG | {"grid": {"model": list(models), "precision": list(precisions)}}


class Page(HTMLParser):
    """Tags with their attributes, and each model's table as rows of (attributes, text)."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.tables, self._cell = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "table":
            self._rows = self.tables.setdefault(attributes["data-model"], []) if "data-model" in attributes else []
        elif tag == "tr":
            self._rows.append((attributes, []))
        elif tag in ("td", "th"):
            self._cell = [attributes, ""]
            self._rows[-1][1].append(self._cell)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell[1] += data


def test_summary_holds_exactly_the_measured_figures(built):
    expected = set()
    for model in synthetic.MODELS:
        for precision in synthetic.PRECISIONS:
            lines = (built / "out" / "evaluate" / f"{model}-{precision}" / "rows.csv").read_text().splitlines()
            expected |= set(lines[1:])
        expected.add(f"classification,digits,{model},fp32,fp32,torch,top1,{synthetic.FP32[model]},,percent,1")
        expected.add(f"classification,digits,{model},fp32,fp32,torch,top5,99.8,,percent,1")
    header, *lines = (built / "results" / "summary.csv").read_text().splitlines()
    assert header == ",".join(COLUMNS)
    assert set(lines) == expected and len(lines) == len(expected)
    assert [line.split(",")[:7] for line in lines] == sorted(line.split(",")[:7] for line in lines)


def test_every_figure_of_the_summary_is_in_its_place_on_the_page(built):
    page = Page((built / "results" / "report.html").read_text(encoding="utf-8"))
    shown = set()
    for model, ((_, groups), _, *rows) in page.tables.items():
        engines = [name for attributes, name in groups[1:] for _ in range(int(attributes["data-all"]))]
        for attributes, (_, (method, _), *cells) in rows:
            for engine, (cell, text) in zip(engines, cells, strict=True):
                if measured := re.fullmatch(r"(\S+) (\S+) (\S+)(?:, std (\S+))?, n = (\d+)", cell["title"]):
                    key = (model, attributes["data-precision"], method["data-value"], engine, measured[1])
                    shown.add((*key, measured[2], measured[4] or "", measured[3], measured[5]))
                    assert cell["data-value"] == measured[2] and text not in ("", "–")
    names = {"torch": "Simulation", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    with (built / "results" / "summary.csv").open(newline="") as file:
        expected = {
            (row["model"], row["precision"], row["method"], names[row["engine"]])
            + tuple(row[name] for name in ("metric", "value", "std", "unit", "n"))
            for row in csv.DictReader(file)
        }
    assert shown == expected


def test_shown_figures_are_rounded_as_their_unit_asks():
    rows = [
        synthetic.figure("vit", "fp32", "fp32", "torch", "top1", 90.0),
        synthetic.figure("vit", "w4a4", "repq", "torch", "top1", 83.916, 0.404, 3),
        synthetic.figure("vit", "w4a4", "repq+cwac", "torch", "top1", 85.0, 0.0, 3),
        synthetic.figure("vit", "w4a4", "repq+cwac", "torch", "extra_params", 55_872),
        synthetic.figure("vit", "w4a4", "repq+cwac", "openvino", "latency_ms", 0.71234),
        synthetic.figure("vit", "w4a4", "repq+cwac", "openvino", "latency_ratio_to_ptq", 1.0213),
        synthetic.figure("vit", "w4a4", "repq+cwac", "openvino", "file_bytes", 1_310_512),
    ]
    page = Page(render(Results(rows), [], CONDITIONS))
    _, _, fp32, ptq, cwac = page.tables["vit"]
    assert [text for _, text in fp32[1][2:]] == ["90.00", "", *"––––"]
    assert [text for _, text in ptq[1][2:]] == ["83.92 ± 0.40", "", *"––––"]
    assert [text for _, text in cwac[1][2:]] == [
        *("85.00 ± 0.00", "+1.08", "55.9 k", "0.712", "1.021", "1,310.5"),
    ]
    classes = [cell.get("class", "") for cell, _ in cwac[1]]
    assert "good" in classes[3] and "miss" in classes[6]  # a gain; a latency over the limit


def test_page_loads_nothing(built):
    text = (built / "results" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    policies = [attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'") and "http" not in policies[0]
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style
    assert len(text) < 1_500_000


def test_links_within_the_page_lead_somewhere(built):
    tags = Page((built / "results" / "report.html").read_text(encoding="utf-8")).tags
    identifiers = [attributes["id"] for _, attributes in tags if "id" in attributes]
    targets = {attributes["href"][1:] for _, attributes in tags if "href" in attributes}
    assert targets and targets <= set(identifiers)
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.slow
def test_same_figures_give_the_same_page(built, tmp_path):
    report(synthetic.CONFIG, built / "out", tmp_path)
    for name in ("summary.csv", "report.html"):
        assert (tmp_path / name).read_bytes() == (built / "results" / name).read_bytes()
    rows = read_rows(tmp_path / "summary.csv")
    page = render(Results(rows), [], CONDITIONS)
    random.Random(1).shuffle(rows)
    assert render(Results(rows), [], CONDITIONS) == page


def test_names_are_text_not_markup():
    rows = [synthetic.figure("<i>vit</i>", "w4a4", '"><script>bad()', "torch", "top1", 80.0)]
    page = render(Results(rows), [], CONDITIONS)
    assert "<i>vit" not in page and "<script>bad" not in page
    assert "&lt;i&gt;vit" in page


def test_stale_cells_are_no_results(out):
    synthetic.write_cell(out, "vit_micro", "w8a8")
    synthetic.write_cell(out, "swin_micro", "w3a3")
    (out / "evaluate" / "resnet_micro-w3a3").mkdir()
    report(config(), out, out.parent)
    rows = read_rows(out.parent / "summary.csv")
    assert {(row.model, row.precision) for row in rows} == {("vit_micro", "w3a3"), ("vit_micro", "fp32")}
    assert "swin_micro" not in (out.parent / "report.html").read_text(encoding="utf-8")


def test_missing_cell_is_named(out):
    with pytest.raises(Qwt2Error, match=r"vit_micro-w4a4/rows.csv does not exist; run"):
        report(config(precisions=("w3a3", "w4a4")), out, out.parent / "results")
    assert not (out.parent / "results").exists()


def facts(dataset: str) -> dict[str, dict[str, str]]:
    return {"vit_micro": {"task": "classification", "dataset": dataset}}


def test_figures_of_another_cell_are_refused(out):
    rows = out / "evaluate" / "vit_micro-w3a3" / "rows.csv"
    write_rows(rows, synthetic.cell_rows("vit_micro", "w8a8"))
    with pytest.raises(Qwt2Error, match=r"w3a3/rows.csv has a row of vit_micro, w8a8, digits, but belongs to .*w3a3"):
        collect(out, facts("digits"), [("vit_micro", "w3a3")])


def test_figures_of_another_dataset_are_refused(out):
    with pytest.raises(Qwt2Error, match="belongs to vit_micro, w3a3, imagefolder"):
        collect(out, facts("imagefolder"), [("vit_micro", "w3a3")])


def test_layers_of_another_cell_are_refused(out):
    path = out / "evaluate" / "vit_micro-w3a3" / "layers.csv"
    path.write_text(synthetic.layers_csv("vit_micro", "w8a8"))
    with pytest.raises(Qwt2Error, match="layers.csv has a row of vit_micro, w8a8"):
        report(config(), out, out.parent / "results")
    assert not (out.parent / "results").exists()


def test_baseline_without_accuracy_is_refused(out):
    (out / "baseline" / "vit_micro" / "metrics.json").write_text('{"top1": 91.0}')
    with pytest.raises(Qwt2Error, match="metrics.json has no top5"):
        report(config(), out, out.parent / "results")


def hand_made(cells: dict[str, tuple[float, float, float, float]], fp32: float = 92.0) -> Results:
    """One model, precision -> (PTQ, its std, CWAC, its std)."""
    rows = [synthetic.figure("vit", "fp32", "fp32", "torch", "top1", fp32)]
    for precision, (ptq, ptq_std, cwac, cwac_std) in cells.items():
        rows.append(synthetic.figure("vit", precision, "repq", "torch", "top1", ptq, ptq_std, 3))
        rows.append(synthetic.figure("vit", precision, "repq+cwac", "torch", "top1", cwac, cwac_std, 3))
    return Results(rows)


def test_cells_that_cwac_does_not_improve_are_told_with_what_is_known():
    results = hand_made({"w8a8": (91.9, 0.3, 91.8, 0.1), "w4a4": (90, 0.1, 91, 0.1), "w3a3": (80, 0.2, 78, 0.2)})
    small, large = findings.not_improved(findings.comparisons(results, "cwac"))
    assert small.startswith("vit-w8a8: 91.90 to 91.80 % (-0.10). Plain PTQ loses only 0.10 points here")
    assert "within one standard deviation" in small
    assert large == "vit-w3a3: 80.00 to 78.00 % (-2.00). "
    page = render(results, [], CONDITIONS)
    assert "In 2 of 3 cells CWAC does not raise mean top-1" in page
    assert "CWAC raises mean top-1 wherever plain PTQ loses 3 points or more: 0 of 1 figures" in page
    assert "Misses: vit-w3a3 80.00 to 78.00 % (-2.00)" in page


def test_headline_and_targets_computed_by_hand():
    results = hand_made({"w8a8": (91.8, 0.1, 91.9, 0.1), "w3a3": (80, 0.2, 86, 0.2), "w2a4": (84, 0.2, 86, 0.2)})
    (sentence,) = findings.headline(results)
    assert sentence == (
        "CWAC raises top-1 in 2 of the 2 cells where plain PTQ loses 3 points or more, by 4.0 points on average; "
        "most on vit-w3a3: 80.00 to 86.00 % (+6.00)."
    )
    fp32, hard, easy, gain, *unmeasured = findings.targets(results)
    assert [fp32.met, hard.met, easy.met, gain.met] == [True] * 4
    assert (hard.evidence, easy.evidence, gain.evidence) == ("w3a3, w2a4", "w8a8", "2 of 2 figures")
    assert {target.met for target in unmeasured} == {None}


@pytest.mark.parametrize(
    ("metric", "engine", "value", "miss"),
    [
        ("engine_top1_delta", "openvino", -0.31, "vit-w3a3 repq+cwac on openvino -0.31"),
        ("latency_ratio_to_ptq", "onnxruntime", 1.03, "vit-w3a3 on onnxruntime 1.030"),
        ("latency_ratio_to_ptq", "onnxruntime", 0.97, "vit-w3a3 on onnxruntime 0.970"),
        ("engine_mismatch_steps", "torch", 2, "vit-w3a3 2 steps"),
        ("engine_mismatch_fraction", "torch", 0.002, "vit-w3a3 0.002 of elements"),
    ],
)
def test_missed_targets_are_shown(metric, engine, value, miss):
    rows = hand_made({"w3a3": (80, 0.2, 86, 0.2)}).rows
    rows.append(synthetic.figure("vit", "w3a3", "repq+cwac", engine, metric, value))
    missed = [target for target in findings.targets(Results(rows)) if target.met is False and target.misses == [miss]]
    assert len(missed) == 1
    assert miss in render(Results(rows), [], CONDITIONS)


def test_weak_model_easy_grid_and_grown_file_miss_their_targets():
    rows = hand_made({"w8a8": (88, 0, 88, 0), "w4a4": (87.8, 0, 88, 0)}, fp32=89.0).rows
    rows.append(synthetic.figure("vit", "w4a4", "repq", "openvino", "file_bytes", 1000))
    rows.append(synthetic.figure("vit", "w4a4", "repq+cwac", "openvino", "file_bytes", 1020))
    fp32, hard, easy, gain, _fold, _engine, _latency, size = findings.targets(Results(rows))
    assert (fp32.met, fp32.misses) == (False, ["vit 89.0 %"])
    assert (hard.met, hard.misses) == (False, ["w8a8 only on none", "w4a4 only on none"])
    assert easy.met is False and gain.met is None
    assert (size.met, size.misses) == (False, ["vit-w4a4 +2.00%"])


def test_operations_in_float_and_modules_left_there_are_listed_once_for_precisions_that_agree(out):
    synthetic.write_cell(out, "vit_micro", "w8a8")
    report(config(precisions=("w3a3", "w8a8")), out, out.parent)
    page = (out.parent / "report.html").read_text(encoding="utf-8")
    section = page[page.index('<section id="operations">') :]
    words = " ".join(re.sub(r"<[^>]+>", " ", section[: section.index("</section>")]).split())
    assert (
        words.count("vit_micro w3a3, w8a8 ONNX Runtime 25 QGemm, 1 QLinearConv 13 LayerNormalization, 6 Softmax") == 1
    )
    assert words.count("pool: GRU stays in float") == 2  # one line an engine


def test_model_page_says_what_the_report_says():
    page = render_model(synthetic.MODEL_REPORT)
    words = " ".join(re.sub(r"<[^>]+>", " ", page[page.index("<body>") : page.index("<script>")]).split())
    assert (
        "repq at W4A4 on 2 images: 3 layers and 1 products in integers, 1 module left in float, a file of 23.0 MB."
        in words
    )
    assert "CWAC raises the SQNR of 2 of 3 modules, by 1.50 dB on average and 3.50 dB at most" in words
    uncompensated = synthetic.MODEL_REPORT | {"compensation": "none", "engines": {}, "float_modules": {}}
    uncompensated["modules"] = [{k: m[k] for k in ("module", "kind", "mismatch")} for m in uncompensated["modules"]]
    page = render_model(uncompensated)
    assert "raises" not in page[: page.index("<script>")] and "no modules left in float" in page
    with_markup = synthetic.MODEL_REPORT | {"model": "<script>x"}
    assert "<script>x" not in render_model(with_markup)


def test_captions_state_the_conditions(built):
    page = (built / "results" / "report.html").read_text(encoding="utf-8")
    words = " ".join(re.sub(r"<[^>]+>", " ", page[page.index("<body>") :]).split())
    assert "2,000 validation images" in words
    assert "over n = 3 calibration seeds of 256 images each" in words
    assert "one batch of 1 on 1 thread, median of 200 runs" in words
    assert "Imaginary CPU 3000 (x86_64, 2 cores), integer instruction sets: avx2, avx512_vnni" in words
    assert "onnxruntime 1.32.0" in words
    assert "different set-ups" not in words


def test_several_machines_are_all_stated(out):
    synthetic.write_cell(out, "vit_micro", "w8a8")
    other = synthetic.MACHINE | {"cpu": "Another CPU"}
    (out / "evaluate" / "vit_micro-w8a8" / "machine.json").write_text(json.dumps(other))
    report(config(precisions=("w3a3", "w8a8")), out, out.parent)
    page = (out.parent / "report.html").read_text(encoding="utf-8")
    assert "Imaginary CPU 3000" in page and "Another CPU" in page and "2 different set-ups" in page


def test_this_machine_describes_itself():
    description = machine.describe()
    assert description["cpu"] and description["cores"] >= 1
    assert {"python", "onnxruntime", "openvino", "torch"} <= set(description["versions"])
    assert json.loads(json.dumps(description)) == description == machine.describe()


def run_stage(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pipeline.stages.report"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_stage_writes_both_files_or_says_in_one_sentence_why_not(out):
    (out / "resolved").mkdir()
    (out / "resolved" / "report.yaml").write_text(yaml.safe_dump(config()))
    done = run_stage(out.parent)
    assert (done.returncode, done.stderr) == (0, "")
    results = out.parent / "results"
    written = {path.name: path.read_bytes() for path in results.iterdir()}
    assert set(written) == {"summary.csv", "report.html", "metrics.json", "top1.csv", "bbox_ap.csv"}
    assert written["bbox_ap.csv"] == b"cell,bbox_ap\n" and written["top1.csv"].startswith(
        b"cell,top1\nvit_micro fp32 fp32,"
    )

    rows = out / "evaluate" / "vit_micro-w3a3" / "rows.csv"
    rows.write_text(rows.read_text().replace(",dB,", ",decibel,"))
    failed = run_stage(out.parent)
    assert failed.returncode == 2
    assert re.fullmatch(r"error: \S*rows.csv, line \d+: logits_sqnr_db is in 'decibel', .*\n", failed.stderr)
    assert {path.name: path.read_bytes() for path in results.iterdir()} == written


@pytest.mark.slow
def test_stage_needs_no_torch():
    code = "import sys, pipeline.stages.report, pipeline.comparison.readme; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_readme_table_by_hand():
    figures = [
        ("fp32", "fp32", "torch", "top1", 91.26, None, 1),
        ("w4a4", "repq", "torch", "top1", 83.94, 0.36, 3),
        ("w4a4", "repq+cwac", "torch", "top1", 85.66, 0.44, 3),
        ("w4a4", "repq+qwt", "torch", "top1", 84.04, 0.3, 3),
        ("w4a4", "repq+cwac", "openvino", "top1", 85.7, 0.4, 3),
        ("w4a4", "repq+cwac", "openvino", "latency_ratio_to_ptq", 1.004, None, 1),
        ("w4a4", "repq_published", "torch", "top1", 84.0, 0.1, 3),
        ("w8a8", "repq", "torch", "top1", 91.2, 0.04, 3),
    ]
    rows = [synthetic.figure("vit", *figure) for figure in figures]
    heading, _, *lines = grid_tables.classifiers_table(Results(rows)).splitlines()
    assert heading.startswith("| Model | Bits | fp32 | PTQ | PTQ + QwT | PTQ + CWAC | CWAC on ONNX Runtime |")
    assert lines == [
        "| vit (repq) | W8A8 | 91.3 | 91.2 ± 0.0 | – | – | – | – | – | – |",
        "| vit (repq) | W4A4 | 91.3 | 83.9 ± 0.4 | 84.0 ± 0.3 | 85.7 ± 0.4 | – | 85.7 ± 0.4 | – | 1.00 |",
    ]


def test_means_table_by_hand():
    figures = [
        ("a", "fp32", "fp32", "torch", "top1", 90.0),
        ("b", "fp32", "fp32", "torch", "top1", 95.0),
        ("a", "w4a4", "repq", "torch", "top1", 80.0),
        ("b", "w4a4", "percentile", "torch", "top1", 85.0),
        ("a", "w4a4", "repq+cwac", "torch", "top1", 86.0),
        ("b", "w4a4", "percentile+cwac", "torch", "top1", 86.5),
        ("b", "w4a4", "percentile+qwt", "torch", "top1", 90.0),  # not measured on the other model: no mean
        ("a", "w4a4", "repq_published", "torch", "top1", 10.0),
        ("a", "w4a4", "repq+cwac", "openvino", "latency_ratio_to_ptq", 1.0),
        ("b", "w4a4", "percentile+cwac", "openvino", "latency_ratio_to_ptq", 1.02),
    ]
    rows = [synthetic.figure(*figure) for figure in figures]
    detector = [("fp32", "fp32", "bbox_ap", 70.0), ("w8a8", "repq", "bbox_ap", 69.0)]
    rows += [
        synthetic.figure("det", precision, method, "torch", metric, value)._replace(task="detection")
        for precision, method, metric, value in detector
    ]
    heading, _, *lines = grid_tables.means_table(Results(rows)).splitlines()
    assert heading.startswith(
        "| Models | Bits | fp32 | PTQ | PTQ + QwT | PTQ + CWAC | Latency of CWAC ÷ PTQ, ONNX Runtime |"
    )
    assert lines == [
        "| 2 in classification: top-1 | W4A4 | 92.5 | 82.5 | – | 86.2 | – | 1.01 |",
        "| 1 in detection: box AP | W8A8 | 70.0 | 69.0 | – | – | – | – |",
    ]


def test_detection_table_by_hand():
    figures = [
        ("fp32", "fp32", "torch", "bbox_ap", 70.04, None, 1),
        ("fp32", "fp32", "torch", "segm_ap", 65.0, None, 1),
        ("w4a4", "repq", "torch", "bbox_ap", 60.0, 0.3, 3),
        ("w4a4", "repq", "torch", "segm_ap", 55.5, 0.3, 3),
        ("w4a4", "repq+cwac", "torch", "bbox_ap", 64.016, 0.4, 3),
        ("w4a4", "repq+cwac", "openvino", "engine_bbox_ap_delta", -0.12, None, 1),
        ("w4a4", "repq+cwac", "openvino", "latency_ratio_to_ptq", 1.004, None, 1),
        ("w8a8", "repq", "torch", "bbox_ap", 70.1, 0.04, 3),
    ]
    rows = [synthetic.figure("det", *figure)._replace(task="detection") for figure in figures]
    heading, _, *lines = grid_tables.detectors_table(Results(rows)).splitlines()
    assert heading.startswith(
        "| Model | Bits | fp32 | PTQ | PTQ + CWAC | CWAC recovers |"
    )  # no column for what nobody measured
    assert lines == [
        "| det (repq) | W8A8 | 70.0 / 65.0 | 70.1 / – | – / – | – | – | – | – | – |",
        "| det (repq) | W4A4 | 70.0 / 65.0 | 60.0 / 55.5 | 64.0 / – | 40% | – | -0.1 | – | 1.00 |",
    ]


def test_readme_keeps_everything_outside_its_markers(built, tmp_path):
    path, table = (
        tmp_path / "README.md",
        grid_tables.classifiers_table(Results(read_rows(built / "results/summary.csv"))),
    )
    path.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\nthe end\n")
    markdown.replace(path, "results", table)
    assert path.read_text() == f"# Title\n\n{BEGIN}\n{table}\n{END}\nthe end\n"
    assert table.count("\n| ") == 1 + len(synthetic.MODELS) * len(synthetic.PRECISIONS)
    assert len({line.count("|") for line in table.splitlines()}) == 1
    markdown.replace(path, "results", "new")
    assert path.read_text() == f"# Title\n\n{BEGIN}\nnew\n{END}\nthe end\n"


def test_the_page_of_the_default_run_shows_its_plots(built, tmp_path):
    page = tmp_path / "report.md"
    results = Results(read_rows(built / "results" / "summary.csv"))
    text = static_page(results, page)
    plots = re.findall(r"!\[[^]]+\]\((\S+)\)", text)
    assert len(plots) == 2 * len(synthetic.MODELS) and {tmp_path / plot for plot in plots} == set(
        tmp_path.rglob("*.svg")
    )
    for plot in plots:
        drawn = ElementTree.parse(tmp_path / plot)  # a code host shows it as it is: no script, nothing from elsewhere
        tags = {element.tag.rpartition("}")[2] for element in drawn.iter()}
        assert not tags & {"script", "image", "foreignObject"} and "currentColor" not in (tmp_path / plot).read_text()
        words = {element.text for element in drawn.iter() if element.tag.endswith("text")}
        assert {"PTQ", "PTQ + QwT", "PTQ + CWAC", "w8a8"} <= words
    drawn = {plot: (tmp_path / plot).read_text() for plot in plots}
    assert static_page(results, page) == text and all((tmp_path / plot).read_text() == drawn[plot] for plot in plots)


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", BEGIN * 2 + END])
def test_readme_without_markers_is_left_alone(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(Qwt2Error, match="README.md must hold the line"):
        markdown.replace(path, "results", "new")
    assert path.read_text() == text


def peer(variant: str, ratio: str, sqnr: str) -> dict[str, str]:
    return {
        "engine": "openvino", "model": "vit", "batch": "8", "variant": variant, "setting": "fast", "latency_ms": "20.04",
        "latency_ratio_to_ptq": ratio, "logits_sqnr_db": sqnr, "cpu": "CPU", "instruction_sets": "avx2", "threads": "1",
        "versions": "openvino=1",
    }  # fmt: skip


def test_peers_table_by_hand():
    rows = [
        peer("ptq", "1.0", "30.04"),
        peer("cwac", "1.25", "31.06"),
        peer("nncf", "1.5", "29"),
        peer("fp32", "3", "120"),
    ]
    facts, _, _, _, line = benchmark_tables.peers_table(rows).splitlines()
    assert facts == "CPU (avx2), 1 thread; openvino=1"
    assert line == "| OpenVINO | vit | 8 | 20.0 | 2.40 | – | 0.80 | – | – | NNCF: fast | 1.20 | 30.0 | 31.1 | 29.0 |"
    rows = [row | {"engine": "inductor"} for row in rows]
    *_, line = benchmark_tables.peers_table(rows).splitlines()
    assert line == "| Inductor | vit | 8 | 20.0 | 2.40 | – | 0.80 | – | – | – | – | 30.0 | 31.1 | – |"


def test_costs_go_between_their_own_markers(tmp_path):
    path = tmp_path / "README.md"
    empty = f"a\n{markdown.marked('costs', '')}\nb\n"
    path.write_text(empty)
    benchmark_tables.replace_benchmarks(path, tmp_path)
    assert path.read_text() == empty  # nothing measured, nothing written
    facts = "deit,W4A4,512,2,CPU"
    (tmp_path / "calibration-cost-x.csv").write_text(
        "method,implementation,seconds,cpu_seconds,float_passes,added_mb,model,precision,images,threads,cpu\n"
        f"quantize,qwt2,1.5,3.0,0.3,200,{facts}\n"
        f"cwac,qwt2,10.0,20.0,2.0,400,{facts}\ncwac,stored,70.0,90.0,9.0,1200,{facts}\n"
    )
    benchmark_tables.replace_benchmarks(path, tmp_path)
    assert path.read_text().splitlines()[2:8] == [
        "deit, W4A4, 512 images; CPU, 2 threads",
        "",
        "| Step | Seconds | CPU seconds | Float passes | MB added | stored ÷ this, CPU seconds | stored ÷ this, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| quantize | 1.5 | 3.0 | 0.3 | 200 | – | – |",
        "| cwac | 10.0 | 20.0 | 2.0 | 400 | 4.5 | 3.0 |",
    ]


def test_peers_go_between_their_own_markers(tmp_path):
    path = tmp_path / "README.md"
    empty = f"a\n{markdown.marked('peers', '')}\nb\n"
    path.write_text(empty)
    benchmark_tables.replace_benchmarks(path, tmp_path)
    assert path.read_text() == empty  # nothing measured, nothing written
    row = peer("cwac", "1", "30")
    (tmp_path / "peers-x.csv").write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    benchmark_tables.replace_benchmarks(path, tmp_path)
    assert path.read_text() == f"a\n{markdown.marked('peers', benchmark_tables.peers_table([row]))}\nb\n"


def committed(path: str) -> str | None:
    """A file's last committed content: a new run's latencies differ, and must not fail the tests."""
    shown = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True)
    return shown.stdout if shown.returncode == 0 else None


@pytest.mark.skipif(committed("results/summary.csv") is None, reason="results/summary.csv is not committed here")
def test_committed_readme_shows_the_committed_results(tmp_path):
    (tmp_path / "summary.csv").write_text(committed("results/summary.csv"))
    results, text = Results(read_rows(tmp_path / "summary.csv")), committed("README.md") + committed("docs/results.md")
    assert markdown.marked("means", grid_tables.means_table(results)) in text
    assert markdown.marked("results", grid_tables.classifiers_table(results.of_task("classification"))) in text
    assert markdown.marked("detection", grid_tables.detectors_table(results.of_task("detection"))) in text


@pytest.mark.skipif(committed("docs/report.md") is None, reason="docs/report.md is not committed here")
def test_committed_page_of_the_default_run_shows_the_committed_results(tmp_path):
    (tmp_path / "summary.csv").write_text(committed("results/summary.csv"))
    results = Results(read_rows(tmp_path / "summary.csv")).of_task("classification")
    page = static_page(results, tmp_path / "report.md")
    assert markdown.marked("report", page) in committed("docs/report.md")
    for plot in re.findall(r"\((\S+\.svg)\)", page):
        assert (tmp_path / plot).read_text() == committed(f"docs/{plot}")


def test_the_zoo_s_table_counts_what_came_through(tmp_path):
    def row(source: str, model: str, outcome: str, **figures: str) -> dict[str, str]:
        columns = dict.fromkeys(
            (*benchmark_tables._ZOO.values(), *benchmark_tables._ZOO_TOOLS, "reason", "cpu", "versions"), ""
        )
        return {**columns, "source": source, "family": "f", "model": model, "outcome": outcome, **figures}

    whole = {"integer_macs_percent": "100.0", "blocks": "0", "cwac_passes": "4.5"}
    rows = [
        row("timm", "a", "through", integer_macs_percent="90.0", ptq_db="30.1", blocks="3", cwac_passes="2.0",
            nncf="runs", nncf_db="20.5", quantize_static="fails: no such thing"),
        row("timm", "b", "refused", reason="it is random", nncf="runs", quantize_static="runs"),
        row("timm", "c", "not taken", reason="too large"),
        row("torchvision", "d", "through", **whole),
    ]  # fmt: skip
    text = benchmark_tables.zoo_table(rows)
    assert text.startswith("Through, of those taken: timm: 1 of 2, torchvision: 1 of 1; on average 95.0 %")
    assert "; QwT has units in 1 of 2; CWAC costs at most 3.5 float passes in 1 and 4.5 in all." in text
    assert (
        "Of 2 models that other tools got too, 1 come through here, 2 through NNCF and 1 through quantize_static."
        in text
    )
    assert "| 20.5 | fails |" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and len({line.count("|") for line in table}) == 1
    assert "| timm: f | b | refused: it is random |" in text and "| timm: f | a | through | – |" in text


def real_row(variant: str, near: str, **figures: str) -> dict[str, str]:
    return {
        "task": "classification", "model": "lite", "engine": "openvino", "variant": variant, "top1": "74.34",
        "agreement": near, "logits_sqnr_db": "20.04", "latency_cpu_ms": "2.5", "file_bytes": "5240000", **figures,
    }  # fmt: skip


def test_of_another_tools_settings_the_table_shows_the_nearest_to_full_precision():
    rows = [
        real_row("fp32", "100", logits_sqnr_db="inf"), real_row("ptq (this library)", "91", latency_cpu_ms="2.0"),
        real_row("cwac (this library)", "90"), real_row("NNCF (fast bias correction)", "93.2"),
        real_row("NNCF (full bias correction)", "94.25"),
        real_row("NNCF (no SmoothQuant)", "94.25", logits_sqnr_db="19"),
    ]  # fmt: skip
    lines = benchmark_tables.real_peers_table(rows).splitlines()[2:]
    assert [line.split(" | ")[2] for line in lines] == [
        "fp32", "ptq (this library)", "cwac (this library)", "NNCF (full bias correction)"
    ]  # fmt: skip
    assert lines[-1] == "| OpenVINO | lite | NNCF (full bias correction) | 74.3 / 94.2 | 20.0 | 2.50 | 1.25 | 5.2 |"


def test_real_networks_go_between_their_own_markers(tmp_path):
    page = tmp_path / "results.md"
    page.write_text(markdown.marked("real", ""))
    common = "retrieval,mini,openvino,CPU,avx2,openvino=1"
    (tmp_path / "real-grid-x.csv").write_text(
        "precision,method,recall1,cosine,task,model,engine,cpu,instruction_sets,versions\n"
        f"fp32,fp32,57.5,,{common.replace('openvino,', 'torch,', 1)}\n"
        f"w8a8,repq,57.25,0.99456,{common}\nw8a8,repq+cwac,56.5,0.9938,{common}\nw4a4,repq,1.0,0.5,{common}\n"
    )
    benchmark_tables.replace_benchmarks(page, tmp_path)
    assert page.read_text().splitlines()[1:-1] == [
        "CPU (avx2); openvino=1",
        "",
        "| Model | Bits | Engine | fp32 | PTQ | PTQ + CWAC |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        "| mini | W8A8 | OpenVINO | 57.5 | 57.2 / 0.9946 | 56.5 / 0.9938 |",
        "| mini | W4A4 | OpenVINO | 57.5 | 1.0 / 0.5000 | – |",
    ]


def test_the_readme_shows_real_networks_on_the_first_engine_only():
    common = {"model": "lite", "cpu": "CPU", "instruction_sets": "avx2", "versions": "onnx=1", "task": "classification"}
    rows = [
        common | {"precision": precision, "method": method, "engine": engine, "top1": top1, "agreement": near}
        for precision, method, engine, top1, near in [
            ("fp32", "fp32", "torch", "74.34", ""), ("w8a8", "mse", "torch", "74", "90"),
            ("w8a8", "mse", "openvino", "73", "91"), ("w8a8", "mse", "onnxruntime", "72", "92"),
        ]
    ]  # fmt: skip
    table = benchmark_tables.real_table_of_one_engine(rows).splitlines()[2:]
    assert table[2:] == ["| lite | W8A8 | ONNX Runtime | 74.3 | 72.0 / 92.0 |"]


@pytest.mark.parametrize(
    ("page", "parts"),
    [("README.md", benchmark_tables.README_PARTS), ("docs/results.md", benchmark_tables.PARTS)],
)
def test_committed_pages_show_the_committed_benchmarks(tmp_path, page, parts):
    folder = "results/benchmarks/"
    listed = subprocess.run(["git", "ls-tree", "--name-only", "HEAD", folder], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        (tmp_path / Path(name).name).write_text(committed(name))
    copy = tmp_path / "page.md"
    copy.write_text(committed(page) or "")
    benchmark_tables.replace_benchmarks(copy, tmp_path, parts)
    assert copy.read_text() == (committed(page) or "")
