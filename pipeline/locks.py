"""DVC's locks that nobody holds any more.

DVC notes in a file which process reads and writes which path, and lets go of the entries of processes that do not exist.
A killed process that nobody has waited for still exists (in a container whose first process reaps none, for good), and
one killed while it wrote the file leaves half of it. Either way DVC would ask for the file to be removed by hand.
"""

import json
from pathlib import Path
from typing import Any

import psutil

FOLDER = Path(".dvc/tmp")


def release_abandoned(folder: Path = FOLDER) -> None:
    """Remove from DVC's lock file below `folder` the entries of processes that have ended, or all of it if it is damaged."""
    path = folder / "rwlock"
    if not path.is_file() or not _is_abandoned(path):
        return
    from dvc.lock import make_lock

    with make_lock(str(folder / "rwlock.lock"), tmp_dir=str(folder)):  # what DVC holds while it writes the file
        if (locks := _read(path)) is None:
            path.unlink()
        else:
            path.write_text(json.dumps(_held(locks)))


def _is_abandoned(path: Path) -> bool:
    locks = _read(path)
    return locks is None or _held(locks) != locks


def _read(path: Path) -> dict[str, Any] | None:
    """None for what is no lock file."""
    try:
        locks = {"write": {}, "read": {}} | json.loads(path.read_text())
        _held(locks)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return locks


def _held(locks: dict[str, Any]) -> dict[str, Any]:
    """What processes that run have noted; only writers have a path for themselves."""
    writers = {path: info for path, info in locks["write"].items() if _runs(info["pid"])}
    readers = {path: [info for info in infos if _runs(info["pid"])] for path, infos in locks["read"].items()}
    return {"write": writers, "read": {path: infos for path, infos in readers.items() if infos}}


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
