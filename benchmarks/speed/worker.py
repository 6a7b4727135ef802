"""One contender in one process: ``python worker.py < job.json`` prints one JSON object a line, an event each.

    versions, import, open, first    how it starts, in seconds
    image, dnp                       one timed request: seconds, those inside the inference library, and each step's
    point                            an image at another size
    memory                           the peak resident size of this process, bytes
    failed                           why there is no more

A process of its own makes the start, the peak memory and the library's threads the contender's own.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from job import Job, Point

Emit = Callable[..., None]


def main() -> int:
    events = own_output()

    def emit(event: str, **said: Any) -> None:
        print(json.dumps({"event": event, **said}), file=events, flush=True)

    job = Job.from_json(sys.stdin.read())
    try:
        work(job, emit)
    except BaseException as error:  # whatever it is, it is this contender's row
        emit("failed", reason=reason_of(error))
        if os.environ.get("SPEED_TRACEBACK"):
            raise
        return 1
    return 0


def own_output() -> TextIO:
    """The standard output for events alone: what libraries print, also from C++, goes to the standard error."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return events


def work(job: Job, emit: Emit) -> None:
    """Open the contender and do what the job names; ``emit`` is called with each figure when it is there."""
    from contenders import CONTENDERS

    contender = CONTENDERS[job.contender].make()
    started = time.perf_counter()
    contender.load()
    emit("import", seconds=time.perf_counter() - started)
    emit("versions", **contender.versions())
    started = time.perf_counter()
    contender.open(job)
    emit("open", seconds=time.perf_counter() - started)
    pixels = None

    def plain(point: Point) -> Callable[[Callable[[], None]], Any]:
        return lambda mark: contender.image(job.prompt, "", job.guidance, point, mark)

    _, first = timed(contender, plain(job.point))
    emit("first", **first)
    if {"steps", "image"} & set(job.works):
        for _ in range(job.repeats):
            pixels, figures = timed(contender, plain(job.point))
            emit("image", **figures)
    if "dnp" in job.works:
        for turn in range(job.warmups + job.repeats):
            (_, negative), figures = timed(contender, lambda mark: contender.dnp(job, mark))
            if turn >= job.warmups:
                emit("dnp", negative=negative, **figures)
    if job.picture and pixels is not None:
        save(Path(job.picture), pixels[0])
    emit("memory", bytes=peak_memory())  # before other sizes are tried
    for point in job.points:
        timed(contender, plain(point))
        _, figures = timed(contender, plain(point))
        emit("point", **asdict(point), **figures)


def timed(contender: Any, request: Callable[[Callable[[], None]], Any]) -> tuple[Any, dict[str, Any]]:
    """The request's result and its figures.

    A step is the time from one mark to the next, so that a step is what the contender's own loop takes for it: both
    branches of the network, guidance, the sampler and whatever else it does. The first step of a pass has no mark
    before it; where two passes meet, what lies between is dropped by ``steps_of`` when it summarises.
    """
    marks: list[tuple[float, float | None]] = []

    def mark() -> None:
        marks.append((time.perf_counter(), contender.inside()))

    inside, started = contender.inside(), time.perf_counter()
    result = request(mark)
    seconds = time.perf_counter() - started
    figures: dict[str, Any] = {"seconds": seconds, "marks": [at - started for at, _ in marks]}
    if inside is not None:
        figures["inside"] = contender.inside() - inside
        figures["marks_inside"] = [at - inside for _, at in marks if at is not None]
    return result, figures


def save(path: Path, pixels: Any) -> None:
    import numpy as np

    partial = path.with_suffix(".partial.npy")
    np.save(partial, pixels)
    partial.replace(path)


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes; 0 where the system does not tell."""
    try:
        match = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) << 10 if match else 0


def reason_of(error: BaseException) -> str:
    """One line that says what happened, from however long a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
