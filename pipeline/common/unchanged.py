"""Files that are read often and change seldom: the records of sweeps, dvc.lock."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def while_unchanged(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """`read`, called again for a file only once that has changed; its callers must leave what it returns as it is."""
    found: dict[Path, tuple[tuple[int, ...], T]] = {}

    def remembered(path: Path) -> T:
        try:
            facts = path.stat()
        except OSError:
            return read(path)  # says in its own words what is wrong
        state = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
        if path not in found or found[path][0] != state:
            found[path] = state, read(path)
        return found[path][1]

    return remembered
