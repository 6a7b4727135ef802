"""What a fork leaves of a library: its memory, and none of the threads that it goes on waiting for."""

from __future__ import annotations

import ctypes
import os
from weakref import WeakSet

from dnp.engine.errors import BackendError


class OfOneProcess:
    """What stands on a library's threads, and is therefore of use in the process that opened it alone.

    In a forked child it is never freed, at its exit neither: the library would wait for threads that are not there.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        _opened.add(self)

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that opened it."""
        return os.getpid() != self._process

    def require_own_process(self, what: str) -> None:
        """Raises BackendError in a forked child; ``what`` is what the user opened."""
        if self.forked:
            raise BackendError(
                f"{what} was opened in process {self._process}, before the fork that made process {os.getpid()}, where "
                "its threads are missing; open it in the child, or start the child by the method 'spawn'"
            )


_opened: WeakSet[OfOneProcess] = WeakSet()


def _keep() -> None:
    for opened in _opened:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(opened))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep)
