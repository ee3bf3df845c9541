"""Releasing DVC's locks that no running process holds any more.

DVC notes in a file which process reads and writes which path, and drops the entries of processes that do not exist.
This fails in two cases. A killed process that nobody has waited for still exists; in a container whose first process
reaps no children, it does so for good. And a process that is killed while it writes the file leaves half of it. In both
cases DVC asks the user to remove the file, and with it the locks of processes that still run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from qwt2.errors import Qwt2Error
from qwt2.io import read_json, write_json

FOLDER = Path(".dvc/tmp")
PATH = FOLDER / "rwlock"
NONE: dict[str, Any] = {"write": {}, "read": {}}


def release_abandoned() -> None:
    """Remove from DVC's lock file the entries of processes that have ended, or all entries if it is damaged."""
    from dvc.lock import make_lock

    with make_lock(str(FOLDER / "rwlock.lock"), tmp_dir=str(FOLDER)):  # what DVC holds while it writes the file
        write_json(PATH, _held(_read() or NONE))


def is_sound() -> bool:
    """Return whether DVC can work with its lock file: it can be read, and no process in it is a zombie.

    A missing file is sound. So are entries of processes that do not exist any more: DVC drops them by itself.
    """
    locks = _read() if PATH.is_file() else NONE
    return locks is not None and not any(_is_zombie(info["pid"]) for info in _infos(locks))


def _read() -> dict[str, Any] | None:
    """Read the lock file; None if it is damaged."""
    try:
        locks = NONE | read_json(PATH)
        _held(locks)
    except (Qwt2Error, KeyError, TypeError, AttributeError):
        return None
    return locks


def _held(locks: dict[str, Any]) -> dict[str, Any]:
    """Keep the entries of running processes. A path has one writer but may have several readers."""
    writers = {path: info for path, info in locks["write"].items() if _runs(info["pid"])}
    readers = {path: [info for info in infos if _runs(info["pid"])] for path, infos in locks["read"].items()}
    return {"write": writers, "read": {path: infos for path, infos in readers.items() if infos}}


def _infos(locks: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from locks["write"].values()
    for infos in locks["read"].values():
        yield from infos


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
