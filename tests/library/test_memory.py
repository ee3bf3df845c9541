"""What was freed goes back to the system."""

import ctypes
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import psutil, torch
from qwt2.quantization.malloc import give_back_after

process = psutil.Process()
tensors = [torch.ones(25_000) for _ in range(3_000)]  # 300 MB of pieces too small for pages of their own
last = tensors.pop()  # on top of the heap: what lies below stays with the process
full = process.memory_info().rss
tensors.clear()
freed = process.memory_info().rss
give_back_after(0)
kept = process.memory_info().rss
give_back_after(3)
print(full, freed, kept, process.memory_info().rss)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_free_memory_goes_back_after_every_fourth_batch():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    full, freed, kept, back = (int(number) / 2**20 for number in done.stdout.split())
    assert full - freed < 100 and abs(kept - freed) < 20  # a tensor on top held the rest
    assert full - back > 250
