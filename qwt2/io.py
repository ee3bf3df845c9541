"""Atomic writes and checked reads of the file formats that this project stores.

Every writer goes through :func:`atomic_path`: a reader sees the old file or the new one, never half of one. Every
reader raises :class:`qwt2.errors.Qwt2Error`, with the file's name, if the file is missing or damaged.
"""

import csv
import io
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

from qwt2.errors import Qwt2Error

if TYPE_CHECKING:
    import torch


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it replaces ``path`` if the block succeeds, and is removed if not.

    The temporary name keeps the suffix, because some writers choose their format by it, or append a missing one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Silence warnings inside the block, and messages of these loggers below the level of errors."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write records as CSV atomically; missing values and ``None`` become empty cells.

    Args:
        path: the file to write.
        rows: one mapping from column to value per record.
        columns: the columns to write, in order; ``None`` for all columns of any record.
    """
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row)) if columns is None else columns
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON atomically.

    Raises:
        ValueError: if it holds NaN or infinity, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file.

    Raises:
        Qwt2Error: if the file is missing or is not JSON.
    """
    with _reading(path, (json.JSONDecodeError, UnicodeDecodeError)):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def write_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write one array as ``.npy`` atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: str | os.PathLike) -> np.ndarray:
    """Read one ``.npy`` array.

    Raises:
        Qwt2Error: if the file is missing or damaged.
    """
    with _reading(path, (ValueError, EOFError)):
        return np.load(path, allow_pickle=False)


def save_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named NumPy arrays as safetensors atomically, without importing torch."""
    from safetensors.numpy import save

    # Serialized first, so that an error of the file system is an OSError with its errno.
    with atomic_path(path) as temporary:
        temporary.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def load_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read a safetensors file into NumPy arrays.

    Raises:
        Qwt2Error: if the file is missing or damaged.
    """
    from safetensors.numpy import load_file

    with _reading(path, (SafetensorError,)):
        return load_file(path)


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, "torch.Tensor"]) -> None:
    """Write named torch tensors as safetensors atomically; tensors that share memory are each stored in full."""
    from safetensors.torch import save

    # Cloned because safetensors refuses views into a shared storage, such as tied or sliced parameters.
    owned = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(owned))


def load_tensors(path: str | os.PathLike) -> dict[str, "torch.Tensor"]:
    """Read a safetensors file into torch tensors on the CPU.

    Raises:
        Qwt2Error: if the file is missing or damaged.
    """
    from safetensors.torch import load_file

    with _reading(path, (SafetensorError,)):
        return load_file(path)


@contextmanager
def _reading(path: str | os.PathLike, damaged: tuple[type[Exception], ...]) -> Iterator[None]:
    if Path(path).is_dir():  # every reader would fail differently
        raise Qwt2Error(f"{path} is a folder, but a file is needed here")
    try:
        yield
    except FileNotFoundError as error:
        raise Qwt2Error(f"{path} does not exist; run the stage that writes it, or correct the path") from error
    except damaged as error:
        raise Qwt2Error(f"{path} is damaged or of another format ({error}); delete it and make it again") from error
