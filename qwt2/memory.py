"""Memory that the C library keeps."""

from __future__ import annotations

import ctypes
import functools
import sys


def give_free_memory_back() -> None:
    """Give free memory of the process back to the system, where the C library can (glibc).

    glibc before 2.38 hardly finds aligned memory that was freed, which is what PyTorch asks for: running a network again
    and again then takes more and more, gigabytes of which are free.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim():
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
