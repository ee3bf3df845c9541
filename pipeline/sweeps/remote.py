"""Command: share cells of sweeps through a DVC remote (``python -m pipeline.sweeps.remote push``, or ``pull``).

``dvc push`` and ``dvc pull`` share what `dvc repro` built. This command does the same for the cells of sweeps that the
present code finished, and for the datasets and baselines that only they have.

<remote>/cells/<id>/, <remote>/cells/shared/<name>/      as in out/cells; the record of what is there is written last
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.common.folders import CELLS, LOCKS, OUTPUTS, SHARED, read_record
from pipeline.common.stage import locked
from pipeline.sweeps.cells import present_code
from qwt2.errors import Qwt2Error, guarded

RECORD = "cell.json"


def main(arguments: list[str] | None = None) -> None:
    """Push or pull, and print how many folders were copied."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.sweeps.remote", description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("push", "pull"))
    parser.add_argument("-r", "--remote", help="a remote of DVC; by default the default one")
    options = parser.parse_args(arguments)
    with _opened(options.remote) as (fs, root):
        copied = {"push": push, "pull": pull}[options.verb](fs, root)
    print(f"{copied} cells, datasets and baselines {options.verb}ed")


@contextmanager
def _opened(name: str | None) -> Iterator[tuple[Any, str]]:
    """Yield the file system of a DVC remote, and its folder of cells.

    Raises:
        Qwt2Error: there is no such remote, or it cannot be reached.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            remote = repo.cloud.get_remote(name)
            yield remote.fs, remote.fs.join(remote.path, "cells")
    except DvcException as error:
        raise Qwt2Error(f"the remote cannot be used: {str(error).splitlines()[0]}; see `dvc remote list`") from error


def push(fs: Any, root: str) -> int:
    """Copy every finished folder that the remote does not have, or has from other code, and return their number."""
    folders = [
        folder for folder in _folders() if _remote_record(fs, root, _record(folder)) != _record(folder).read_bytes()
    ]
    for folder in tqdm(folders, "push", disable=None):
        record = _record(folder)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != record]
        if fs.exists(_there(fs, root, record)):
            fs.remove(_there(fs, root, record))
        for file in [*files, record]:
            fs.makedirs(fs.parent(_there(fs, root, file)), exist_ok=True)
            fs.put_file(os.fspath(file), _there(fs, root, file))
    return len(folders)


def pull(fs: Any, root: str) -> int:
    """Copy every folder of the remote that the present code made and that is not here, and return their number.

    Raises:
        Qwt2Error: a folder of the remote is damaged; it was not copied.
    """
    paths = fs.find(root) if fs.exists(root) else []
    records = [CELLS.joinpath(*fs.relparts(path, root)) for path in paths if fs.name(path) in (RECORD, OUTPUTS)]
    missing = [
        path for path in sorted(records) if not _is_finished(path.parent) and _is_of_present_code(fs, root, path)
    ]
    for path in tqdm(missing, "pull", disable=None):
        with locked(LOCKS / path.parent.name):
            _fetch(fs, _there(fs, root, path.parent), path.parent)
    return len(missing)


def _fetch(fs: Any, source: str, folder: Path) -> None:
    """Copy a folder beside its place, compare the files with its record, and put it there."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        for path in fs.find(source):
            file = temporary.joinpath(*fs.relparts(path, source))
            file.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(path, os.fspath(file))
        if not _is_whole(temporary):
            raise Qwt2Error(f"{source} is damaged; delete it there, and push it again from where it was made")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _folders() -> list[Path]:
    """Return the folders here that the present code finished."""
    return [folder for root in (SHARED, CELLS) for folder in sorted(root.glob("[!.]*/")) if _is_finished(folder)]


def _is_finished(folder: Path) -> bool:
    """Return whether the present code finished a cell, or anything finished a dataset or baseline of this name."""
    record = read_record(folder, _record(folder).name)
    return record is not None and (folder.parent == SHARED or _is_current(record))


def _is_current(record: dict[str, Any]) -> bool:
    return record["status"] == "finished" and record["made_from"]["code"] == present_code(record["config"])


def _is_of_present_code(fs: Any, root: str, record: Path) -> bool:
    return record.name == OUTPUTS or _is_current(json.loads(_remote_record(fs, root, record) or b""))


def _record(folder: Path) -> Path:
    """Return the file that is written last into a folder."""
    return folder / (OUTPUTS if folder.parent == SHARED else RECORD)


def _remote_record(fs: Any, root: str, record: Path) -> bytes | None:
    path = _there(fs, root, record)
    return fs.cat_file(path) if fs.exists(path) else None


def _there(fs: Any, root: str, path: Path) -> str:
    """Return the place in the remote of a file or folder below out/cells."""
    return fs.join(root, *path.relative_to(CELLS).parts)


def _is_whole(folder: Path) -> bool:
    """Return whether a folder's files are those that its record names."""
    record = read_record(folder)
    outputs = read_record(folder, OUTPUTS) if record is None else record["outputs"]
    return outputs is not None and all(
        (folder / name).is_file() and hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"]
        for name, facts in outputs.items()
    )


if __name__ == "__main__":
    guarded(main)
