"""Temporary replacement of a module's forward method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


class Stop(Exception):  # noqa: N818, it is no error
    """Ends a forward pass once the wanted values have been captured."""


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let ``module`` run ``forward`` instead of its own method inside the ``with`` block."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
