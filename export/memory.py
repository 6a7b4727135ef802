"""The memory of this process: its peak over a stretch of work, and giving back what is free."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import psutil


def give_back() -> None:
    """Return the memory of what is no longer used to the system, where the C library can, as glibc.

    Models hold cycles, and the C library keeps what one of many weights took for the next, whose weights are of other
    sizes.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for garbage seldom inside, and not among what is there before.

    Tracing makes millions of objects that stay, and so do the libraries' own: Python's collector went through all of
    them again and again, in a fifth of the processor time of an export of tiny models.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


class PeakMemory:
    """Context manager; ``peak`` is the largest resident size of this process seen inside it, in bytes.

    A thread looks every ``interval`` seconds: ``ru_maxrss`` knows only the peak since the process began.
    """

    def __init__(self, interval: float = 0.02) -> None:
        self.peak = 0
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            if self._done.wait(self._interval):
                return
