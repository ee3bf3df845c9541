"""dvc.yaml against the code: a change of a source file re-runs the stages that run it, and no others."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.build import code_changes, code_hashes
from pipeline.stages import resolve
from pipeline.sweeps.cells import CHAIN

pytestmark = pytest.mark.xdist_group("dag")  # one worker hashes the code

ROOT = Path(__file__).resolve().parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
RUN = {"data", "baseline", *CHAIN}
# Imports, each in a fork that has only third-party modules so far, the files of each stage; prints what was then loaded.
IMPORT = """
import importlib, json, os, sys
import torch, timm, hydra, onnx
for stage, modules in json.load(sys.stdin).items():
    if os.fork() == 0:
        for module in modules:
            importlib.import_module(module)
        loaded = [name for name in sys.modules if name.split(".")[0] in ("pipeline", "qwt2")]
        print(json.dumps([stage, [os.path.relpath(sys.modules[name].__file__) for name in loaded]]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    for package in ("pipeline", "qwt2"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / code_hashes.LOCK, folder)
    return folder


@pytest.fixture(scope="module")
def unchanged(code) -> dict[str, str]:
    """The hashes before a test changes anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_hashes, "ROOT", code)
        return hashes()


@pytest.fixture
def sources(code, monkeypatch) -> Path:
    """A copy of the code, whose hashes are taken; a test leaves it as it was."""
    monkeypatch.setattr(code_hashes, "ROOT", code)
    return code


def hashes() -> dict[str, str]:
    return yaml.safe_load(resolve.code()[resolve.config_path("code")])["code"]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_watches_its_configuration_and_the_hash_of_its_code(stage):
    declared = STAGES[stage]
    module = code_hashes.MODULES.get(stage, "pipeline.stages.resolve")
    assert declared["cmd"].split()[:3] == ["python", "-m", module]
    if stage == "resolve":
        assert declared["deps"] == ["conf", "pipeline", "qwt2", "requirements.lock"] and "params" not in declared
        return
    assert all(dep.startswith("out/") for dep in declared.get("deps", []))
    watched = {file: keys for param in declared["params"] for file, keys in param.items()}
    assert watched.pop("out/resolved/code.yaml") == [f"code.{stage}"]
    (configuration,) = watched
    assert configuration == "params.yaml" if stage == "trial" else configuration.startswith(f"out/resolved/{stage}")


def test_every_stage_has_a_hash_of_the_modules_that_it_runs():
    assert hashes().keys() == code_hashes.MODULES.keys() == STAGES.keys() - {"resolve"}
    trial = code_hashes.sources(["trial"])
    assert all(code_hashes.sources([stage]).items() <= trial.items() for stage in RUN)


@pytest.mark.slow
def test_what_the_files_of_a_stage_import_is_among_them():
    files = {stage: {*code_hashes.sources([stage]), *code_hashes.WIRING} for stage in code_hashes.MODULES}
    names = {stage: sorted(module(file) for file in found if file.endswith(".py")) for stage, found in files.items()}
    done = subprocess.run([sys.executable, "-c", IMPORT], input=json.dumps(names), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = dict(map(json.loads, done.stdout.splitlines()))
    assert loaded.keys() == files.keys()
    assert {stage: set(found) - files[stage] for stage, found in loaded.items()} == {stage: set() for stage in files}


def module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_imports_by_a_name_made_at_run_time_are_those_accounted_for():
    """In `code_hashes` (lazy names, registries), as third-party modules (engines), or by the hash of one's own model."""
    calls = re.compile(r"(?<!self\.)(import_module|__import__|run_module|run_path)\(")  # not of a method of one's own
    names = {*code_hashes.sources(code_hashes.MODULES), *code_hashes.WIRING}
    found = {name for name in names if name.endswith(".py") and calls.search((ROOT / name).read_text())}
    elsewhere = {"qwt2/engines/__init__.py", "qwt2/classification/models.py"}
    assert found == {"qwt2/__init__.py", "qwt2/registry.py"} | elsewhere


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, stages",
    [
        ("qwt2/folding/fold.py", {"quantize", "trial"}),
        ("qwt2/evaluation/costs.py", {"quantize", "trial"}),
        ("qwt2/evaluation/latency.py", {"evaluate", "trial"}),
        ("qwt2/classification/training.py", RUN - {"data"} | {"trial"}),
        ("qwt2/data/digits.py", RUN | {"trial"}),
        ("qwt2/quantization/methods/repq.py", {"quantize", "trial"}),
        ("qwt2/engines/openvino.py", {"quantize", "evaluate", "trial"}),
        ("qwt2/compensation/methods/cwac.py", {"quantize", "evaluate", "report", "trial"}),
        ("qwt2/report/results.py", {"quantize", "evaluate", "report", "trial"}),
        ("qwt2/report/templates/page.css", {"report"}),
        ("pipeline/stages/quantization.py", {"quantize", "trial"}),
        ("pipeline/build/schema.py", {"trial"}),
        ("pipeline/comparison/dashboard.py", set()),
        ("qwt2/__main__.py", set()),
        ("qwt2/errors.py", set()),
        ("qwt2/registry.py", RUN | {"report", "trial"}),
    ],
)
def test_a_change_of_code_changes_the_hashes_of_the_stages_that_run_it(file, stages, sources, unchanged):
    content = (sources / file).read_bytes()
    (sources / file).write_bytes(content + (b"\nanother = 1\n" if file.endswith(".py") else b"\n"))
    after = hashes()
    (sources / file).write_bytes(content)
    assert {stage for stage in unchanged if unchanged[stage] != after[stage]} == stages
    assert hashes() == unchanged


EVERY = {*RUN, "report", "trial"}


@pytest.mark.parametrize(
    "file, old, new, changes",
    [
        ("qwt2/folding/fold.py", '"""', '"""Another word. ', False),
        ("qwt2/folding/fold.py", "\n\n\n", "\n\n\n\n# a remark\n\n", False),
        ("qwt2/folding/fold.py", "\n", "\r\n", False),
        ("requirements.lock", "# This file", "# Another remark: this file", False),
        ("requirements.lock", "\nnumpy==", "\nnumpy==1", True),
        ("pipeline/common/stage.py", 'sys.modules["torch"].set_num_threads(count)', "pass", True),
        ("qwt2/io.py", "os.replace(", "os.rename(", True),
    ],
)
def test_words_change_no_hash_and_pins_and_threads_change_every_one(file, old, new, changes, sources, unchanged):
    content = (sources / file).read_bytes()
    assert old.encode() in content
    (sources / file).write_bytes(content.replace(old.encode(), new.encode(), 1))
    after = hashes()
    (sources / file).write_bytes(content)
    assert {stage for stage in unchanged if unchanged[stage] != after[stage]} == (EVERY if changes else set())


def test_a_stage_that_will_run_again_names_the_files_that_changed(sources, unchanged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = {stage: {"params": {"out/resolved/code.yaml": {f"code.{stage}": digest}}} for stage, digest in unchanged.items()}
    ran["data"] = {"params": {"out/resolved/code.yaml": {"code.data": "0" * 32}}}  # made somewhere else
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": ran}))
    code_changes.remember()
    file, content = sources / "qwt2/evaluation/latency.py", (sources / "qwt2/evaluation/latency.py").read_text()
    file.write_text(content + "another = 1\n")
    try:
        said = code_changes.messages()
        code_changes.remember()
        assert code_changes.messages() == said  # until the stages have run
    finally:
        file.write_text(content)
    assert said == [
        "data runs again: its code changed",
        *(f"{stage} runs again: qwt2/evaluation/latency.py changed" for stage in ("evaluate", "trial")),
    ]


def test_a_new_method_is_a_change_of_code(sources, unchanged):
    file = sources / "qwt2/compensation/methods/another.py"
    file.write_text("from qwt2.evaluation.latency import measure\n")
    after = hashes()
    running = {stage for stage in after if "qwt2/evaluation/latency.py" in code_hashes.sources([stage])}
    file.unlink()
    assert {stage for stage in unchanged if unchanged[stage] != after[stage]} == {"quantize", "evaluate", "report", "trial"}
    assert running == {"quantize", "evaluate", "report", "trial"}


def test_experimental_tasks_are_of_no_stage_s_code_but_of_their_own_cells(sources):
    module, file = "pipeline.experimental.language", "pipeline/experimental/gpt.py"
    assert not [name for name in code_hashes.sources(code_hashes.MODULES.keys() - {"trial"}) if name.startswith("pipeline/experimental/")]
    before, content = code_hashes.fingerprint(RUN, [module]), (sources / file).read_bytes()
    (sources / file).write_bytes(content + b"\nanother = 1\n")
    after = code_hashes.fingerprint(RUN, [module])
    (sources / file).write_bytes(content)
    assert before != after and code_hashes.fingerprint(RUN, [module]) == before


def test_imports_are_followed_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(code_hashes, "ROOT", tmp_path)
    monkeypatch.setitem(code_hashes.MODULES, "one", "pipeline.stage_one")
    files = {
        "requirements.lock": "numpy==1\n",
        "pipeline/__init__.py": "",
        "pipeline/stage_one.py": "import os, torch, qwt2.one\ndef f():\n    from qwt2.two import g\n",
        "qwt2/__init__.py": "",
        "qwt2/one.py": "if TYPE_CHECKING:\n    from qwt2.unused import T\nfrom qwt2 import fold\n",
        "qwt2/folding/__init__.py": "",
        "qwt2/folding/fold.py": "from qwt2.deep.er import leaf\n",
        "qwt2/deep/__init__.py": "",
        "qwt2/deep/er/__init__.py": "",
        "qwt2/deep/er/leaf.py": "from . import twig\nfrom ..side import a\n",
        "qwt2/deep/er/twig.py": "import qwt2.one\n",
        "qwt2/deep/er/table.csv": "1",
        "qwt2/deep/er/unused.py": "",
        "qwt2/deep/side.py": "",
        "qwt2/two/__init__.py": "from qwt2.registry import Registry\n",
        "qwt2/two/method.py": "",
        "qwt2/registry.py": "class Registry: ...\n",
        "qwt2/unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = code_hashes.sources(["one"])
    assert found.keys() == {name for name in files if "unused" not in name} - code_hashes.WIRING


def test_rooms_import_one_way():
    rooms = ["common", "tasks", "experimental", "build", "stages", "sweeps", "comparison"]
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "pipeline").glob("*/**/*.py")}
    for name, path in files.items():
        imported = {found for found in code_hashes._imports(path) if found.startswith("pipeline.")}
        later = rooms[rooms.index(name.split(".")[1]) + 1 :]
        assert not {found for found in imported if found.split(".")[1] in later}, name
