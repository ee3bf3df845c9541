"""Docstrings of Python's standard library as pairs of a query (the first sentence) and a document (the rest).

The sources are parsed and not imported. A sentence ends at a full stop, question mark or exclamation mark before white
space. Pairs with fewer than four words in the query or eight in the document say too little and are left out. Of equal
queries or equal documents, only the first stays. The pairs depend on Python's version, so they are stored:
``pairs.json`` holds ``python`` (the version), ``train`` and ``val``.
"""

import ast
import os
import platform
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwt2.data import DATASETS
from qwt2.errors import Qwt2Error
from qwt2.io import read_json, write_json

_FIRST_SENTENCE = re.compile(r"(.+?[.!?])\s+(.+)")
_QUERY_WORDS, _DOCUMENT_WORDS = 4, 8
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}

Pairs = list[tuple[str, str]]


@DATASETS.register("docstrings")
@dataclass
class Docstrings:
    """The dataset and the keys of its configuration.

    Attributes:
        name: "docstrings".
        train_images, val_images: number of pairs to draw for each split.
        seed: seed of the draw.
    """

    TASK: ClassVar[str] = "retrieval"
    name: str
    train_images: int
    val_images: int
    seed: int

    @staticmethod
    def write(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
        """Draw pairs for both splits and store them.

        Raises:
            Qwt2Error: the standard library has fewer pairs.
        """
        library = Path(sysconfig.get_path("stdlib"))
        found = read_pairs(library)
        train, val = cfg["train_images"], cfg["val_images"]
        if len(found) < train + val:
            raise Qwt2Error(
                f"docstrings: {library} has {len(found)} pairs, fewer than data.train_images + data.val_images "
                f"({train + val}); install Python's standard library with its sources, or ask for fewer"
            )
        order = np.random.default_rng(cfg["seed"]).permutation(len(found))
        drawn = [found[index] for index in order[: train + val]]
        splits = {"train": drawn[:train], "val": drawn[train:]}
        write_json(Path(folder) / "pairs.json", {"python": platform.python_version(), **splits})

    @staticmethod
    def open(cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any] | None) -> dict[str, Pairs]:
        """Return the stored pairs (query, document) by split."""
        stored = read_json(Path(folder) / "pairs.json")
        return {split: [tuple(pair) for pair in stored[split]] for split in ("train", "val")}


def read_pairs(folder: Path) -> Pairs:
    """Return the pairs (query, document) of all Python files below ``folder``, in the order of the files' names."""
    pairs: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        if not _LEFT_OUT & set(path.relative_to(folder).parts):
            for query, document in _pairs_of(path):
                pairs.setdefault(query, document)
    by_document = {document: query for query, document in reversed(pairs.items())}
    return [(query, document) for query, document in pairs.items() if by_document[document] == query]


def _pairs_of(path: Path) -> Iterator[tuple[str, str]]:
    try:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    except (SyntaxError, ValueError):  # files that show what is no Python
        return
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):  # the module itself has no line
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found = _FIRST_SENTENCE.match(" ".join((ast.get_docstring(node) or "").split()))
            if found and len(found[1].split()) >= _QUERY_WORDS and len(found[2].split()) >= _DOCUMENT_WORDS:
                yield found[1], found[2]
