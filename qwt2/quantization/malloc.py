"""Return free memory from the C library to the system."""

from __future__ import annotations

import ctypes
import functools
import sys

# malloc_trim takes up to 20 % of a batch's time, so it runs after every 4th batch. Memory freed in between stays
# resident.
_BATCHES = 4


def give_back_after(batch: int) -> None:
    """Return the process's free memory to the system after every few batches, if the C library (glibc) can do so.

    PyTorch allocates aligned memory, and glibc before 2.38 rarely reuses freed aligned memory. Running a network
    repeatedly would therefore take more and more memory, with gigabytes of it free.

    Args:
        batch: number of the finished batch, from 0.
    """
    trim = _malloc_trim()
    if trim is not None and (batch + 1) % _BATCHES == 0:
        trim(0)


@functools.cache
def _malloc_trim():
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
