"""dvc.yaml against the code: a stage depends on every source file that it imports."""

import ast
from pathlib import Path

import pytest
import yaml

import qwt2
from pipeline.cells import CHAIN

ROOT = Path(__file__).resolve().parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# Wiring that cannot change a result: error texts, file formats, start-up, logs.
WIRING = {"qwt2/__init__.py", "qwt2/errors.py", "qwt2/io.py", "qwt2/registry.py", "pipeline/stage.py", "pipeline/warm.py",
          "pipeline/logs.py", "pipeline/__init__.py"}


def _file(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    if path.is_dir():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else None


def _imports(path: Path) -> set[Path]:
    """Source files of this project that `path` imports, anywhere in it, except for type annotations alone."""
    found = set()
    for node in _run_time_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {_file(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                module = qwt2._LAZY.get(alias.name) if node.module == "qwt2" else None
                found |= {_file(module or node.module), _file(f"{node.module}.{alias.name}")}
    if path.name == "__init__.py" and "Registry(" in path.read_text():
        found |= set(path.parent.glob("*.py"))  # a registry imports what lies beside it
    return {path for path in found if path}


def _run_time_nodes(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from _run_time_nodes(node)


def _closure(path: Path) -> set[str]:
    seen, waiting = set(), [path]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += _imports(current)
    return {str(path.relative_to(ROOT)) for path in seen}


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_the_code_it_runs(stage):
    deps = [dep for dep in STAGES[stage]["deps"] if not dep.startswith("out/")]
    runs = ["trial", "data", "baseline", *CHAIN] if stage == "trial" else [stage]  # trial runs the others by their names
    needed = set().union(*(_closure(ROOT / "pipeline" / f"{name}.py") for name in runs)) - WIRING
    missing = {file for file in needed if not any(file == dep or file.startswith(f"{dep}/") for dep in deps)}
    assert not missing


@pytest.mark.parametrize("stage", STAGES)
def test_dependencies_exist(stage):
    deps = [dep for dep in STAGES[stage]["deps"] if not dep.startswith("out/")]
    assert [dep for dep in deps if not (ROOT / dep).exists()] == []
