"""Find the source files that a stage runs, from their import statements, and hash their content.

No module is imported for this. Every import statement counts, whether or not a run reaches it. A Python file is hashed
by its syntax tree, so that comments, docstrings and formatting change no hash. Libraries are hashed by their pinned
versions.
"""

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from importlib.util import resolve_name
from pathlib import Path

from pipeline.common.unchanged import while_unchanged
from qwt2 import _LAZY

ROOT = Path(__file__).resolve().parents[2]
# The modules of the stages that DVC re-runs when their code changes.
MODULES = {stage: f"pipeline.stages.{stage}" for stage in ("data", "baseline", "quantize", "evaluate", "report")} | {
    "trial": "pipeline.sweeps.trial"
}
LOCK = "requirements.lock"
# Files that cannot change a result: lazy imports, texts of errors, logs.
WIRING = {"qwt2/__init__.py", "qwt2/errors.py", "pipeline/__init__.py", "pipeline/common/logs.py"}


def fingerprint(stages: Iterable[str], also: Iterable[str] = ()) -> str:
    """Return one hash of all the code that these stages run, and of modules that they would not reach otherwise."""
    text = "".join(f"{name}\0{digest}\n" for name, digest in sources(stages, also).items())
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def sources(stages: Iterable[str], also: Iterable[str] = ()) -> dict[str, str]:
    """Return the files that can change what these stages do, sorted by name: file -> hash of its content.

    Args:
        stages: names of stages.
        also: dotted names of further modules.
    """
    files = closure(file for name in (*(MODULES[stage] for stage in stages), *also) for file in _files(name))
    files |= {ROOT / LOCK}
    names = {path.relative_to(ROOT).as_posix(): path for path in files}
    return {name: digest(names[name]) for name in sorted(names.keys() - WIRING)}


def closure(paths: Iterable[Path]) -> set[Path]:
    """Return these files, all files that they import directly or indirectly, and the non-Python files beside those."""
    seen: set[Path] = set()
    waiting = [*paths]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += _needed(current)
    return seen


def _needed(path: Path) -> set[Path]:
    """Return the files that a file needs directly."""
    if path.suffix != ".py":
        return set()
    names = _imports(path)
    found = {file for name in names for file in _files(name)}
    if path.name == "__init__.py":
        beside = {file for file in path.parent.glob("[!.]*") if file.is_file()}
        takes_all = "qwt2.registry.Registry" in names  # a registry imports every module of its package
        found |= {file for file in beside if takes_all or file.suffix != ".py"}
    return found


def _files(name: str) -> Iterator[Path]:
    """Yield the source file of a dotted name of this project, and those of the packages around it."""
    path = ROOT
    for part in name.split("."):
        path /= part
        if (path / "__init__.py").is_file():
            yield path / "__init__.py"
        elif path.with_suffix(".py").is_file():
            yield path.with_suffix(".py")


@while_unchanged  # every cell of a sweep asks
def _imports(path: Path) -> set[str]:
    """Return the dotted names that a file may import at run time; imports for type annotations do not count."""
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
def digest(path: Path) -> str:
    """Hash a module's syntax tree without docstrings, the versions in the lock file, or any other file's bytes."""
    content = path.read_bytes()
    if path.suffix == ".py":
        content = ast.dump(_without_docstrings(ast.parse(content, path))).encode()
    elif path.name == LOCK:
        content = "\n".join(_pins(content.decode())).encode()
    return hashlib.sha256(content).hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        may_have_one = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if may_have_one and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return tree


def _pins(text: str) -> list[str]:
    """Return ``name==version`` of every package in a lock file."""
    return sorted(re.findall(r"^[\w.\[\]-]+==[^\s\\;]+", text, re.M))
