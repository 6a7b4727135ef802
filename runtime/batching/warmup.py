"""What is done once before serving: every size is run, the cap on samples measured, and what company changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from dnp.runtime.batching.stages import Room, Stages
from dnp.runtime.batching.work import Sampling
from dnp.runtime.captioning.captioner import CaptionSettings

CLOSE: Final = 0.95  # of the best throughput is as good as the best
BUDGET: Final = 10.0  # seconds after which no larger batch is tried
_TRIED: Final = (1, 2, 3, 4, 6, 8, 12, 16)
_ROUNDS: Final = 4


def measure_cap(seconds_of: Callable[[int], float], most: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """The smallest number of samples whose steps give within 5 % of the best samples a second.

    A batch that brings nothing only makes everyone in it wait longer, so 1 is a fair answer. ``seconds_of`` takes a
    step of so many samples; the first of each is not counted, and of the others the shortest is, since a machine that
    others use too is at times slower than it is.
    """
    started, shortest = clock(), dict[int, float]()
    for round_ in range(_ROUNDS):
        tried = list(shortest) if round_ else [count for count in _TRIED if count < most] + [most]
        for count in tried:
            if shortest and clock() - started > BUDGET:
                break
            if not round_:
                seconds_of(count)
            shortest[count] = min(shortest.get(count, np.inf), seconds_of(count))
    rates = {count: count / seconds for count, seconds in shortest.items()}
    return min(count for count, rate in rates.items() if rate >= CLOSE * max(rates.values()))


def rehearse(stages: Stages, room: Room, roles: int, settings: Sequence[CaptionSettings]) -> None:
    """Run what a request of this room may run, at every size, so that nothing is compiled or allocated later."""
    slots = stages.open(room)
    for rows in range(roles * room.places, 0, -1):
        stages.rehearse(rows)
    stages.open(room)
    stages.keep(0, slots - 1, clean=False)
    image = stages.decode(slots - 1)
    for captions in settings:
        for count in range(stages.captioned(captions.beams), 0, -1):
            for _ in stages.caption(np.repeat(image, count, 0), captions):
                pass


def measure_company(stages: Stages, room: Room, wanted: Sampling) -> int:
    """The most grey levels (0..255) by which the first image differs between a step alone and one with all others.

    0 where each sample is computed by itself to the last bit, as on a processor.
    """
    alone, together = (_first_image(stages, room, wanted, count) for count in (1, room.places))
    return int(np.abs(alone.astype(int) - together).max())


def _first_image(stages: Stages, room: Room, wanted: Sampling, count: int) -> npt.NDArray[np.uint8]:
    slots = stages.open(room)
    for number in range(count):
        stages.join(number, wanted, number)
    while stages.left(0):
        stages.step()
    stages.keep(0, slots - 1, clean=False)
    return stages.decode(slots - 1)
