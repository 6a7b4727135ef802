"""What the handlers of one server share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from dnp.engine.errors import Draining
from dnp.serving.engines import Engine, Engines
from dnp.serving.errors import AGAIN, client_gone, starting
from dnp.serving.metrics import Metrics
from dnp.serving.pictures import Encoder
from dnp.serving.settings import ServerSettings

T = TypeVar("T")


class Service:
    """The models, and the state of the server.

    Attributes:
        active: requests for work that are being answered.
        draining: set when the server is told to stop: new work is refused.
        started: when the server came up, in seconds since 1970.
    """

    def __init__(self, engines: Engines, settings: ServerSettings, started: float) -> None:
        self.engines, self.settings, self.started = engines, settings, started
        self.encoder, self.metrics = Encoder(), Metrics(engines)
        self.active = 0
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether new work is taken: every model is warm, and the server is not stopping."""
        return not self.draining and all(engine.ready for engine in self.engines)

    def admit(self, model: str | None) -> Engine:
        """The model of a name, for new work. Raises ApiError, or Draining when the server is stopping."""
        engine = self.engines.find(model)
        if self.draining:
            raise Draining("the server is stopping and takes no new work; send it to another, or again", AGAIN)
        if not engine.ready:
            raise starting()
        return engine

    def deadline(self, request: Request, asked: float | None, *, stream: bool = False) -> float:
        """Seconds that a request has: what it asks for, what its client waits for, at most the server's own."""
        times = [self.settings.deadline]
        if asked is not None:
            times.append(asked)
        if stream:  # in which something comes all the time
            return min(times)
        try:  # the official clients say how long they wait for the next byte
            waits = float(request.headers.get("x-stainless-read-timeout", "nan"))
        except ValueError:
            waits = float("nan")
        if waits > 0:
            times.append(waits)
        return min(times)


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns; it is cancelled when the client goes away. The body has to be read by then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise client_gone()
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
