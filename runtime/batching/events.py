"""What a request in a batch tells of: ``Event``s while it runs, and a ``Ticket`` for its end."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]
_log = logging.getLogger("dnp.runtime")


@dataclass(frozen=True)
class Progress:
    """A step of the request is done.

    Attributes:
        phase: ``dns``, ``caption``, ``plain`` or ``final``.
        index: how many steps of the phase are done, from 1; of several images, the work done in such steps.
        total: how many there are (for ``caption`` the most there can be).
    """

    phase: str
    index: int
    total: int


@dataclass(frozen=True)
class Picture:
    """What a pass is expected to give, as seen from the middle of it.

    Attributes:
        phase: of the pass.
        index: which of the previews asked for, from 0.
        number: of the image within the request, from 0.
        image: uint8 ``[height, width, 3]``.
    """

    phase: str
    index: int
    number: int
    image: Pixels


@dataclass(frozen=True)
class Negatives:
    """The DNS images, uint8 ``[images, height, width, 3]``, and n* of each."""

    images: Pixels
    texts: list[str]


@dataclass(frozen=True)
class Plain:
    """The plain images, uint8 ``[images, height, width, 3]``."""

    images: Pixels


Event = Progress | Picture | Negatives | Plain
Listener = Callable[[Event], object]


class Ticket(Future[T], Generic[T]):
    """The future of a request in a batch.

    ``cancel()`` takes effect within one step, also while the request runs; it ends with ``Cancelled``.

    Attributes:
        request_id: unique to this request.
    """

    def __init__(self, listener: Listener | None = None, wake: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.request_id = uuid.uuid4().hex
        self.cancel_asked = threading.Event()
        self._listener, self._wake = listener, wake
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self.add_done_callback(lambda _: self._events.put(None))

    def cancel(self) -> bool:
        """Ask for the request to be stopped; False when it is over already."""
        if self.done():
            return False
        self.cancel_asked.set()
        self._wake()
        return True

    def events(self) -> Iterator[Event]:
        """What the request tells, as it comes, until it is over; for one reader, where there is no listener."""
        while (event := self._events.get()) is not None:
            yield event
        self._events.put(None)  # for whoever asks again

    def tell(self, event: Event) -> None:
        """Hand an event on. A listener that raises is told nothing more; the request goes on."""
        if self._listener is None:
            self._events.put(event)
            return
        try:
            self._listener(event)
        except Exception:
            _log.exception("the listener of request %s raised, and is told nothing more", self.request_id)
            self._listener = lambda _: None
