"""The models of a server: each an engine, as the event loop sees it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
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
from dnp.runtime.batching.work import nobody
from dnp.runtime.job import Job, resolve
from dnp.runtime.pipeline.pipeline import Pipeline
from dnp.runtime.request import Request
from dnp.runtime.result import MADE_WITH, Result
from dnp.runtime.sampling.samplers import METHODS, sampler_names
from dnp.runtime.sampling.schedule import SPACINGS, read_schedule
from dnp.runtime.tokenizer import PromptTokenizer
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
        heard: whether anybody hears what comes before the result; nobody is woken for it otherwise.
    """

    id: str
    what: What = "images"
    priority: int = 0
    deadline: float | None = None
    previews: int = 0
    heard: bool = True


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


class Engine(ABC):
    """What a server needs of a model, wherever it runs.

    Attributes:
        name: of the model.
        ready: whether it is warm.
    """

    def __init__(self, name: str, bundle: Bundle) -> None:
        self.name, self.ready = name, False
        self._bundle = bundle
        self._tokenizer = PromptTokenizer(bundle)
        self._schedule = read_schedule(bundle.schedule)

    @property
    @abstractmethod
    def status(self) -> Status:
        """How it is."""

    @property
    def card(self) -> Mapping[str, Any]:
        """What ``/v1/models`` tells of it: what it is, its defaults, and what it takes where it runs."""
        status = self.status
        return {
            **self._described,
            **{name: getattr(status, name) for name in MADE_WITH},
            "sizes": [[width, height] for height, width in status.sizes],
            "limits": {"windows": max(status.windows), "steps": status.steps},
            "company": status.company,
        }

    @cached_property
    def _described(self) -> Mapping[str, Any]:
        bundle = self._bundle
        defaults = self.resolve(Request("a prompt")).request.to_dict()
        del defaults["prompt"]
        shipped = bundle.fingerprint == Bundle.default().fingerprint
        return {
            "name": bundle.name,
            "fingerprint": bundle.fingerprint,
            "description": _SHIPPED if shipped else None,
            "examples": list(_EXAMPLES) if shipped else [],
            "defaults": defaults,
            "samplers": list(sampler_names()),
            "spacings": list(SPACINGS),
            "methods": list(METHODS) if bundle.guidance.methods else [],
            "embedded_guidance": bundle.guidance.embedded,
        }

    @abstractmethod
    def listen(self, observe: Observe) -> None:
        """Have ``observe`` told what the engine measures: names as of ``Batcher``, and values."""

    def resolve(self, request: Request) -> Job:
        """The request with nothing left open. Raises SettingsError for what cannot be honoured."""
        return resolve(request, self._bundle, self._schedule)

    def truncated(self, request: Request) -> Mapping[str, str]:
        """What the model does not read of its texts, by field."""
        texts = {"prompt": request.prompt, "negative": request.negative}
        found = {name: text and self._tokenizer.truncated(text, request.windows) for name, text in texts.items()}
        return {name: lost for name, lost in found.items() if lost}

    def tokens(self, request: Request) -> int:
        """How many tokens the prompt has, as far as it is read; begin and end are none."""
        return self._tokenizer.count(request.prompt, request.windows)

    @abstractmethod
    async def submit(self, job: Job, order: Order) -> Work:
        """Let the engine have a request. Raises SettingsError, Busy, Draining."""

    @abstractmethod
    async def caption(self, images: Sequence[Image], order: Order, **settings: Any) -> list[str]:
        """Put each image into words. Raises what ``submit`` raises, and what ends it."""


class LocalEngine(Engine):
    """A model that runs in this process, on a thread of its own."""

    def __init__(self, name: str, pipeline: Pipeline, options: BatchOptions) -> None:
        super().__init__(name, pipeline.bundle)
        self._pipeline = pipeline
        self._listener: Observe = lambda name, value: None
        self._batcher = Batcher(pipeline, options, lambda name, value: self._listener(name, value))

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

    def resolve(self, request: Request) -> Job:
        """As of ``Engine``, within the captioner's own limits."""
        return self._pipeline.resolve(request)

    async def submit(self, job: Job, order: Order) -> Work:
        """Let the engine have a request. Raises SettingsError, Busy, Draining."""
        box = Mailbox(asyncio.get_running_loop())
        ticket = self._batcher.submit(
            job,
            what=order.what,
            priority=order.priority,
            deadline=order.deadline,
            previews=order.previews,
            listener=box.hear if order.heard else nobody,
        )
        return Posted(ticket, box)

    async def caption(self, images: Sequence[Image], order: Order, **settings: Any) -> list[str]:
        """Put each image into words."""
        ticket = self._batcher.caption(images, **settings, priority=order.priority, deadline=order.deadline)
        try:
            return await asyncio.wrap_future(ticket)
        finally:
            ticket.cancel()


class Posted:
    """``Work`` whose events come through a mailbox, and whose end is a future's."""

    def __init__(self, end: Ticket[Result] | asyncio.Task[Result], box: Mailbox) -> None:
        self._end, self._box = end, box
        end.add_done_callback(lambda _: box.hear(end))

    def __aiter__(self) -> Posted:
        return self

    async def __anext__(self) -> Event | Result:
        event = await self._box.next()
        return event if isinstance(event, Event) else event.result()

    async def aclose(self) -> None:
        """Cancel it, unless it is done."""
        self._end.cancel()


class Mailbox:
    """Hands events of any thread to the loop. What a slow reader leaves lying is bounded: of progress and partial
    pictures the oldest go."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[Event | Ticket[Result] | asyncio.Task[Result]] = deque()
        self._came = asyncio.Event()

    def hear(self, event: Event | Ticket[Result] | asyncio.Task[Result]) -> None:
        """Called in any thread; never waits."""
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event | Ticket[Result] | asyncio.Task[Result]) -> None:
        passing = [place for place, other in enumerate(self._events) if isinstance(other, _PASSING)]
        if isinstance(event, _PASSING) and len(passing) >= _WAITING:
            del self._events[passing[0]]
        self._events.append(event)
        self._came.set()

    async def next(self) -> Event | Ticket[Result] | asyncio.Task[Result]:
        """The next event; at the end the future itself."""
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
