"""Memory that the C library keeps."""

from __future__ import annotations

import ctypes
import functools
import sys

# It costs as much as a fifth of a batch's time, and between two times as much is kept as these batches take.
_BATCHES = 4


def give_back_after(batch: int) -> None:
    """Give free memory of the process back to the system after every few batches, where the C library can (glibc).

    glibc before 2.38 hardly finds aligned memory that was freed, which is what PyTorch asks for: running a network
    again and again then takes more and more, gigabytes of which are free.

    Args:
        batch: number of the batch that is done, from 0.
    """
    trim = _malloc_trim()
    if trim is not None and (batch + 1) % _BATCHES == 0:
        trim(0)


@functools.cache
def _malloc_trim():
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
