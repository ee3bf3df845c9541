"""Peak memory of a piece of work."""

import threading

import psutil


class PeakMemory:
    """Sample the process's resident memory inside a ``with`` block.

    Args:
        interval_s: time between samples, in seconds.

    Attributes:
        megabytes: the peak above the memory that was resident at the start, in MiB.
    """

    def __init__(self, interval_s: float = 0.002):
        self.interval_s, self.megabytes = interval_s, 0.0

    def __enter__(self) -> "PeakMemory":
        self._process = psutil.Process()
        self._start = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.megabytes = max(self.megabytes, (self._process.memory_info().rss - self._start) / 2**20)
            if self._done.wait(self.interval_s):
                return
