"""How a ``Batcher`` is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Status:
    """How a ``Batcher`` is.

    Attributes:
        state: ``cold`` before the warm-up, ``serving``, ``draining``, ``closed``.
        idle: seconds since the last tick; many while the thread hangs in a call, or is dead.
        alive: whether the thread is.
        queued: requests that wait to be begun; ``queue`` the most that may.
        requests: those that are begun.
        running: images, by phase; ``caption`` among them.
        cap: the most images that share a step, by (height, width).
        company: the most grey levels by which an image differs between being made alone and with others, as measured
            at warm-up over 4 steps; 0 is bit for bit.
        sizes, windows, steps: what is served.
        counts: since the start: ``steps``, ``samples`` in them, ``finished``.
        failures: requests that ended otherwise, by the name of their error's class.
        hits, misses: of the cache of n*.
        bundle, backend, precision, runs_on: what runs.
    """

    state: Literal["cold", "serving", "draining", "closed"]
    idle: float
    alive: bool
    queued: int
    queue: int
    requests: int
    running: Mapping[str, int]
    cap: Mapping[tuple[int, int], int]
    company: int
    sizes: tuple[tuple[int, int], ...]
    windows: tuple[int, ...]
    steps: int
    counts: Mapping[str, int]
    failures: Mapping[str, int]
    hits: int
    misses: int
    bundle: str
    backend: str
    precision: str | None
    runs_on: str
