"""The whole request: DNS, caption, regenerate; on one bundle and one backend."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from dnp.engine.bundle import Bundle
from dnp.engine.errors import BundleError, Cancelled, DnpError, SettingsError
from dnp.engine.registry import open_backend
from dnp.engine.session import Backend, BackendOptions, Buffer, Session
from dnp.runtime.captioner import Captioner
from dnp.runtime.clock import Clock
from dnp.runtime.denoise import Sample, denoise, finite, load_samples
from dnp.runtime.request import Request, Result, Step
from dnp.runtime.samplers import SamplerTable, check_defaults, sampler_table
from dnp.runtime.schedule import NoiseSchedule
from dnp.runtime.tokenizer import PromptTokenizer
from dnp.runtime.warmup import prepare_sampling

# Larger requests are sampled in batches of this size: a constant, because the batch size decides the last bits of
# an image, and an image must be reproducible from its settings alone.
BATCH = 8

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]
Callback = Callable[[Step], object]


class Pipeline:
    """Diffusion-negative prompting on one bundle: call it with a prompt.

    >>> pipeline = Pipeline.open()
    >>> result = pipeline("a large red circle left of a small blue square", seed=7)
    >>> result.images[0].save("dnp.png"); result.negatives[0]

    One request at a time: the buffers are the pipeline's own. Open one pipeline per thread. A ``Backend`` that is
    handed in becomes the pipeline's, and is closed with it.
    """

    def __init__(self, bundle: Bundle, backend: str | Backend = "cpu", options: BackendOptions | None = None) -> None:
        self.bundle = self._plans = bundle  # whose weights run, and for which the graphs were compiled
        self._backend = backend if isinstance(backend, Backend) else open_backend(backend, options)
        self._schedule = _schedule_of(bundle)
        self._busy = threading.Lock()
        self._closed = False
        latents = bundle.latents
        self._sizes = [(latents.height * latents.pixels, latents.width * latents.pixels)]  # that runs are recorded for
        self._prepared: set[str] = set()
        self._sessions: dict[str, Session] = {}  # by graph
        self._opening = 0.0  # seconds spent on opening that no result has told of

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
        engines: Path | None = None,
    ) -> Pipeline:
        """Open a bundle, the shipped default one when none is named. The options are those of ``BackendOptions``.

        Raises BundleError when it is missing or damaged, BackendError when ``backend`` cannot run here.
        """
        started = time.perf_counter()
        opened = Bundle.default() if bundle is None else Bundle.open(Path(bundle))
        options = BackendOptions(threads, precision, device, eager, memory_limit, engines)
        pipeline = cls(opened, backend, options)
        pipeline._opening = time.perf_counter() - started
        try:
            pipeline._encode_text  # noqa: B018  opened now, so that a backend that cannot run says so here
        except BaseException:
            pipeline.close()
            raise
        return pipeline

    @property
    def runs_on(self) -> str:
        """What really runs the graphs, as the library itself says."""
        return self._encode_text.backend

    # Each graph is opened when it is first needed: plain guidance never loads the captioner.

    @cached_property
    def _encode_text(self) -> Session:
        return self._session("encode_text")

    @cached_property
    def _denoise(self) -> Session:
        return self._session("denoise")

    @cached_property
    def _decode(self) -> Session:
        session = self._session("decode_latents")
        session.link("latents", self._denoise.outputs["latents"])
        return session

    @cached_property
    def _captioner(self) -> Captioner:
        return Captioner(self.bundle, self._session("encode_image"), self._session("caption_step"))

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        """The prompt tokenizer of the bundle."""
        return PromptTokenizer(self.bundle)

    def _session(self, graph: str) -> Session:
        self._check_open()
        started = time.perf_counter()
        session = self._backend.session(self._plans.graph(graph), self._plans)
        self._sessions[graph] = session
        if graph in self._plans.unlike(self.bundle):
            session.refit(self.bundle.graph(graph).path)
        self._opening += time.perf_counter() - started
        return session

    def _open_graphs(self, request: Request, tables: Sequence[SamplerTable]) -> Clock:
        """A clock for one request, which has to open what is not open yet and tells of all that was opened for it.

        Raises SettingsError when the graphs are compiled for sizes that the request or its ``tables`` do not have.
        """
        clock = Clock()
        before, self._opening = self._opening, 0.0
        with clock.phase("open"):
            self.warm_up(captioner=request.runs_dns)
        self._opening = 0.0
        clock.add("open", before)
        for table in tables:
            self._denoise.bucket("rows", len(table.rows))
        last = request.images % self._batch or self._batch
        for batch in {min(request.images, self._batch), last}:
            self._denoise.admit(batch=batch)
            self._decode.admit(batch=batch)
        assert request.height is not None and request.width is not None
        self._admit(request.height, request.width, captioner=request.runs_dns)
        return clock

    def warm_up(self, *, captioner: bool = True, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Do now, rather than with the first request that needs it, what is done once: open the graphs, record runs.

        ``sizes`` are those of images, as (height, width) in pixels, to record runs for besides the default size, for
        this pipeline's life; on a GPU each takes memory of its own.

        Raises SettingsError for a size that the bundle or its plans do not have, DnpError when closed.
        """
        self._check_open()
        self._decode  # noqa: B018  reads the latents of the denoise session, so that one is opened too
        if captioner:
            self._captioner  # noqa: B018
        new = [(height, width) for height, width in dict.fromkeys(sizes) if (height, width) not in self._sizes]
        for height, width in new:
            Request("a size", height=height, width=width).resolve(self.bundle)
            self._admit(height, width, captioner=captioner)
        if new:
            captioner = captioner or "captions" in self._prepared
            self._sizes += new
            self._prepared.clear()
        least = self._denoise.least.get("batch", 1)
        batches = [batch for batch in self._backend.batches if least <= batch <= self._batch]
        if "sampling" not in self._prepared:
            samplers = ("euler_a", "ddim")  # one that draws noise on the way, and one that does not
            tables = [sampler_table(self._schedule, sampler, 2, 1.0) for sampler in samplers]
            sessions = (self._encode_text, self._denoise, self._decode)
            prepare_sampling(self.bundle, *sessions, batches=batches, sizes=self._sizes, tables=tables)
            self._prepared.add("sampling")
        if captioner and "captions" not in self._prepared:
            self._captioner.prepare(batches, self._sizes)
            self._prepared.add("captions")

    def _admit(self, height: int, width: int, *, captioner: bool) -> None:
        """Raises SettingsError when the graphs are compiled for other sizes than these, in pixels."""
        pixels = self.bundle.latents.pixels
        for session in (self._denoise, self._decode):
            session.admit(height=height // pixels, width=width // pixels)
        if captioner:
            self._captioner.admit(height, width)

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
        with self._exclusive():
            self.bundle.check_same_model(other)
            changed = [session for graph, session in self._sessions.items() if graph in self.bundle.unlike(other)]
            for session in changed:
                session.check_refit()
            try:
                for session in changed:
                    session.refit(other.graph(session.graph.name).path)
            except BaseException:
                self._free()  # some graphs have the new weights and some the old ones
                raise
            self.bundle, self._schedule = other, schedule
            recorded = set(self._prepared)
            self._prepared.clear()  # what was recorded holds the old weights
            if recorded:
                self.warm_up(captioner="captions" in recorded)

    @property
    def _batch(self) -> int:
        """The most images sampled at once."""
        return min(BATCH, self._denoise.most.get("batch", BATCH))

    def close(self) -> None:
        """Free the graphs and their buffers, which can be hundreds of megabytes; the pipeline cannot be used again.

        Closing it again does nothing. Raises DnpError while a request runs.
        """
        if self._closed:
            return
        with self._exclusive():
            self._free()

    def _free(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._backend.close()
        self._closed = True

    def __enter__(self) -> Pipeline:
        self._check_open()
        return self

    def _check_open(self) -> None:
        if self._closed:
            raise DnpError("this pipeline is closed; open another one")

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, prompt: str, *, progress: Callback | None = None, **settings: Any) -> Result:
        """Generate images for ``prompt``; ``settings`` are those of ``Request``.

        ``progress`` is called with each ``Step``; when it returns ``False`` the work stops there.

        Raises SettingsError for settings that cannot be honoured, Cancelled when ``progress`` stopped the work.
        """
        return self.run(Request.from_dict({"prompt": prompt, **settings}), progress)

    def run(self, request: Request, progress: Callback | None = None) -> Result:
        """``steps`` driven to its end: the whole request. See ``__call__``."""
        return drive(self.steps(request), progress)

    def dns(self, prompt: str, *, progress: Callback | None = None, **settings: Any) -> Result:
        """Only the first half: the DNS images are the result's ``arrays``, their captions its ``negatives``."""
        request = self.resolve(Request.from_dict({"prompt": prompt, **settings}))
        if not request.runs_dns:
            raise SettingsError("DNS finds n*; it takes no negative prompt of your own and cannot be switched off")
        return drive(self._dns_steps(request), progress)

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
        if isinstance(images, Image.Image) or not isinstance(images, Iterable):
            raise SettingsError(f"caption takes a list of PIL images, not one {type(images).__name__}")
        images = list(images)
        for image in images:
            if not isinstance(image, Image.Image):
                raise SettingsError(
                    f"caption takes PIL images, not {type(image).__name__}; make one with PIL.Image.fromarray"
                )
        with self._exclusive():
            self._captioner.check(beams=beams, prefix=prefix, min_length=min_length, max_length=max_length)
            return [
                self._captioner.captions(
                    np.asarray(image.convert("RGB"))[None],
                    beams=beams,
                    prefix=prefix,
                    min_length=min_length,
                    max_length=max_length,
                )[0]
                for image in images
            ]

    def resolve(self, request: Request) -> Request:
        """``request`` with nothing left open, and everything about it checked.

        Raises SettingsError for whatever cannot be honoured.
        """
        if not isinstance(request, Request):
            raise SettingsError(
                f"not a Request but {type(request).__name__}; call the pipeline with a prompt, or make one"
            )
        request = request.resolve(self.bundle)
        if request.runs_dns:
            self._captioner.check(
                beams=request.beams,
                prefix=request.prefix,
                min_length=request.min_length,
                max_length=request.max_length,
            )
        return request

    def steps(self, request: Request) -> Generator[Step, None, Result]:
        """The request as a generator: yields each ``Step``, returns the ``Result``.

        Dropping the generator cancels the request within the step it is in. Raises SettingsError as ``resolve`` does.
        """
        request = self.resolve(request)
        with self._exclusive():
            final = request.final_table(self._schedule)
            dns_table = request.dns_table(self._schedule) if request.runs_dns else None
            clock = self._open_graphs(request, [final] if dns_table is None else [final, dns_table])
            seeds = [request.seed + i for i in range(request.images)]
            dns = plain = None
            negatives = [request.negative or ""] * request.images
            if dns_table is not None:
                dns, negatives = yield from self._find_negatives(request, dns_table, clock)
            prompts = [request.prompt] * request.images
            if request.compare:
                empty = [""] * request.images
                plain = yield from self._sample("plain", prompts, empty, final, seeds, request, clock)
            arrays = yield from self._sample("final", prompts, negatives, final, seeds, request, clock)
        return self._result(request, clock, arrays, negatives, dns, plain)

    def sample(
        self, prompts: Sequence[str], negatives: Sequence[str], request: Request
    ) -> Generator[Step, None, Pixels]:
        """Sample pairs (prompt, negative) as they stand, with the final settings of ``request``.

        The empty string is ∅ in both places. Image ``i`` uses ``request.seed + i``. Returns uint8 ``[B, H, W, 3]``.
        """
        if len(prompts) != len(negatives) or not prompts:
            raise SettingsError(f"{len(prompts)} prompts and {len(negatives)} negatives do not pair up")
        request = request.resolve(self.bundle)
        seeds = [request.seed + i for i in range(len(prompts))]
        table = request.final_table(self._schedule)
        with self._exclusive():
            return (yield from self._sample("final", prompts, negatives, table, seeds, request, Clock()))

    def _dns_steps(self, request: Request) -> Generator[Step, None, Result]:
        with self._exclusive():
            table = request.dns_table(self._schedule)
            clock = self._open_graphs(request, [table])
            arrays, negatives = yield from self._find_negatives(request, table, clock)
        return self._result(request, clock, arrays, negatives, arrays, None)

    def _find_negatives(
        self, request: Request, table: SamplerTable, clock: Clock
    ) -> Generator[Step, None, tuple[Pixels, list[str]]]:
        assert request.dns_seed is not None
        seeds = [request.dns_seed + i for i in range(request.images)]
        prompts, empty = [request.prompt] * request.images, [""] * request.images
        images = yield from self._sample("dns", prompts, empty, table, seeds, request, clock)
        negatives: list[str] = []
        most = min(self._batch, self._captioner.most(request.beams))
        for start in range(0, request.images, most):
            part = images[start : start + most]
            # The only batch of them is still where it was decoded.
            there = self._decode.outputs["image"] if request.images <= most else None
            negatives += yield from clock.timed("caption", self._describe(part, there, request))
        for number, negative in enumerate(negatives):
            if not negative.strip():
                raise DnpError(
                    f"the captioner has no words for the DNS image of seed {seeds[number]}, and an empty n* would be "
                    "plain guidance; raise min_length, take another seed, or write n* yourself (negative)"
                )
        return images, negatives

    def _describe(self, images: Pixels, there: Buffer | None, request: Request) -> Generator[Step, None, list[str]]:
        assert request.max_length is not None
        steps = self._captioner.steps(
            images,
            there=there,
            beams=request.beams,
            prefix=request.prefix,
            min_length=request.min_length,
            max_length=request.max_length,
        )
        while True:
            try:
                length = next(steps)
            except StopIteration as stop:
                captions: list[str] = stop.value
                return captions
            yield Step("caption", length, request.max_length, images.copy)

    def _sample(
        self,
        phase: str,
        prompts: Sequence[str],
        negatives: Sequence[str],
        table: SamplerTable,
        seeds: Sequence[int],
        request: Request,
        clock: Clock,
    ) -> Generator[Step, None, Pixels]:
        """Sample every (prompt, negative, seed) with ``table``, in batches; returns uint8 ``[B, H, W, 3]``."""
        images = []
        batches = range(0, len(seeds), self._batch)
        total = len(table.rows) * len(batches)
        for number, start in enumerate(batches):
            part = slice(start, start + self._batch)
            with clock.phase(phase):
                rows = self._load(prompts[part], negatives[part], table, seeds[part], request)
            for row in clock.timed(phase, denoise(self._denoise, rows)):
                yield Step(phase, number * rows + row, total, self._decode_now)
            with clock.phase("decode"):
                if not finite(self._denoise.outputs["latents"].read()):
                    raise DnpError(
                        f"the latents of the {phase} pass are no longer finite numbers; bring the guidance nearer "
                        "to 0, or use a bundle of higher precision"
                    )
                images.append(self._decode_now())
                if flat := [seeds[start + i] for i, image in enumerate(images[-1]) if image.min() == image.max()]:
                    raise DnpError(
                        f"the {phase} image of seed {flat[0]} is one flat colour, as when a decoder overflows in fp16; "
                        "use a bundle of higher precision, or export it with --check-ranges"
                    )
        return np.concatenate(images)

    def _load(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        table: SamplerTable,
        seeds: Sequence[int],
        request: Request,
    ) -> int:
        latents = self.bundle.latents
        assert request.height is not None and request.width is not None
        shape = (latents.channels, request.height // latents.pixels, request.width // latents.pixels)
        rows = load_samples(self._denoise, [Sample(table, seed) for seed in seeds], shape)
        self._encode_text.reshape(batch=len(prompts))
        for name, texts in (("base_context", negatives), ("prompt_context", prompts)):
            self._encode_text.inputs["ids"].write(self.tokenizer.encode(texts))
            self._encode_text.run()
            self._denoise.inputs[name].copy(self._encode_text.outputs["context"])
        return rows

    def _decode_now(self) -> Pixels:
        """The present latents as uint8 ``[B, H, W, 3]``."""
        self._check_open()  # a preview may have outlived the pipeline
        batch, _, height, width = self._denoise.outputs["latents"].shape
        self._decode.reshape(batch=batch, height=height, width=width)
        self._decode.run()
        return self._decode.outputs["image"].read().astype(np.uint8, copy=False)

    def _result(
        self,
        request: Request,
        clock: Clock,
        arrays: Pixels,
        negatives: list[str],
        dns: Pixels | None,
        plain: Pixels | None,
    ) -> Result:
        return Result(
            arrays=arrays,
            dns_arrays=dns,
            plain_arrays=plain,
            negatives=negatives,
            request=request,
            seconds=clock.total(),
            bundle=self.bundle.fingerprint,
            backend=self._backend.name,
            precision=self._backend.options.precision,
            runs_on=self.runs_on,
        )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise DnpError("this pipeline is busy with another request; finish or close it, or open one per thread")
        try:
            self._check_open()
            yield
        finally:
            self._busy.release()


def _schedule_of(bundle: Bundle) -> NoiseSchedule:
    """The bundle's schedule. Raises BundleError when its own defaults cannot be honoured with it."""
    try:
        schedule = NoiseSchedule.from_config(bundle.schedule)
        check_defaults(schedule, bundle.defaults)
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
