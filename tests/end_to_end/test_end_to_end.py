"""The whole chain at a tiny size, through `dvc repro` in a temporary clone."""

import hashlib
import json
import sys
from importlib.util import source_from_cache
from pathlib import Path

import onnx
import pytest

from benchmarks import tiny_chain
from benchmarks.tiny_chain import edit, run
from pipeline.build import code_hashes
from qwt2.report.results import read_rows

pytestmark = pytest.mark.e2e

MODELS = ("vit_micro", "resnet_micro")
# Python imports it first: it notes every file that a stage, or a fork of it, opens, in a file named after the stage.
TRACER = """
import os, sys
stage = next((word for word in sys.orig_argv if word.startswith("pipeline.stages.")), None)
file = stage and os.open(os.path.join(os.path.dirname(__file__), stage), os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        os.write(file, os.path.abspath(arguments[0]).encode() + b"\\n")

if stage:
    sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    return tiny_chain.make(tmp_path_factory.mktemp("clone"), MODELS)


def hashes(folder: Path) -> dict[str, str]:
    """Of the arrays in `folder`; its JSON holds durations."""
    files = [path for path in folder.iterdir() if path.suffix != ".json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stages_run(output: str) -> set[str]:
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}


@pytest.mark.timeout(840)
def test_repro_builds_everything_and_reruns_only_what_reads_a_change(clone):
    tracer = clone / "tracer"
    tracer.mkdir()
    (tracer / "sitecustomize.py").write_text(TRACER)
    traced = tiny_chain.environment(clone) | {"PYTHONPATH": f"{tracer}:{clone}"}
    first = run(clone, "dvc", "repro", env=traced)
    cells = {f"{m}-w3a3" for m in MODELS}
    assert {f"{s}@{c}" for s in ("quantize", "evaluate") for c in cells} < stages_run(first.stdout)
    check_summary(clone)
    check_page(clone)
    for stage in ("data", "baseline", "quantize", "evaluate", "report"):
        check_sources(clone, stage)

    assert stages_run(run(clone, "dvc", "repro").stdout) == set()

    # A comment re-runs `resolve` alone; a key that only `evaluate` and `report` read re-runs those.
    with (clone / "conf/config.yaml").open("a") as file:
        file.write("# nothing new\n")
    assert stages_run(run(clone, "dvc", "repro").stdout) == {"resolve"}
    edit(clone / "conf/grid.yaml", lambda c: c["grid"].update(model=["vit_micro"]))
    assert stages_run(run(clone, "dvc", "repro").stdout) == {"resolve", "report"}
    assert {row.model for row in read_rows(clone / "results/summary.csv")} == {"vit_micro"}

    # So does code: a stage whose hash of code it leaves alone does not run.
    with (clone / "qwt2/report/templates/page.css").open("a") as file:
        file.write("/* nothing new */\n")
    assert stages_run(run(clone, "dvc", "repro").stdout) == {"resolve", "report"}
    with (clone / "qwt2/folding/fold.py").open("a") as file:
        file.write("# nothing new\n")
    assert stages_run(run(clone, "dvc", "repro").stdout) == {"resolve"}
    with (clone / "qwt2/folding/fold.py").open("a") as file:
        file.write("another = 1\n")
    again = run(clone, "dvc", "repro", "baseline@vit_micro").stdout
    assert stages_run(again) == {"resolve"} and "quantize@vit_micro-w3a3 runs again: qwt2/folding/fold.py changed" in again
    assert json.loads(run(clone, "dvc", "status", "--json").stdout) == {
        stage: [{"changed deps": {"out/resolved/code.yaml": {f"code.{stage.partition('@')[0]}": "modified"}}}]
        for stage in ("quantize@vit_micro-w3a3", "trial")
    }

    # A stage that runs again, with one worker or several, writes the same results.
    folder = clone / "out/quantize/vit_micro-w3a3"
    before = hashes(folder)
    run(clone, sys.executable, "-m", "pipeline.stages.quantize", "vit_micro-w3a3")
    assert before == hashes(folder) and before


def check_sources(clone: Path, stage: str) -> None:
    """See that the hash of a stage's code covers every file of the project that the stage has opened."""
    opened = (clone / f"tracer/pipeline.stages.{stage}").read_text().splitlines()
    found = {Path(source_from_cache(name) if name.endswith(".pyc") else name) for name in opened}
    files = {path.relative_to(clone).as_posix() for path in found if path.is_relative_to(clone)}
    code = {name for name in files if name.startswith(("pipeline/", "qwt2/"))}
    assert f"pipeline/stages/{stage}.py" in code
    assert code <= {*code_hashes.sources([stage]), *code_hashes.WIRING}


def check_summary(clone: Path) -> None:
    rows = read_rows(clone / "results/summary.csv")
    found = {(r.model, r.method, r.engine, r.metric) for r in rows}
    for model, ptq in (("vit_micro", "repq"), ("resnet_micro", "percentile")):
        assert (model, "fp32", "torch", "top1") in found
        for method in (ptq, f"{ptq}+qwt", f"{ptq}+cwac"):
            for engine in ("onnxruntime", "openvino"):
                for metric in ("top1", "agreement", "engine_top1_delta", "engine_mismatch_steps", "latency_ratio_to_ptq"):
                    assert (model, method, engine, metric) in found
        assert (model, f"{ptq}_published+cwac", "torch", "top1") in found
    figures = {(r.model, r.method, r.engine, r.metric): r.value for r in rows}
    for model, ptq in (("vit_micro", "repq"), ("resnet_micro", "percentile")):
        assert figures[model, f"{ptq}+cwac", "torch", "extra_params"] == 0
        assert figures[model, f"{ptq}+qwt", "torch", "extra_params"] > 0
        assert figures[model, f"{ptq}+qwt", "torch", "added_modules"] > 0 == figures[model, f"{ptq}+cwac", "torch", "added_modules"]
        for name in ("cwac", "refit"):
            sizes = [figures[model, method, "openvino", "file_bytes"] for method in (ptq, f"{ptq}+{name}")]
            assert abs(sizes[1] - sizes[0]) < 1e-3 * sizes[0]  # names of constants may be longer or shorter
            plain, folded = (clone / f"out/quantize/{model}-w3a3/{method}-seed0.onnx" for method in ("ptq", name))
            assert contents(plain) == contents(folded)
        assert not (clone / f"out/quantize/{model}-w3a3/qwt_global-seed0.onnx").exists()  # in simulation only


def contents(path: Path) -> list:
    """Types and shapes of a file's constants, and its operations."""
    graph = onnx.load(path).graph
    return [[(item.data_type, *item.dims) for item in graph.initializer], [node.op_type for node in graph.node]]


def check_page(clone: Path) -> None:
    page = (clone / "results/report.html").read_text()
    assert "vit_micro" in page and "resnet_micro" in page
    assert "At no cost in the engine" in page.split("<nav>")[0] and 'id="recovery"' in page


@pytest.mark.timeout(300)
def test_mistakes_end_with_one_sentence_and_exit_code_2(clone):
    edit(clone / "conf/precision/w3a3.yaml", lambda c: c.update(weight_bits=9))
    failed = run(clone, sys.executable, "-m", "pipeline.stages.resolve", check=False)
    edit(clone / "conf/precision/w3a3.yaml", lambda c: c.update(weight_bits=3))
    assert failed.returncode == 2
    assert failed.stderr.strip() == "error: precision: weight_bits is 9; use a whole number from 2 to 8"

    edit(clone / "conf/grid.yaml", lambda c: c["grid"].update(precision=["w3a9"]))
    failed = run(clone, sys.executable, "-m", "pipeline.stages.resolve", check=False)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "'precision/w3a9'" in failed.stderr and "w8a8" in failed.stderr
