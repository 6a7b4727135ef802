"""The whole request: DNS, caption, regenerate; on one bundle and one backend."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from dnp.engine.backends.registry import open_backend
from dnp.engine.backends.session import Backend, BackendOptions, Session
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.errors import BundleError, Cancelled, DnpError, SettingsError
from dnp.runtime.batching.batcher import Batcher
from dnp.runtime.batching.core import Core
from dnp.runtime.batching.events import Listener, Ticket
from dnp.runtime.batching.stages import Room, Stages
from dnp.runtime.batching.tasks import Task
from dnp.runtime.batching.work import Made, Sampling, Work, alone, find_negatives, make_images, sampling
from dnp.runtime.captioning.captioner import part_sizes
from dnp.runtime.job import Job, resolve
from dnp.runtime.pipeline.graphs import Graphs, Needs
from dnp.runtime.request import Request
from dnp.runtime.result import Result, Step, pixels_of
from dnp.runtime.sampling.samplers import check_defaults
from dnp.runtime.sampling.schedule import Schedule, read_schedule
from dnp.runtime.tokenizer import PromptTokenizer

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]
Callback = Callable[[Step], object]


class Pipeline:
    """Diffusion-negative prompting on one bundle: call it with a prompt.

    >>> pipeline = Pipeline.open()
    >>> result = pipeline("a large red circle left of a small blue square", seed=7)
    >>> result.save("out"); result.negatives[0]

    One request at a time: the buffers are the pipeline's own. Open one pipeline per thread, and in a forked process
    one of its own. A ``Backend`` that is handed in becomes the pipeline's, and is closed with it.
    """

    def __init__(self, bundle: Bundle, backend: str | Backend = "cpu", options: BackendOptions | None = None) -> None:
        backend = backend if isinstance(backend, Backend) else open_backend(backend, options)
        self.graphs = Graphs(bundle, backend)
        self._schedule = _schedule_of(bundle)
        self._core = Core(Stages(self.graphs), self._room)
        self._busy = threading.Lock()
        self._batcher: Batcher | None = None
        self._starting = threading.Lock()  # held while it is made

    @classmethod
    def open(
        cls,
        bundle: str | Path | None = None,
        backend: str = "cpu",
        *,
        threads: int | None = None,
        precision: str | None = None,
        device: int = 0,
        eager: bool = False,
        memory_limit: int | None = None,
        plans: Path | None = None,
    ) -> Pipeline:
        """Open a bundle, the shipped default one when none is named. The options are those of ``BackendOptions``.

        Raises BundleError when it is missing or damaged, BackendError when ``backend`` cannot run here, SettingsError
        for options that it does not have.
        """
        started = time.perf_counter()
        opened = Bundle.default() if bundle is None else Bundle.open(Path(bundle))
        options = BackendOptions(threads, precision, device, eager, memory_limit, plans)
        pipeline = cls(opened, backend, options)
        pipeline.graphs.opening = time.perf_counter() - started
        try:
            pipeline.graphs.open("encode_text")  # now, so that a backend that cannot run says so here
        except BaseException:
            pipeline.close()
            raise
        return pipeline

    @property
    def bundle(self) -> Bundle:
        """The bundle whose weights run."""
        return self.graphs.bundle

    @property
    def runs_on(self) -> str:
        """What really runs the graphs, as the library itself says."""
        (session,) = self.graphs.open("encode_text")  # any of them tells
        return session.backend

    @property
    def sessions(self) -> Mapping[str, Session]:
        """The sessions that are open by now, by graph: to look at, not to run."""
        return self.graphs.sessions

    @property
    def made_with(self) -> dict[str, Any]:
        """What a ``Result`` will say that it was made with, by its names."""
        backend = self.graphs.backend
        return {
            "bundle": self.bundle.fingerprint,
            "backend": backend.name,
            "precision": backend.options.precision,
            "runs_on": self.runs_on,
        }

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The prompt tokenizer of the bundle; the first one, where there are several."""
        return self.graphs.tokenizers[0]

    def warm_up(self, *, captioner: bool = True, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Do now, rather than with the first request that needs it, what is done once: open the graphs, capture runs.

        ``sizes`` are those of images, as (height, width) in pixels, to capture besides the default size, for this
        pipeline's life; on a GPU each takes memory of its own.

        Raises SettingsError for a size that the bundle or its plans do not have, DnpError when closed.
        """
        self.graphs.warm_up(captioner=captioner, sizes=sizes)

    def refit(self, bundle: str | Path | Bundle) -> None:
        """Take over the weights of another bundle, such as a fine-tune's, without compiling anything; its defaults and
        its noise schedule come with it.

        Only for plans that were built for it (``dnp build --refit``), and for a bundle whose graphs differ in nothing
        but weights. All weights are read from that bundle, never changed in place, so going back to the first bundle
        gives its own images again.

        Raises BundleError for a bundle that cannot be opened; SettingsError for one of another model, and BackendError
        for a backend or plans that keep their weights, with nothing changed; BackendError, with the pipeline closed,
        when the weights do not fit after all.
        """
        other = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
        schedule = _schedule_of(other)
        with self.exclusive():
            self.graphs.refit(other)
            self._schedule = schedule

    def close(self) -> None:
        """Free the graphs and their buffers, which can be hundreds of megabytes; the pipeline cannot be used again.

        Closing it again does nothing, and so does closing it in a forked child. Raises DnpError while a request runs.
        """
        if self.graphs.closed:
            return
        if self.graphs.backend.forked:
            self.graphs.close()
            return
        if self._batcher is not None:
            self._batcher.close()
        with self.exclusive():
            self.graphs.close()

    def __enter__(self) -> Pipeline:
        self.graphs.require_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, prompt: str, *, progress: Callback | None = None, **settings: Any) -> Result:
        """Generate images for ``prompt``; ``settings`` are those of ``Request``.

        ``progress`` is called with each ``Step``; when it returns ``False`` the work stops there.

        Raises SettingsError for settings that cannot be honoured, Cancelled when ``progress`` stopped the work.
        """
        return self.run(Request.from_dict({"prompt": prompt, **settings}), progress)

    def run(self, request: Request | Job, progress: Callback | None = None) -> Result:
        """The whole request: ``steps`` driven to its end."""
        return drive(self.steps(request), progress)

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
        """Queue a request and return its future; any number of threads may. See ``Batcher.submit``.

        The first call warms the pipeline up for its default size and starts a ``Batcher``, whose the graphs are from
        then on: ``run`` and the like say that they are busy. Make a ``Batcher`` yourself to serve other sizes.
        """
        with self._starting:
            if self._batcher is None:
                batcher = Batcher(self)
                batcher.warm_up()
                self._batcher = batcher
        return self._batcher.submit(
            request, what=what, priority=priority, deadline=deadline, previews=previews, listener=listener
        )

    def dns(self, prompt: str, *, progress: Callback | None = None, **settings: Any) -> Result:
        """Only the first half: the DNS images are the result's ``arrays``, their captions its ``negatives``."""
        return drive(self.dns_steps(Request.from_dict({"prompt": prompt, **settings})), progress)

    def caption(
        self,
        images: Iterable[Image.Image],
        *,
        beams: int = 1,
        prefix: str = "",
        min_length: int = 0,
        max_length: int | None = None,
    ) -> list[str]:
        """Put each PIL image into words; sizes may differ.

        The settings are those of ``Request``. Raises SettingsError for what is no PIL image and for settings that
        cannot be honoured.
        """
        pictures = pixels_of(images)
        with self.exclusive():
            captioner = self.graphs.captioner
            how = captioner.settings(beams=beams, prefix=prefix, min_length=min_length, max_length=max_length)
            return [captioner.captions(picture[None], how)[0] for picture in pictures]

    def resolve(self, request: Request) -> Job:
        """``request`` with nothing left open, and everything about it checked; ``run`` and ``steps`` take it, too.

        Raises SettingsError for whatever cannot be honoured.
        """
        if not isinstance(request, Request):
            raise SettingsError(
                f"not a Request but {type(request).__name__}; call the pipeline with a prompt, or make one"
            )
        job = resolve(request, self.bundle, self._schedule)
        if job.runs_dns:
            self.graphs.captioner.settings(**asdict(job.caption))
        return job

    def steps(self, request: Request | Job) -> Generator[Step, None, Result]:
        """The request as a generator: yields each ``Step``, returns the ``Result``.

        Dropping the generator cancels the request within the step it is in. Raises SettingsError as ``resolve`` does.
        """
        job = request if isinstance(request, Job) else self.resolve(request)
        return (yield from self._result(job, make_images(job)))

    def sample(
        self, prompts: Sequence[str], negatives: Sequence[str], request: Request | Job
    ) -> Generator[Step, None, Pixels]:
        """Sample pairs (prompt, negative) as they stand, with the final settings of ``request``.

        The empty string is ∅ in both places. Image ``i`` uses ``request.seed + i``. Returns uint8 ``[B, H, W, 3]``.
        """
        if len(prompts) != len(negatives) or not prompts:
            raise SettingsError(f"{len(prompts)} prompts and {len(negatives)} negatives do not pair up")
        job = request if isinstance(request, Job) else resolve(request, self.bundle, self._schedule)
        with self.exclusive():
            needs = Needs.of([job.final], part_sizes(len(prompts), self.graphs.batch))
            self.graphs.warm_up(captioner=False, needs=needs)
            pixels, _ = yield from self._work(alone(sampling("final", job, prompts, negatives)))
        return pixels

    def dns_steps(self, request: Request | Job) -> Generator[Step, None, Result]:
        """``dns`` as a generator. Raises SettingsError for a request that runs no DNS."""
        job = request if isinstance(request, Job) else self.resolve(request)
        return (yield from self._result(job, find_negatives(job)))

    def _result(self, job: Job, work: Work[Made]) -> Generator[Step, None, Result]:
        """Open what the job needs and is not open yet, and work it off.

        Raises SettingsError when the graphs are compiled for sizes that the job does not have.
        """
        with self.exclusive():
            started, graphs = time.perf_counter(), self.graphs
            before = graphs.opening  # told by the first request, which it was for
            needs = Needs.of(job.tables, part_sizes(job.images, graphs.batch))
            graphs.warm_up(captioner=job.runs_dns, needs=needs)
            opened = time.perf_counter()
            graphs.opening = 0.0
            graphs.validate(job)
            made, seconds = yield from self._work(work)
        ended = time.perf_counter()
        seconds = {"open": before + opened - started, **seconds, "total": before + ended - started}
        return Result(**vars(made), request=job.request, seconds=seconds, **self.made_with)

    def _work(self, work: Work[T]) -> Generator[Step, None, tuple[T, dict[str, float]]]:
        """Drive the scheduler with one piece of work in it; returns its outcome, and the seconds of each phase."""
        told: deque[Any] = deque()
        ended: list[tuple[Any, BaseException | None]] = []
        task = Task(work, lambda made, error: ended.append((made, error)), told.append)
        self._core.reset()
        try:
            self._core.add(task)
            while not ended:
                self._core.tick()
                while told:
                    yield told.popleft()
        finally:
            self._core.drop(task, Cancelled("the generator of steps was closed"))
        ((made, error),) = ended
        if error is not None:
            raise error
        return made, task.seconds

    def _room(self, want: Sampling) -> Room:
        """As many places as there are images, as long as the pass's own table."""
        places = min(len(want.seeds), self.graphs.batch)
        return Room(
            places, len(want.table.rows), max(1, len(want.table.noise_steps)), want.height, want.width, want.windows
        )

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nobody else uses the graphs in this block. Raises DnpError when somebody does already."""
        self.graphs.require_open()
        if not self._busy.acquire(blocking=False):
            raise DnpError("this pipeline is busy with another request; finish or close it, or open one per thread")
        try:
            self.graphs.require_open()  # another thread may have closed it just now
            yield
        finally:
            self._busy.release()


def _schedule_of(bundle: Bundle) -> Schedule:
    """The bundle's schedule. Raises BundleError when its own defaults cannot be honoured with it."""
    try:
        schedule = read_schedule(bundle.schedule)
        check_defaults(schedule.sized(bundle.latents.height, bundle.latents.width), bundle.defaults)
    except SettingsError as error:
        raise BundleError(f"{bundle.path}: its own settings cannot be honoured: {error}") from error
    return schedule


def drive(steps: Generator[Step, None, T], progress: Callback | None = None) -> T:
    """Run a generator of steps to its end and return what it returns; ``progress`` may stop it with ``False``."""
    try:
        while True:
            try:
                step = next(steps)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if progress is not None and _is_false(progress(step)):
                raise Cancelled(f"stopped by the progress callback in {step.phase} step {step.index} of {step.total}")
    finally:
        steps.close()  # frees the pipeline also when the callback raised and its exception is kept


def _is_false(answer: object) -> bool:
    return isinstance(answer, bool | np.bool_) and not answer  # None, which most callbacks return, goes on
