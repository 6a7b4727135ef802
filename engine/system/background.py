"""Work that a library does in one long call: in a thread of its own, so that this one can tell how it goes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from dnp.engine.system.interrupts import uninterrupted

T = TypeVar("T")
_TICK = 0.2  # seconds


def in_background(work: Callable[[], T], *, name: str, tick: Callable[[], object], cancel: Callable[[], object]) -> T:
    """What ``work`` returns or raises; ``tick`` is called five times a second meanwhile.

    When ``tick`` raises, or a Ctrl-C comes, ``cancel`` is called and ``work`` waited for, before it is raised from
    here: a process that ends while a compiler is at work crashes.
    """
    ended = threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # it is raised again where the work was asked for
            errors.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        with uninterrupted():
            thread.start()
        while not ended.wait(_TICK):  # a join that a Ctrl-C interrupts takes the thread for dead, up to Python 3.12
            tick()
    except BaseException:
        with uninterrupted():
            try:
                cancel()
            finally:
                if thread.ident is not None:  # else the system gave none
                    ended.wait()
        raise
    if errors:
        raise errors[0]
    return results[0]
