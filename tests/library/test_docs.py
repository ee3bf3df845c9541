"""What README and docs/ say is true: every code block runs, every command and file that they name exists, the pages build."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from qwt2.__main__ import parser
from qwt2.compensation.methods import COMPENSATIONS
from qwt2.quantization.methods import PTQ_METHODS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT = 120


def blocks(path: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(path.read_text()) if found == language]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


def commands() -> list[str]:
    """The lines of all shell blocks, without comments; a backslash continues a line."""
    text = "\n".join(block for page in PAGES for block in blocks(page, "sh")).replace("\\\n", " ")
    return sorted({shlex.join(words) for line in text.splitlines() if (words := shlex.split(line, comments=True))})


def test_every_block_is_of_a_known_kind():
    """Blocks of these languages are checked below; text is a picture."""
    assert {language for page in PAGES for language, _ in FENCE.findall(page.read_text())} == {
        "python",
        "sh",
        "toml",
        "text",
    }
    assert all(page.read_text().count("\n```") == 2 * len(FENCE.findall(page.read_text())) for page in PAGES)


@pytest.fixture
def given() -> dict:
    """What the README's lines presuppose: a model of the user's, and images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 5)).eval()
    calibration = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    return {
        "model": model,
        "calibration": calibration,
        "example_input": calibration[0][:1],
        "images": calibration[0].numpy(),
    }


MODULE = re.compile(r"# (my_package/(\w+)\.py)\n")  # the first line of a block that is a file of a user's package


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.name)
def test_python_blocks_run_one_after_the_other(page, given, tmp_path, monkeypatch, user_package):
    if page.name == "huggingface.md":
        pytest.importorskip("transformers", reason="transformers is in the extra `peers` only")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "summary.csv", tmp_path / "results")  # what `make repro` has left
    names = given if page.name == "README.md" else {}
    files, scripts = [], []
    for block in blocks(page, "python"):
        (files if MODULE.match(block) else scripts).append(block)
    if files:
        [metadata] = blocks(page, "toml")
        user_package(files, tomllib.loads(metadata)["project"])
    for block in scripts:
        exec(compile(block, page.name, "exec"), names)
    if page.name == "README.md":
        assert names["logits"].shape == (8, 5)


@pytest.fixture
def user_package(tmp_path, monkeypatch):
    """Install a package of a user's: its files on the path, and its distribution's metadata beside them."""
    folder, modules = tmp_path / "site", set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    for registry in (PTQ_METHODS, COMPENSATIONS):
        registry.names()  # imports what this library has
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    def install(files: list[str], project: dict) -> None:
        for file in files:
            path = folder / MODULE.match(file)[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file)
        metadata = folder / f"my_package-{project['version']}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        entries = [f"[{group}]\n" + "".join(f"{name} = {module}\n" for name, module in names.items())
                   for group, names in project["entry-points"].items()]  # fmt: skip
        (metadata / "entry_points.txt").write_text("\n".join(entries))
        importlib.invalidate_caches()

    yield install
    for name in set(sys.modules) - modules:
        if name.startswith("my_package"):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_shell_lines_name_what_exists(command):
    """Commands may take hours: what is checked is that they would start."""
    program, *arguments = shlex.split(command)
    CHECKS[program](arguments)


def check_make(arguments: list[str]) -> None:
    done = run("make", "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install" and arguments[1].startswith(".")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\w+", arguments[1])) <= extras.keys()


def check_qwt2(arguments: list[str]) -> None:
    parser().parse_args(arguments)


def check_torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(arguments)
    assert options.module and options.training_script == "qwt2"
    check_qwt2(options.training_script_args)


def check_python(arguments: list[str]) -> None:
    """The configuration that a sweep's overrides make is composed for the first of its values."""
    assert arguments[0] == "-m"
    if arguments[1].endswith(".verdict"):
        assert run(sys.executable, *arguments[:2], "--help").stdout.count(arguments[2]) > 1
        return
    if arguments[1].startswith("benchmarks."):  # these need packages of another environment
        assert (ROOT / f"{arguments[1].replace('.', '/')}.py").is_file()
        assert all((ROOT / "conf" / "model" / f"{model}.yaml").is_file() for model in arguments[2:])
        return
    assert arguments[1].endswith(".experiment")
    overrides = [override.split(",")[0] for override in arguments[2:] if override != "-m"]
    done = run(sys.executable, *arguments[:2], "--cfg", "job", *overrides)
    assert done.returncode == 0, done.stderr


def check_dvc(arguments: list[str]) -> None:
    assert arguments[:3] == ["exp", "run", "trial"]
    options = run(sys.executable, "-m", "dvc", *arguments[:2], "--help").stdout
    assert all(f"{option}" in options for option in arguments if option.startswith("-"))
    import yaml

    known = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert {value.split("=")[0] for value in arguments if "=" in value} <= known.keys()


def check_activate(arguments: list[str]) -> None:
    assert arguments == [".venv/bin/activate"] and "VENV := .venv\n" in (ROOT / "Makefile").read_text()


CHECKS = {
    "make": check_make, "pip": check_pip, "qwt2": check_qwt2, "torchrun": check_torchrun, "python": check_python,
    ".venv-real/bin/python": check_python, "dvc": check_dvc, ".": check_activate,
}  # fmt: skip


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)


def test_entry_points_in_the_guide_are_those_of_the_registries():
    from qwt2.engines import ENGINES

    [block] = blocks(ROOT / "CONTRIBUTING.md", "toml")
    assert set(tomllib.loads(block)["project"]["entry-points"]) == {PTQ_METHODS.group}
    assert all(registry.group in block for registry in (PTQ_METHODS, COMPENSATIONS, ENGINES))


def test_files_that_the_pages_name_exist():
    """Words in backticks that look like a path of this tree, and links."""
    missing = []
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"`((?:qwt2|conf|tests|docs|results|pipeline)/[\w./*-]*)`", text):
            if (
                "NAME" not in name
                and not name.startswith(("results/report", "docs/site"))
                and not list(ROOT.glob(name.rstrip("/")))
            ):
                missing.append((page.name, name))
        for name in re.findall(r"`(test_\w+\.py)`", text):
            if not list((ROOT / "tests").rglob(name)):
                missing.append((page.name, name))
        for link in re.findall(r"\]\(([^)#]+)", text):
            if "://" not in link and not (page.parent / link).exists():
                missing.append((page.name, link))
    assert missing == []


def test_code_that_the_method_page_names_exists():
    """Names beside equations: each stands in a file that the page names."""
    text = (ROOT / "docs" / "method.md").read_text()
    files = {name for name in re.findall(r"`(qwt2/[\w/]+\.py)`", text)}
    source = "\n".join((ROOT / name).read_text() for name in sorted(files | {"qwt2/quantization/layers.py"}))
    named = {word for code in re.findall(r"`([A-Z_a-z][\w.]*)(?:\(.*?\)|\[.*?\])?`", text) for word in code.split(".")}
    absent = {word for word in named if not re.search(rf"\b{word}\b", source)}
    assert absent <= {"q", "f", "qwt2", "block_q"}


@pytest.mark.slow
def test_the_pages_build_without_a_warning_and_load_nothing_from_elsewhere(tmp_path):
    done = run(sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    html = {path.name: path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "method.html", "api.html", "timm.html", "extending.html"} <= html.keys()
    for name, text in html.items():
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"?(https?:[^\"> ]+)", text)
        loaded += re.findall(r"<link[^>]*\bhref=\"?(https?:[^\"> ]+)", text)
        assert loaded == [], name
        assert ":func:" not in text and ":class:" not in text
    assert 'id="qwt2.compensation.methods.cwac.CWAC"' in html["api.html"]
