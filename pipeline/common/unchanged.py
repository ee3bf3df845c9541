"""A cache for files that are read often and change rarely, such as the records of sweeps and dvc.lock."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def while_unchanged(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """Cache ``read`` per file until the file changes. Callers share what it returns and must not modify it."""
    found: dict[Path, tuple[tuple[int, ...], T]] = {}

    def remembered(path: Path) -> T:
        try:
            facts = path.stat()
        except OSError:
            return read(path)  # which reports the missing file in its own words
        state = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
        if path not in found or found[path][0] != state:
            found[path] = state, read(path)
        return found[path][1]

    return remembered
