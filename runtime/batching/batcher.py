"""``Batcher``: one thread that owns a pipeline's sessions, and everyone's requests on it."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any, Final, Literal, Protocol

from PIL.Image import Image

from dnp.engine.bundle.bundle import Bundle
from dnp.engine.errors import Busy, Cancelled, DnpError, Draining
from dnp.runtime.batching.core import Core
from dnp.runtime.batching.events import Event, Listener, Picture, Progress, Ticket
from dnp.runtime.batching.options import BatchOptions, check_served
from dnp.runtime.batching.stages import Room, Stages
from dnp.runtime.batching.status import Status
from dnp.runtime.batching.tasks import NEVER, Task
from dnp.runtime.batching.warmup import measure_cap, measure_company, rehearse
from dnp.runtime.batching.work import Made, Sampling, Work, describe, find_negatives, make_images, sampling
from dnp.runtime.captioning.captioner import CaptionSettings
from dnp.runtime.job import Job
from dnp.runtime.pipeline.graphs import Graphs
from dnp.runtime.request import Request
from dnp.runtime.result import Result, Step, pixels_of

_log = logging.getLogger("dnp.runtime")
_HEARTBEAT: Final = 1.0  # seconds between ticks with nothing to do, which show that the thread lives


class Served(Protocol):
    """What a ``Batcher`` needs of a ``Pipeline``: its graphs, for itself alone, and what it knows of requests."""

    graphs: Graphs

    @property
    def bundle(self) -> Bundle:
        """The bundle whose weights run."""

    @property
    def made_with(self) -> dict[str, Any]:
        """What a ``Result`` says that it was made with."""

    def resolve(self, request: Request) -> Job:
        """The request with nothing left open."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Nobody else uses the graphs meanwhile."""


class Batcher:
    """Requests of any number of threads on one pipeline, which is the batcher's until it is closed.

    One thread runs the graphs: it schedules, takes one step with every sample that is in, and commits. Requests join
    and leave between steps, whatever their phase, sampler, steps, guidance and seed; what each gives does not depend on
    the others.
    """

    def __init__(
        self,
        pipeline: Served,
        options: BatchOptions | None = None,
        observe: Callable[[str, float], object] = lambda name, value: None,
    ) -> None:
        """``observe`` is told seconds of a ``step``, a ``decode``, a token of a ``caption`` and of waiting in the
        ``queue``, and how many samples were in the ``batch`` of a step; in the batcher's thread.
        """
        self.pipeline, self.options = pipeline, options or BatchOptions()
        latents = pipeline.bundle.latents
        scale = latents.vae_scale_factor
        self.sizes = self.options.sizes or ((latents.height * scale, latents.width * scale),)
        self._stages = Stages(pipeline.graphs, waits=True)
        self._core = Core(self._stages, self._room, observe=observe)
        self._cap: dict[tuple[int, int], int] = {}
        self._company = 0
        self._holds = ExitStack()  # the pipeline, from the warm-up on
        self._wake = threading.Condition()
        self._inbox: list[Task] = []
        self._state: Literal["cold", "serving", "draining", "closed"] = "cold"
        self._thread: threading.Thread | None = None
        self._ticked = time.perf_counter()
        self._queued = self._requests = 0
        self._running: Mapping[str, int] = {}
        self._finished = 0
        self._failures: Counter[str] = Counter()
        self._pace = 1.0  # seconds between requests that end, lately
        self._ended = time.perf_counter()

    def warm_up(self) -> None:
        """Open, capture and allocate everything, measure how many samples should share a step, and start to serve.

        Raises Cancelled when it is closed, before or meanwhile.
        """
        self._require_open()
        if self._state != "cold":
            return
        self._holds.enter_context(self.pipeline.exclusive())
        warm: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(warm,), name="dnp-batcher", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a library's threads do not survive the end of a process that runs it
        try:
            warm.result()
        except Cancelled:  # by close(), which does the rest
            raise
        except BaseException:  # whatever went wrong, the pipeline is its owner's again
            self.close()
            self._state = "cold"
            raise

    def _run(self, warm: Future[None]) -> None:
        """The thread: it does the warm-up too, so that what is captured is its own."""
        try:
            self._prepare()
            self._made_with = self.pipeline.made_with
            with self._wake:
                self._require_open()
                self._state = "serving"
        except BaseException as error:
            warm.set_exception(error)
            return
        warm.set_result(None)
        self._serve()

    def _prepare(self) -> None:
        graphs = self.pipeline.graphs
        graphs.open("encode_text", "denoise", "decode_latents", "encode_image", "caption_step")
        most = graphs.batch if self.options.samples is None else min(self.options.samples, graphs.batch)
        rooms = [
            self._room_of(most, size, windows)
            for size in sorted(self.sizes, key=lambda size: -size[0] * size[1])
            for windows in sorted(self.options.windows, reverse=True)
        ]
        for room in rooms:  # what grows has grown before anything is captured, for it moves
            self._stages.open(room)
        graphs.captioner.reserve()
        graphs.forget()
        graphs.warm_up(captioner=True, sizes=self.sizes)
        for room in rooms:
            self._warm(room)

    def _warm(self, room: Room) -> None:
        """Find out how many samples should share a step, and run everything once with so many."""
        self._require_open()
        stages, size = self._stages, (room.height, room.width)
        if self.options.samples is None and size not in self._cap:
            stages.open(room)
            self._cap[size] = measure_cap(lambda count: stages.rehearse(2 * count), room.places)
        room = replace(room, places=self._cap.setdefault(size, room.places))
        job = self.pipeline.resolve(Request("a picture", dnp=False, steps=4, height=room.height, width=room.width))
        captioner = self.pipeline.graphs.captioner
        settings = [captioner.settings(beams=beams) for beams in (captioner.widest, 1)]
        rehearse(stages, room, self.pipeline.bundle.guidance.roles, settings)
        if room.places > 1:
            wanted = sampling("final", job, ["a picture"] * room.places, [""] * room.places)
            self._company = max(self._company, measure_company(stages, room, wanted))

    def submit(
        self,
        request: Request | Job,
        *,
        what: Literal["images", "negatives"] = "images",
        priority: int = 0,
        deadline: float | None = None,
        previews: int = 0,
        listener: Listener | None = None,
    ) -> Ticket[Result]:
        """Queue a request; any thread may.

        Args:
            what: ``images``, or ``negatives`` for the first half alone, as of ``Pipeline.dns``.
            priority: the higher, the sooner.
            deadline: seconds from now after which it ends with ``DeadlineExceeded``.
            previews: pictures on the way, of each image in each pass, evenly spaced.
            listener: is given each event in the batcher's thread, and must not block.

        Raises:
            SettingsError: for settings that cannot be honoured, and for a size that is not served.
            Busy: the queue is full.
            Draining: nothing more is taken.
        """
        job = request if isinstance(request, Job) else self.pipeline.resolve(request)
        self._check(job)
        ticket: Ticket[Result] = Ticket(listener, self._call)
        cache = self.options.negatives
        kept = None if cache is None else cache.of(job, self._made_with)
        do = (make_images if what == "images" else find_negatives)(job, ticket.tell, kept)

        def result(made: Made, seconds: dict[str, float]) -> Result:
            return Result(**vars(made), request=job.request, seconds=seconds, **self._made_with)

        return self._queue(ticket, do, result, priority, deadline, previews)

    def caption(
        self,
        images: Sequence[Image],
        *,
        beams: int = 1,
        prefix: str = "",
        min_length: int = 0,
        max_length: int | None = None,
        priority: int = 0,
        deadline: float | None = None,
        listener: Listener | None = None,
    ) -> Ticket[list[str]]:
        """Queue images to be put into words; the settings are those of ``Pipeline.caption``."""
        settings: CaptionSettings = self.pipeline.graphs.captioner.settings(
            beams=beams, prefix=prefix, min_length=min_length, max_length=max_length
        )
        pixels = pixels_of(images)
        ticket: Ticket[list[str]] = Ticket(listener, self._call)
        return self._queue(ticket, describe(pixels, settings), lambda texts, seconds: texts, priority, deadline, 0)

    def drain(self, timeout: float | None = None) -> bool:
        """Take nothing more, and wait until everything taken is done; False when it is not in ``timeout`` seconds."""
        with self._wake:
            if self._state == "serving":
                self._state = "draining"
            return self._wake.wait_for(lambda: not self._inbox and not self._core.tasks, timeout)

    def close(self) -> None:
        """Cancel what is not done, and end the thread; the pipeline is its owner's again."""
        if self.pipeline.graphs.backend.forked:
            return
        atexit.unregister(self.close)
        with self._wake:
            self._state = "closed"
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
            self.pipeline.graphs.forget()
        self._holds.close()

    def __enter__(self) -> Batcher:
        self.warm_up()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def status(self) -> Status:
        """How it is, for whoever watches."""
        with self._wake:
            cache = self.options.negatives
            return Status(
                state=self._state,
                idle=time.perf_counter() - self._ticked,
                alive=self._thread is not None and self._thread.is_alive(),
                queued=self._queued,
                queue=self.options.queue,
                requests=self._requests,
                running=dict(self._running),
                cap=dict(self._cap),
                company=self._company,
                sizes=self.sizes,
                windows=self.options.windows,
                steps=self.options.steps,
                counts={"steps": self._core.steps, "samples": self._core.samples, "finished": self._finished},
                failures=dict(self._failures),
                hits=0 if cache is None else cache.hits,
                misses=0 if cache is None else cache.misses,
                **self.pipeline.made_with,
            )

    def _room(self, want: Sampling) -> Room:
        size = want.height, want.width
        return self._room_of(self._cap[size], size, want.windows)

    def _room_of(self, places: int, size: tuple[int, int], windows: int) -> Room:
        steps = self.options.steps + 1
        return Room(places, steps, steps, *size, windows)

    def _check(self, job: Job) -> None:
        """Raises SettingsError for what would have to be allocated or captured while others are served."""
        self._require_serving()
        self.pipeline.graphs.require_open()
        check_served(job, self.sizes, self.options.windows, self.options.steps)
        self.pipeline.graphs.validate(job)

    def _require_open(self) -> None:
        if self._state == "closed":
            raise Cancelled("the engine was closed before it was warm; make another one")

    def _require_serving(self) -> None:
        if self._state == "cold":
            raise DnpError("the batcher is not warm yet; call warm_up first")
        if self._state != "serving":
            raise Draining("the engine takes no more requests, it is about to end; ask another one", 5.0)

    def _queue(
        self,
        ticket: Ticket[Any],
        do: Work[Any],
        result: Callable[[Any, dict[str, float]], Any],
        priority: int,
        deadline: float | None,
        previews: int,
    ) -> Ticket[Any]:
        arrived = time.perf_counter()

        def tell(told: Step | Picture) -> None:
            event: Event = Progress(told.phase, told.index, told.total) if isinstance(told, Step) else told
            ticket.tell(event)

        def finish(made: Any, error: BaseException | None) -> None:
            now = time.perf_counter()
            self._pace += 0.1 * (now - self._ended - self._pace)
            self._ended = now
            if error is None:
                self._finished += 1
                waited = (now if task.begun is None else task.begun) - arrived
                ticket.set_result(result(made, {"queue": waited, **task.seconds, "total": now - arrived}))
            else:
                self._failures[type(error).__name__] += 1
                ticket.set_exception(error)

        task = Task(
            do,
            finish,
            tell,
            priority=priority,
            deadline=NEVER if deadline is None else arrived + deadline,
            previews=previews,
            stopped=ticket.cancel_asked.is_set,
            arrived=arrived,
        )
        with self._wake:
            self._require_serving()
            if self._queued >= self.options.queue:
                self._failures["Busy"] += 1
                raise Busy(
                    f"{self._queued} requests are waiting, and no more may; try again later",
                    max(1.0, self._queued * self._pace),
                )
            self._inbox.append(task)
            self._queued += 1
            self._wake.notify_all()
        return ticket

    def _call(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _serve(self) -> None:
        core = self._core
        while True:
            with self._wake:
                waiting = sum(task.begun is None for task in core.tasks)
                self._queued, self._requests = len(self._inbox) + waiting, len(core.tasks) - waiting
                self._running = core.running
                if self._state == "closed":
                    break
                if not self._inbox and not core.tasks:
                    self._wake.notify_all()  # whoever waits for the end of all work
                    self._wake.wait(_HEARTBEAT)
                inbox, self._inbox = self._inbox, []
            self._ticked = time.perf_counter()
            try:
                for task in inbox:
                    core.add(task)
                core.tick()
            except Exception as error:
                _log.exception("the scheduler failed; every request in it ends, and it goes on")
                self._end_all(DnpError(f"the engine failed: {error}"))
                core.reset()
        self._end_all(Cancelled("the engine was closed before the request was done"))

    def _end_all(self, error: BaseException) -> None:
        with self._wake:
            inbox, self._inbox = self._inbox, []
        for task in [*self._core.tasks, *inbox]:
            if task in inbox:
                self._core.tasks.append(task)
            self._core.drop(task, error)
