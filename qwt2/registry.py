"""Named implementations: one file each, registered under the name that configurations use."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Callable, Generic, TypeVar

from qwt2.errors import Qwt2Error

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to implementations found in the modules of one package.

    Args:
        kind: what is registered, for error messages ("PTQ method").
        package: package whose modules register themselves when imported.
    """

    def __init__(self, kind: str, package: str):
        self.kind, self.package = kind, package
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        def add(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        self._discover()
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """The implementation called ``name``.

        Raises:
            Qwt2Error: unknown name; the message lists the known ones.
        """
        self._discover()
        if name not in self._entries:
            raise Qwt2Error(f"unknown {self.kind} {name!r}; use one of: {', '.join(self.names())}")
        return self._entries[name]

    def _discover(self) -> None:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
