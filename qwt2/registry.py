"""Named implementations, one file each, registered under the names that configurations use.

An implementation is a module of this library or of another installed package. The other package names its module in an
entry point, and the module registers itself in the same way as a file of this library:

    [project.entry-points."qwt2.ptq_methods"]
    my_method = "my_package.my_method"
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from qwt2.errors import Qwt2Error

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to implementations found in one package of this library and in plug-ins.

    Args:
        kind: what is registered, for error messages ("PTQ method").
        package: package whose modules register themselves when imported.
        group: entry-point group in which other packages name modules that register themselves. A plug-in is imported
            only when its name is requested.
    """

    def __init__(self, kind: str, package: str, group: str):
        self.kind, self.package, self.group = kind, package, group
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate an implementation to register it as ``name``.

        Raises:
            Qwt2Error: if the name is already taken, when the decorator is applied.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise Qwt2Error(f"the name {name!r} is taken by another {self.kind}")
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        """Return all known names in alphabetical order, without importing plug-ins."""
        self._discover()
        return sorted({*self._entries, *(point.name for point in self._points())})

    def get(self, name: str) -> T:
        """Return the implementation called ``name``.

        Raises:
            Qwt2Error: if the name is unknown (the message lists the known ones), or if a package that offers it cannot
                be imported or uses a name that is already taken (the message names the package).
        """
        self._discover()
        for point in self._points():
            if point.name == name:
                self._load(point)
        if name not in self._entries:
            raise Qwt2Error(f"unknown {self.kind} {name!r}; use one of: {', '.join(self.names())}")
        return self._entries[name]

    def _points(self) -> list[EntryPoint]:
        return _entry_points(self.group, tuple((entry, _changed(entry)) for entry in sys.path))

    def _discover(self) -> None:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")

    def _load(self, point: EntryPoint) -> None:
        """Import a plug-in; if that fails, remove everything that it registered."""
        before = dict(self._entries)
        try:
            point.load()
            if point.name not in self._entries:
                raise Qwt2Error(f"{point.value} registers nothing of that name")
        except Exception as error:  # a module may raise anything
            self._entries = before
            raise Qwt2Error(
                f"the {self.kind} {point.name!r} of package {_package(point)} cannot be used: {_first_line(error)}; "
                "correct or uninstall that package"
            ) from error


@cache
def _entry_points(group: str, path: tuple[tuple[str, int], ...]) -> list[EntryPoint]:
    """Read a group's entry points, anew only if the folders of ``path`` have changed.

    It takes 10 ms, because the metadata of every installed package is read.
    """
    return list(entry_points(group=group))


def _changed(folder: str) -> int:
    """Return when a folder of the import path last gained or lost something, in ns; 0 if it is no folder."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.module


def _first_line(error: Exception) -> str:
    text = str(error) if isinstance(error, Qwt2Error) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0].rstrip(".")
