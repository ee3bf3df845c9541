"""Which source files a stage runs, read off their import statements, and a hash of what is in them.

Nothing is imported for it. What a module imports anywhere counts, whether or not a run comes to that line.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from importlib.util import resolve_name
from pathlib import Path

from pipeline.common.unchanged import while_unchanged
from qwt2 import _LAZY

ROOT = Path(__file__).resolve().parents[2]
# The modules of the stages by whose code DVC decides.
MODULES = {
    stage: f"pipeline.stages.{stage}" for stage in ("data", "baseline", "ptq", "compensate", "fold", "evaluate", "report")
} | {"trial": "pipeline.sweeps.trial"}
# Wiring that cannot change a result: error texts, file formats, start-up, logs.
WIRING = {
    *("qwt2/__init__.py", "qwt2/errors.py", "qwt2/io.py", "qwt2/registry.py"),
    *("pipeline/__init__.py", "pipeline/common/stage.py", "pipeline/common/warm.py", "pipeline/common/locks.py"),
    "pipeline/common/logs.py",
}


def fingerprint(stages: Iterable[str]) -> str:
    """One hash of all that these stages run."""
    text = "".join(f"{name}\0{digest}\n" for name, digest in sources(stages).items())
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def sources(stages: Iterable[str]) -> dict[str, str]:
    """The files that can change what these stages do, in order, with a hash of each one's bytes."""
    files = closure(file for stage in stages for file in _files(MODULES[stage]))
    names = {path.relative_to(ROOT).as_posix(): path for path in files}
    return {name: _digest(names[name]) for name in sorted(names.keys() - WIRING)}


def closure(paths: Iterable[Path]) -> set[Path]:
    """These files and all that they import, directly or not, and what else than Python lies in those packages."""
    seen: set[Path] = set()
    waiting = [*paths]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += _needed(current)
    return seen


def _needed(path: Path) -> set[Path]:
    """What a file brings along, itself."""
    if path.suffix != ".py":
        return set()
    names = _imports(path)
    found = {file for name in names for file in _files(name)}
    if path.name == "__init__.py":
        beside = {file for file in path.parent.glob("[!.]*") if file.is_file()}
        takes_all = "qwt2.registry.Registry" in names  # a registry imports what lies beside it
        found |= {file for file in beside if takes_all or file.suffix != ".py"}
    return found


def _files(name: str) -> Iterator[Path]:
    """The source file of a module of this project, or of what is in it, and those of the packages around it."""
    path = ROOT
    for part in name.split("."):
        path /= part
        if (path / "__init__.py").is_file():
            yield path / "__init__.py"
        elif path.with_suffix(".py").is_file():
            yield path.with_suffix(".py")


@while_unchanged  # every cell of a sweep asks
def _imports(path: Path) -> set[str]:
    """Names of all that a file may import, except for type annotations alone: modules, and what is in them."""
    found: set[str] = set()
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in _run_time_nodes(ast.parse(path.read_bytes(), path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found | {module for name, module in _LAZY.items() if {"qwt2", f"qwt2.{name}"} & found}


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from _run_time_nodes(node)


@while_unchanged
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
