"""The models of a server: each an engine, as the event loop sees it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, Protocol

from PIL.Image import Image

from dnp.engine.bundle.bundle import Bundle
from dnp.engine.errors import SettingsError
from dnp.runtime.batching import Batcher, BatchOptions, Event, Picture, Progress, Status, Ticket
from dnp.runtime.job import Job
from dnp.runtime.pipeline.pipeline import Pipeline
from dnp.runtime.request import Request
from dnp.runtime.result import Result
from dnp.runtime.sampling.samplers import METHODS, sampler_names
from dnp.runtime.sampling.schedule import SPACINGS
from dnp.serving.errors import ApiError

Observe = Callable[[str, float], object]
What = Literal["images", "negatives"]

_PASSING: Final = (Progress, Picture)  # what the next one makes stale
_WAITING: Final = 8  # of them wait for a slow reader; older ones are dropped
_SHIPPED: Final = (
    "A tiny model that comes with dnp. It draws one or two shapes on a plain or striped background, and knows no other "
    "words."
)
_EXAMPLES: Final = (
    "a large red circle left of a small blue square on a plain yellow background",
    "a small white cross above a large green triangle on a plain black background",
    "a large blue cross on a plain red background",
)


@dataclass(frozen=True)
class Order:
    """How a request is to be treated, apart from what it asks for.

    Attributes:
        id: of the HTTP request.
        what: ``images``, or ``negatives`` for the DNS images and n* alone.
        priority: higher ones come first.
        deadline: seconds from now.
        previews: partial pictures of each pass.
    """

    id: str
    what: What = "images"
    priority: int = 0
    deadline: float | None = None
    previews: int = 0


class Work(Protocol):
    """A request that an engine has: its events, and the ``Result`` as the last. Raises DnpError instead of that."""

    def __aiter__(self) -> Work: ...

    async def __anext__(self) -> Event | Result: ...

    async def aclose(self) -> None:
        """Cancel it, unless it is done."""


async def result_of(work: Work, hear: Callable[[Event], object] = lambda event: None) -> Result:
    """What the work ends with; ``hear`` is told what comes before. Raises what the engine raises."""
    async for event in work:
        if isinstance(event, Result):
            return event
        hear(event)
    raise AssertionError("the last thing that an engine tells is the result")


class Engine(Protocol):
    """What a server needs of a model, wherever it runs."""

    name: str

    @property
    def card(self) -> Mapping[str, Any]:
        """What ``/v1/models`` tells of it."""

    @property
    def status(self) -> Status:
        """How it is."""

    @property
    def ready(self) -> bool:
        """Whether it is warm."""

    def listen(self, observe: Observe) -> None:
        """Have ``observe`` told what the engine measures: names as of ``Batcher``, and values."""

    def resolve(self, request: Request) -> Job:
        """The request with nothing left open. Raises SettingsError for what cannot be honoured."""

    def truncated(self, request: Request) -> Mapping[str, str]:
        """What the model does not read of its texts, by field."""

    def tokens(self, request: Request) -> int:
        """How many tokens the prompt has."""

    async def submit(self, job: Job, order: Order) -> Work:
        """Let the engine have a request. Raises SettingsError, Busy, Draining."""

    async def caption(self, images: Sequence[Image], order: Order, **settings: Any) -> list[str]:
        """Put each image into words."""


class LocalEngine:
    """A model that runs in this process, on a thread of its own."""

    def __init__(self, name: str, pipeline: Pipeline, options: BatchOptions) -> None:
        self.name, self._pipeline = name, pipeline
        self._listener: Observe = lambda name, value: None
        self._batcher = Batcher(pipeline, options, lambda name, value: self._listener(name, value))
        self.ready = False

    def listen(self, observe: Observe) -> None:
        """Have ``observe`` told what the engine measures, in the engine's thread."""
        self._listener = observe

    def warm_up(self) -> None:
        """Do whatever is done once, before the first request; takes seconds to minutes."""
        self._batcher.warm_up()
        self.ready = True

    def close(self) -> None:
        """Stop the thread; what is still running is cancelled. The pipeline stays open."""
        self._batcher.close()

    @property
    def status(self) -> Status:
        """How the engine is."""
        return self._batcher.status

    @cached_property
    def card(self) -> Mapping[str, Any]:
        """What ``/v1/models`` tells of it: what it is, its defaults, and what it takes."""
        pipeline, bundle, status = self._pipeline, self._pipeline.bundle, self.status
        defaults = pipeline.resolve(Request("a prompt")).request.to_dict()
        del defaults["prompt"]
        shipped = bundle.fingerprint == Bundle.default().fingerprint
        return {
            "name": bundle.name,
            **pipeline.made_with,
            "fingerprint": bundle.fingerprint,
            "description": _SHIPPED if shipped else None,
            "examples": list(_EXAMPLES) if shipped else [],
            "defaults": defaults,
            "samplers": list(sampler_names()),
            "spacings": list(SPACINGS),
            "sizes": [[width, height] for height, width in status.sizes],
            "limits": {"windows": max(status.windows), "steps": status.steps},
            "methods": list(METHODS) if bundle.guidance.methods else [],
            "embedded_guidance": bundle.guidance.embedded,
        }

    def resolve(self, request: Request) -> Job:
        """The request with nothing left open. Raises SettingsError for what cannot be honoured."""
        return self._pipeline.resolve(request)

    def truncated(self, request: Request) -> Mapping[str, str]:
        """What the model does not read of its texts, by field."""
        cut = self._pipeline.tokenizer.truncated
        texts = {"prompt": request.prompt, "negative": request.negative}
        found = {name: text and cut(text, request.windows) for name, text in texts.items()}
        return {name: lost for name, lost in found.items() if lost}

    def tokens(self, request: Request) -> int:
        """How many tokens the prompt has, as far as it is read; begin and end are none."""
        return self._pipeline.tokenizer.count(request.prompt, request.windows)

    async def submit(self, job: Job, order: Order) -> Work:
        """Let the engine have a request. Raises SettingsError, Busy, Draining."""
        box = _Mailbox(asyncio.get_running_loop())
        ticket = self._batcher.submit(
            job,
            what=order.what,
            priority=order.priority,
            deadline=order.deadline,
            previews=order.previews,
            listener=box.hear,
        )
        ticket.add_done_callback(lambda _: box.hear(ticket))
        return _LocalWork(ticket, box)

    async def caption(self, images: Sequence[Image], order: Order, **settings: Any) -> list[str]:
        """Put each image into words."""
        ticket = self._batcher.caption(images, **settings, priority=order.priority, deadline=order.deadline)
        try:
            return await asyncio.wrap_future(ticket)
        finally:
            ticket.cancel()


class _LocalWork:
    """``Work`` of a thread of this process."""

    def __init__(self, ticket: Ticket[Result], box: _Mailbox) -> None:
        self._ticket, self._box = ticket, box

    def __aiter__(self) -> _LocalWork:
        return self

    async def __anext__(self) -> Event | Result:
        event = await self._box.next()
        return event.result() if isinstance(event, Ticket) else event

    async def aclose(self) -> None:
        """Cancel it, unless it is done."""
        self._ticket.cancel()


class _Mailbox:
    """Hands events of the engine's thread to the loop. What a slow reader leaves lying is bounded: of progress and
    partial pictures the oldest go."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[Event | Ticket[Result]] = deque()
        self._came = asyncio.Event()

    def hear(self, event: Event | Ticket[Result]) -> None:
        """Called in any thread; never waits."""
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event | Ticket[Result]) -> None:
        passing = [place for place, other in enumerate(self._events) if isinstance(other, _PASSING)]
        if isinstance(event, _PASSING) and len(passing) >= _WAITING:
            del self._events[passing[0]]
        self._events.append(event)
        self._came.set()

    async def next(self) -> Event | Ticket[Result]:
        """The next event; the ticket itself when it is done."""
        while not self._events:
            self._came.clear()
            await self._came.wait()
        return self._events.popleft()


class Engines:
    """The models by name; the first is the default one, which the aliases mean."""

    def __init__(self, engines: Sequence[Engine], aliases: Sequence[str] = ()) -> None:
        self._engines = {engine.name: engine for engine in engines}
        if len(self._engines) < len(engines):
            names = ", ".join(engine.name for engine in engines)
            raise SettingsError(f"two models have the same name ({names}); name them apart, as NAME=PATH")
        self._aliases = [alias for alias in aliases if alias not in self._engines]
        self.default = engines[0]

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines.values())

    @property
    def names(self) -> list[tuple[str, Engine]]:
        """Every name that is answered to, aliases last."""
        return [*self._engines.items(), *((alias, self.default) for alias in self._aliases)]

    def find(self, name: str | None) -> Engine:
        """The model of a name; the default one for None. Raises ApiError for a name that there is not."""
        if name is None:
            return self.default
        for known, engine in self.names:
            if known == name:
                return engine
        raise ApiError(
            404,
            "model_not_found",
            f"there is no model {name[:60]!r} here; this server has {', '.join(self._engines)} "
            "(GET /v1/models lists them)",
            "model",
        )
