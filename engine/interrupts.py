"""Ctrl-C, held back for the length of something that must not be cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Answer a Ctrl-C that comes inside the block after it: raises KeyboardInterrupt at its end.

    For renames that belong together, and for importing extension modules, which turn a KeyboardInterrupt into an
    ImportError. Nothing is done in other threads than the main one, where no Ctrl-C arrives, and in programs that
    ignore Ctrl-C or answer it in their own way.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if came:
            raise KeyboardInterrupt
