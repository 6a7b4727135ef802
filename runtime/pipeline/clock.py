"""Where the time of a request goes."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Clock:
    """Seconds spent per phase; what the consumer of a generator does between steps is not counted."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def add(self, name: str, seconds: float) -> None:
        """Count ``seconds`` spent before the clock was started."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._start -= seconds

    def timed(self, name: str, steps: Generator[S, None, T]) -> Generator[S, None, T]:
        """The same generator, with the time inside it added to ``name``."""
        while True:
            with self.phase(name):
                try:
                    step = next(steps)
                except StopIteration as stop:
                    result: T = stop.value
                    return result
            yield step

    def total(self) -> dict[str, float]:
        """The seconds by phase and their ``total``, wall-clock."""
        return {**self.seconds, "total": time.perf_counter() - self._start}
