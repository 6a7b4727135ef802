"""One contender in one process: reads commands, one JSON object a line, and answers each with one.

    {"do": "open", ...}                     import, open, and the first image: seconds of each
    {"do": "plain" or "dnp", "images": n}   one request: seconds
    {"do": "step", "batch": n}              milliseconds of a denoising step, and of the host, one figure for each block
    {"do": "picture", "path": ...}          the last plain image, to be compared with the others'
    {"do": "profile", "batch": n}           the kernels of a step, from the longest
    {"do": "ceiling"}                       arithmetic of a step, and what the device reaches on a large product

A process that stays lets its requests alternate with those of the others; what it compiles and holds is its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

BLOCKS = 5  # of steps; each is timed as a whole
BLOCK = 10  # steps, as many as hide what waiting for the device takes


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print
    return serve(sys.stdin, answers)


def serve(commands: TextIO, answers: TextIO) -> int:
    """Answer every command until there are no more. Returns the exit code: 1 after one that failed, 0 otherwise."""
    state: dict[str, Any] = {}
    for line in commands:
        asked = json.loads(line)
        try:
            answer = obey(asked, state)
        except BaseException as error:  # whatever it is, it is this contender's row
            told = [part.strip() for part in str(error).splitlines() if part.strip()]
            print(json.dumps({"failed": f"{type(error).__name__}: {told[0][:300] if told else ''}"}), file=answers)
            answers.flush()
            if os.environ.get("GPU_BENCH_TRACEBACK"):
                raise
            return 1
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def obey(asked: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Do one command; ``state`` holds the contender, and the last picture."""
    do = asked["do"]
    if do == "open":
        from rivals import make

        contender = state["contender"] = make(asked["contender"])
        opened = {
            name: timed(step)[1] for name, step in (("import", contender.load), ("open", lambda: contender.open(asked)))
        }
        _, opened["first"] = timed(lambda: contender.plain(1, seed=0))
        return {"seconds": opened, "versions": contender.versions(), "runs_on": contender.runs_on()}
    contender = state["contender"]
    if do == "plain":
        state["picture"], seconds = timed(lambda: contender.plain(asked["images"], seed=asked["seed"]))
        return {"seconds": seconds}
    if do == "dnp":
        told, seconds = timed(lambda: contender.dnp(asked["images"], seed=asked["seed"]))
        return {"seconds": seconds, **told}
    if do == "step":
        return step_times(contender, asked["batch"])
    if do == "picture":
        import numpy as np

        np.save(asked["path"], state["picture"])
        return {}
    if do == "profile":
        return {"kernels": contender.kernels(asked["batch"])}
    return dict(getattr(contender, do)())


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` returns, when its result is in the host's memory, and the seconds it took."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def step_times(contender: Any, batch: int) -> dict[str, Any]:
    """Milliseconds of a step of ``batch`` images, both branches of guidance, in each block; and the host's milliseconds
    for launching one, when the device has nothing to do.
    """
    begin, step, wait = contender.step(batch)
    for _ in range(4):  # a CUDA graph is captured in the first of them
        step()
    whole, host = [], []
    for _ in range(BLOCKS):
        begin()
        wait()
        started = time.perf_counter()
        for _ in range(BLOCK):
            step()
        wait()
        whole.append((time.perf_counter() - started) / BLOCK * 1e3)
    for _ in range(BLOCK):
        begin()
        wait()
        started = time.perf_counter()
        step()
        host.append((time.perf_counter() - started) * 1e3)
    wait()
    return {"ms": whole, "host_ms": host}


if __name__ == "__main__":
    sys.exit(main())
