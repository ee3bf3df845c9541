"""The source text of modules of Python's standard library, as character tokens.

Tokens are the printable ASCII characters and the end of a line; other characters are left out. The text depends on
Python's version, so it is stored: ``train.npy`` and ``val.npy`` hold tokens, uint8, and ``source.json`` the version.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from qwt2.data import DATASETS
from qwt2.errors import Qwt2Error
from qwt2.io import read_array, write_array, write_json

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # a token is a character's place here
_TOKEN_OF = {character: token for token, character in enumerate(CHARACTERS)}


@DATASETS.register("stdlib_text")
@dataclass
class StdlibText:
    """The dataset and the keys of its configuration.

    Attributes:
        name: "stdlib_text".
        train_modules, val_modules: dotted names of the modules of each split, in the text's order. No module is in
            both.
        val_images: number of validation windows.
    """

    TASK: ClassVar[str] = "language"
    name: str
    train_modules: list[str]
    val_modules: list[str]
    val_images: int

    @staticmethod
    def write(cfg: Mapping[str, Any], folder: str | os.PathLike) -> None:
        """Store the tokens of both splits.

        Raises:
            Qwt2Error: a module is in both splits, or the standard library has no source of it.
        """
        if both := set(cfg["train_modules"]) & set(cfg["val_modules"]):
            raise Qwt2Error(
                f"stdlib_text: {min(both)!r} is in data.train_modules and in data.val_modules; keep it in one"
            )
        library = Path(sysconfig.get_path("stdlib"))
        tokens = {split: tokenize(read_modules(library, cfg[f"{split}_modules"])) for split in ("train", "val")}
        write_json(Path(folder) / "source.json", {"python": platform.python_version()})
        for split, array in tokens.items():
            write_array(Path(folder) / f"{split}.npy", array)

    @staticmethod
    def open(
        cfg: Mapping[str, Any], folder: str | os.PathLike, model: Mapping[str, Any] | None
    ) -> dict[str, np.ndarray]:
        """Return the tokens (characters,), uint8, by split."""
        return {split: read_array(Path(folder) / f"{split}.npy") for split in ("train", "val")}


def read_modules(library: Path, modules: list[str]) -> str:
    """Return the source of modules, one after another.

    Raises:
        Qwt2Error: the library has no source of a module.
    """
    return "".join(_source(library, module).read_text(encoding="utf-8") for module in modules)


def _source(library: Path, module: str) -> Path:
    path = library.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    raise Qwt2Error(
        f"stdlib_text: {library} has no source of module {module!r}; take it out of data.train_modules or "
        "data.val_modules, or install Python's standard library with its sources"
    )


def tokenize(text: str) -> np.ndarray:
    """Return the tokens (characters,), uint8, of a text, without the characters that are no tokens."""
    return np.array([_TOKEN_OF[character] for character in text if character in _TOKEN_OF], np.uint8)


def windows(tokens: np.ndarray, length: int, starts: np.ndarray) -> np.ndarray:
    """Return the parts (len(starts), length), int64, of a text that begin at ``starts``."""
    return tokens[starts[:, None] + np.arange(length)].astype(np.int64)
