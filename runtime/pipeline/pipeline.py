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

from dnp.engine.backends.registry import open_backend
from dnp.engine.backends.session import Backend, BackendOptions, Buffer
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.errors import BundleError, Cancelled, DnpError, SettingsError
from dnp.runtime.pipeline.clock import Clock
from dnp.runtime.pipeline.graphs import Graphs
from dnp.runtime.request import Request, Result, Step
from dnp.runtime.sampling.denoise import Sample, denoise, finite, load_samples
from dnp.runtime.sampling.samplers import SamplerTable, check_defaults
from dnp.runtime.sampling.schedule import NoiseSchedule
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
        self._graphs = Graphs(bundle, backend)
        self._schedule = _schedule_of(bundle)
        self._busy = threading.Lock()

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

        Raises BundleError when it is missing or damaged, BackendError when ``backend`` cannot run here, SettingsError
        for options that it does not have.
        """
        started = time.perf_counter()
        opened = Bundle.default() if bundle is None else Bundle.open(Path(bundle))
        options = BackendOptions(threads, precision, device, eager, memory_limit, engines)
        pipeline = cls(opened, backend, options)
        pipeline._graphs.opening = time.perf_counter() - started
        try:
            pipeline._graphs.encode_text  # noqa: B018  opened now, so that a backend that cannot run says so here
        except BaseException:
            pipeline.close()
            raise
        return pipeline

    @property
    def bundle(self) -> Bundle:
        """The bundle whose weights run."""
        return self._graphs.bundle

    @property
    def runs_on(self) -> str:
        """What really runs the graphs, as the library itself says."""
        return self._graphs.encode_text.backend

    @property
    def made_with(self) -> dict[str, Any]:
        """What a ``Result`` will say that it was made with, by its names."""
        backend = self._graphs.backend
        return {
            "bundle": self.bundle.fingerprint,
            "backend": backend.name,
            "precision": backend.options.precision,
            "runs_on": self.runs_on,
        }

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        """The prompt tokenizer of the bundle."""
        return PromptTokenizer(self.bundle)

    def _open_graphs(self, request: Request, tables: Sequence[SamplerTable]) -> Clock:
        """A clock for one request, which has to open what is not open yet and tells of all that was opened for it.

        Raises SettingsError when the graphs are compiled for sizes that the request or its ``tables`` do not have.
        """
        clock, graphs = Clock(), self._graphs
        clock.add("open", graphs.opening)
        with clock.phase("open"):
            graphs.warm_up(captioner=request.runs_dns)
        graphs.opening = 0.0  # told now
        for table in tables:
            graphs.denoise.bucket("rows", len(table.rows))
        graphs.validate_images(request.images, captioner=request.runs_dns, beams=request.beams)
        assert request.height is not None and request.width is not None
        graphs.validate(request.height, request.width, captioner=request.runs_dns)
        return clock

    def warm_up(self, *, captioner: bool = True, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Do now, rather than with the first request that needs it, what is done once: open the graphs, record runs.

        ``sizes`` are those of images, as (height, width) in pixels, to record runs for besides the default size, for
        this pipeline's life; on a GPU each takes memory of its own.

        Raises SettingsError for a size that the bundle or its plans do not have, DnpError when closed.
        """
        self._graphs.warm_up(captioner=captioner, sizes=sizes)

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
            self._graphs.refit(other)
            self._schedule = schedule

    def close(self) -> None:
        """Free the graphs and their buffers, which can be hundreds of megabytes; the pipeline cannot be used again.

        Closing it again does nothing, and so does closing it in a forked child. Raises DnpError while a request runs.
        """
        if self._graphs.closed:
            return
        if self._graphs.backend.forked:
            self._graphs.close()
            return
        with self._exclusive():
            self._graphs.close()

    def __enter__(self) -> Pipeline:
        self._graphs.require_open()
        return self

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
            self._graphs.captioner.check(beams=beams, prefix=prefix, min_length=min_length, max_length=max_length)
            return [
                self._graphs.captioner.captions(
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
            self._graphs.captioner.check(
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
            self._graphs.warm_up(captioner=False)
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
        most = self._graphs.captioned(request.beams)
        for start in range(0, request.images, most):
            part = images[start : start + most]
            # The only batch of them is still where it was decoded.
            there = self._graphs.decode.outputs["image"] if request.images <= most else None
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
        steps = self._graphs.captioner.steps(
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
        batches = range(0, len(seeds), self._graphs.batch)
        total = len(table.rows) * len(batches)
        for number, start in enumerate(batches):
            part = slice(start, start + self._graphs.batch)
            with clock.phase(phase):
                rows = self._load(prompts[part], negatives[part], table, seeds[part], request)
            for row in clock.timed(phase, denoise(self._graphs.denoise, rows)):
                yield Step(phase, number * rows + row, total, self._decode_now)
            with clock.phase("decode"):
                if not finite(self._graphs.denoise.outputs["latents"].read()):
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
        rows = load_samples(self._graphs.denoise, [Sample(table, seed) for seed in seeds], shape)
        self._graphs.encode_text.reshape(batch=len(prompts))
        for name, texts in (("base_context", negatives), ("prompt_context", prompts)):
            self._graphs.encode_text.inputs["ids"].write(self.tokenizer.encode(texts))
            self._graphs.encode_text.run()
            self._graphs.denoise.inputs[name].copy(self._graphs.encode_text.outputs["context"])
        return rows

    def _decode_now(self) -> Pixels:
        """The present latents as uint8 ``[B, H, W, 3]``."""
        self._graphs.require_open()  # a preview may have outlived the pipeline
        batch, _, height, width = self._graphs.denoise.outputs["latents"].shape
        self._graphs.decode.reshape(batch=batch, height=height, width=width)
        self._graphs.decode.run()
        return self._graphs.decode.outputs["image"].read().astype(np.uint8, copy=False)

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
            **self.made_with,
        )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        self._graphs.require_open()
        if not self._busy.acquire(blocking=False):
            raise DnpError("this pipeline is busy with another request; finish or close it, or open one per thread")
        try:
            self._graphs.require_open()  # another thread may have closed it just now
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
