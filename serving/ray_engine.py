"""The engine replicas of a model on Ray Serve, as a front replica sees them: one ``Engine``.

A request whose replica dies is begun again on another one. Its seed is decided by then, so the images are the same,
and what was told already is not told twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

from PIL.Image import Image
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from dnp.engine.bundle.bundle import Bundle
from dnp.engine.errors import Busy, DeadlineExceeded, DnpError
from dnp.runtime.batching import Event, Status
from dnp.runtime.batching.options import check_served
from dnp.runtime.job import Job
from dnp.runtime.result import Result
from dnp.serving.engines import Engine, Mailbox, Observe, Order, Posted, Work
from dnp.serving.logs import say

T = TypeVar("T")
_ATTEMPTS: Final = 4  # a request that takes its engine down with it must not take all of them
_WATCH: Final = 1.0  # seconds between two looks at the replicas
_PATIENCE: Final = 10.0  # seconds that they have to say how they are
_LOST: Final = (RayActorError, ObjectLostError)  # a replica died, or the machine that held what it gave


class RayEngine(Engine):
    """All engine replicas of a model."""

    def __init__(self, name: str, bundle: Bundle, handle: DeploymentHandle[Any], queue: int) -> None:
        """At most ``queue`` requests wait. ``warm_up`` comes first: before it nothing is known of the replicas."""
        super().__init__(name, bundle)
        self._handle: Any = handle  # whose methods are the replicas'
        self._queue = queue
        self._status: Status | None = None
        self._waiting: set[object] = set()
        self._pace, self._ended = 1.0, time.monotonic()  # seconds between two requests that end, and when one did

    async def warm_up(self) -> None:
        """Wait until a replica serves."""
        await self._look()
        while not self.ready:
            await asyncio.sleep(_WATCH)
            await self._look()

    async def watch(self) -> None:
        """Ask the replicas how they are, for ever."""
        while True:
            await asyncio.sleep(_WATCH)
            await self._look()

    async def _look(self) -> None:
        try:
            answers = self._handle.broadcast("status")
            told = await answers.results_async(timeout_s=_PATIENCE, return_exceptions=True)
        except DeploymentUnavailableError:
            told = []
        except Exception as error:  # of Ray's, and its timeout: what was heard last stands, and it is asked again
            say("unheard", level=logging.WARNING, model=self.name, cause=type(error).__name__)
            return
        statuses = [status for status in told if isinstance(status, Status)]
        self.ready = bool(statuses)
        if statuses:
            self._status = together(statuses)

    @property
    def status(self) -> Status:
        """How the replicas were when they last told."""
        assert self._status is not None, "it is asked after warm_up"
        return self._status

    def listen(self, observe: Observe) -> None:
        """Nothing is told: what the replicas measure stays with them."""

    async def submit(self, job: Job, order: Order) -> Work:
        """Let a replica have a request. Raises SettingsError, Busy."""
        status = self.status
        check_served(job, status.sizes, status.windows, status.steps)
        place = self._admit()
        box = Mailbox(asyncio.get_running_loop())
        told: set[tuple[object, ...]] = set()

        async def made(order: Order) -> Result:
            stream = self._handle.options(stream=True).run.remote(job.request, replace(order, heard=True))
            try:
                async for event in stream:
                    self._waiting.discard(place)
                    if isinstance(event, Exception):
                        raise event
                    if isinstance(event, Result):
                        return event
                    if (key := _key(event)) not in told:
                        told.add(key)
                        box.hear(event)
            finally:
                stream.cancel()
            raise DnpError("the engine gave no images")

        def ended(work: asyncio.Task[Result]) -> None:
            self._leave(place)
            if not work.cancelled():
                work.exception()  # or asyncio would complain of one that nobody is there to hear

        work = asyncio.create_task(self._repeated(made, order))
        work.add_done_callback(ended)
        return Posted(work, box)

    async def caption(self, images: Sequence[Image], order: Order, **settings: Any) -> list[str]:
        """Put each image into words. Raises SettingsError, Busy, DeadlineExceeded."""
        place = self._admit()

        async def described(order: Order) -> list[str]:
            answer = self._handle.caption.remote(images, order, settings)
            try:
                texts = await answer
            finally:
                answer.cancel()
            if isinstance(texts, Exception):
                raise texts
            return list(texts)

        try:
            return await self._repeated(described, order)
        finally:
            self._leave(place)

    def _admit(self) -> object:
        """A place among those that wait. Raises Busy when there is none."""
        if len(self._waiting) >= self._queue:
            raise Busy(
                f"{len(self._waiting)} requests are waiting, and no more may; try again later",
                max(1.0, len(self._waiting) * self._pace),
            )
        place = object()
        self._waiting.add(place)
        return place

    def _leave(self, place: object) -> None:
        """A request has ended, begun or not."""
        self._waiting.discard(place)
        now = time.monotonic()
        self._pace += 0.1 * (now - self._ended - self._pace)
        self._ended = now

    @staticmethod
    async def _repeated(work: Callable[[Order], Coroutine[Any, Any, T]], order: Order) -> T:
        """What ``work`` returns, which is begun again when its replica dies. Raises DeadlineExceeded.

        The deadline is kept here: Ray lets requests wait, too, where no engine looks after them.
        """
        began = time.monotonic()
        for _ in range(_ATTEMPTS):
            rest = None if order.deadline is None else max(0.001, order.deadline - (time.monotonic() - began))
            try:
                return await asyncio.wait_for(work(replace(order, deadline=rest)), rest)
            except asyncio.TimeoutError:
                raise DeadlineExceeded(f"the request was not done within {order.deadline:g} s") from None
            except _LOST as error:
                say("repeated", id=order.id, cause=type(error).__name__)
        raise DnpError(f"the request lost its engine {_ATTEMPTS} times; it may be what ends them, so it is given up")


def together(statuses: Sequence[Status]) -> Status:
    """Several engines of one model as one: what they count is summed up, and the slowest tells when it moved last."""
    sums: dict[str, Any] = {
        name: sum(getattr(status, name) for status in statuses)
        for name in ("queued", "queue", "requests", "hits", "misses")
    }
    totals: dict[str, Any] = {
        name: sum((Counter(getattr(status, name)) for status in statuses), Counter())
        for name in ("running", "counts", "failures")
    }
    return replace(
        statuses[0],
        idle=max(status.idle for status in statuses),
        alive=all(status.alive for status in statuses),
        company=max(status.company for status in statuses),
        **sums,
        **totals,
    )


def _key(event: Event) -> tuple[object, ...]:
    """What tells an event from the others of its request."""
    return type(event), *(getattr(event, name, None) for name in ("phase", "number", "index"))
