"""Ctrl-C and SIGTERM, held back for the length of something that must not be cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Answer a Ctrl-C or SIGTERM that comes inside the block at its end, by the handler that was there before.

    For renames that belong together, and for importing extension modules, which turn a KeyboardInterrupt into an
    ImportError. Nothing is done in other threads than the main one, where no signal is answered; a signal that is
    ignored, or ends the process without a handler in Python, is left alone.
    """
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    came: list[int] = []
    holding = False

    def hold(number: int, frame: FrameType | None) -> None:
        if holding:
            came.append(number)
        else:  # amid the exchange of handlers; one that raises there leaves the other signal's in place for good
            handlers[number](number, frame)

    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    handlers[number] = handler
                    signal.signal(number, hold)
        holding = True
        yield
    finally:
        holding = False
        try:
            for held, handler in handlers.items():
                signal.signal(held, handler)
        finally:
            if came:
                handlers[came[0]](came[0], None)
