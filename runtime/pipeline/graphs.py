"""The five graphs of a bundle on one backend: opened when first needed, warmed up, given other weights, closed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from dnp.engine.backends.session import Backend, Session
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.bundle.contract import BATCH
from dnp.engine.errors import DnpError
from dnp.runtime.captioning.captioner import Captioner, part_sizes
from dnp.runtime.job import Job, resolve
from dnp.runtime.pipeline.conditioning import Conditioner
from dnp.runtime.request import Request
from dnp.runtime.sampling.denoise import Denoiser
from dnp.runtime.sampling.samplers import SamplerTable
from dnp.runtime.sampling.schedule import read_schedule
from dnp.runtime.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class Needs:
    """What a request will run, and what has to be captured for it.

    Attributes:
        images: how many images come at once.
        roles: rows of the network that each image has in a step.
        noise_steps: 2 for samplers that draw noise on the way, 1 for the others.
    """

    images: frozenset[int]
    roles: frozenset[int]
    noise_steps: tuple[int, ...]

    @classmethod
    def of(cls, tables: Iterable[SamplerTable], images: Collection[int]) -> Needs:
        """Those of samples by these tables."""
        tables = list(tables)
        roles = frozenset(len(roles) for table in tables for roles in table.roles)
        noise = {min(2, max(1, len(table.noise_steps))) for table in tables}
        return cls(frozenset(images), roles, tuple(sorted(noise, reverse=True)))


class Graphs:
    """Plain guidance never opens the captioner; ``refit`` opens what it changes. The backend is closed with the graphs.

    Attributes:
        bundle: whose weights run.
        opening: seconds spent on opening so far.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = self._plans = bundle  # the one that the graphs were compiled for stays
        self.backend = backend
        self.opening = 0.0
        self.closed = False
        self._sessions: dict[str, Session] = {}  # by graph
        latents, scale = bundle.latents, bundle.latents.vae_scale_factor
        self._sizes = [(latents.height * scale, latents.width * scale)]  # those that are captured
        self._captured: set[tuple[str, int, int]] = set()  # graph, images or rows, noise that a step draws

    @cached_property
    def tokenizers(self) -> list[PromptTokenizer]:
        """The prompt tokenizers of the bundle."""
        return [PromptTokenizer(self.bundle, number) for number in range(len(self.bundle.text.tokenizers))]

    @cached_property
    def conditioner(self) -> Conditioner:
        """Texts to what the network is conditioned on."""
        return Conditioner(self.bundle, self._session("encode_text"), self.tokenizers)

    @cached_property
    def denoiser(self) -> Denoiser:
        """One step of any samplers."""
        return Denoiser(self._session("denoise"))

    @cached_property
    def decode(self) -> Session:
        """Latents to images."""
        return self._session("decode_latents")

    @cached_property
    def captioner(self) -> Captioner:
        """Images to words, by the last two graphs."""
        return Captioner(self._plans, self._session("encode_image"), self._session("caption_step"))

    @property
    def sessions(self) -> Mapping[str, Session]:
        """Those that are open, by graph."""
        return MappingProxyType(self._sessions)

    @property
    def batch(self) -> int:
        """The most images sampled at once."""
        encode, denoise, decode = (session.limits for session in self._sampling)
        sizes = ((encode, "batch"), (denoise, "places"), (decode, "places"), (decode, "batch"))
        return min(limits.nearest(symbol, BATCH) for limits, symbol in sizes)

    @property
    def _sampling(self) -> list[Session]:
        return self.open("encode_text", "denoise", "decode_latents")

    def _session(self, graph: str) -> Session:
        self.require_open()
        if graph in self._sessions:  # and what was to be opened with it failed
            return self._sessions[graph]
        started = time.perf_counter()
        session = self.backend.session(self._plans.graph(graph), self._plans)
        self._sessions[graph] = session
        self.opening += time.perf_counter() - started
        return session

    def open(self, *graphs: str) -> list[Session]:
        """The sessions of these graphs, opened if they are not, with what stands on them."""
        standing: dict[str, Callable[[], object]] = {
            "encode_text": lambda: self.conditioner,
            "denoise": lambda: self.denoiser,
            "decode_latents": lambda: self.decode,
            "encode_image": lambda: self.captioner,
            "caption_step": lambda: self.captioner,
        }
        for graph in graphs:
            standing[graph]()
        return [self._sessions[graph] for graph in graphs]

    def warm_up(self, *, captioner: bool, sizes: Sequence[tuple[int, int]] = (), needs: Needs | None = None) -> None:
        """Open the graphs and capture them for every image size; see ``Pipeline.warm_up``.

        ``needs`` is what will run; whatever may when ``None``.
        """
        self.require_open()
        self.open("encode_text", "denoise", "decode_latents", *(["encode_image", "caption_step"] if captioner else []))
        new = [size for size in dict.fromkeys(sizes) if size not in self._sizes]
        for height, width in new:
            request = Request("a size", height=height, width=width, dnp=captioner)
            self.validate(resolve(request, self.bundle, read_schedule(self.bundle.schedule)))
        before = self._sizes, self._captured
        if new:
            captioner = captioner or self._has_captions
            self._sizes, self._captured = [*self._sizes, *new], set()
        try:
            self._capture(captioner, needs)
        except BaseException:
            self._sizes, self._captured = before  # a size that cannot be had is not tried again with each request
            raise

    def forget(self) -> None:
        """Have everything captured again: what was captured is another thread's, and ONNX Runtime replays it there
        alone."""
        self._captured = set()

    @property
    def _has_captions(self) -> bool:
        return any(graph == "caption_step" for graph, _, _ in self._captured)

    def _capture(self, captioner: bool, needs: Needs | None) -> None:
        """Capture what is not captured yet. Buffers get room for the most images first, whatever is wanted: what moves
        later would undo it.
        """
        batches = [batch for batch in self.backend.batches if batch <= self.batch]
        batches = [
            batch for batch in batches if all(s.limits.nearest("batch", batch) == batch for s in self._sampling[::2])
        ]
        if not batches:
            return
        wanted = needs or Needs(frozenset(batches), frozenset(range(1, self.bundle.guidance.roles + 1)), (2, 1))
        images = [batch for batch in batches if batch in wanted.images]
        fit = self.denoiser.session.limits.fit
        rows = sorted({fit("rows", roles * batch) for batch in images for roles in wanted.roles}, reverse=True)
        steps = [(count, noise) for noise in wanted.noise_steps for count in rows]
        todo = [step for step in steps if ("denoise", *step) not in self._captured]
        if todo:
            self._capture_sampling(todo, batches[0], batches[-1])
            self._captured |= {("denoise", *step) for step in todo}
        if captioner:
            possible = [batch for batch in batches if self.captioner.takes(batch)]
            new = [batch for batch in possible if batch in images and ("caption_step", batch, 0) not in self._captured]
            if new:
                self.captioner.capture(new, self._sizes, possible[0])
                self._captured |= {("caption_step", batch, 0) for batch in new}

    def _capture_sampling(self, steps: Sequence[tuple[int, int]], most: int, least: int) -> None:
        """Capture steps of so many rows that draw noise so often, with room for ``most`` images, and the other sessions
        for ``least``, as they run one at a time; at every size, or the nearest that they have.
        """
        scale = self.bundle.latents.vae_scale_factor
        nearest = self.denoiser.session.limits.nearest
        shapes = [
            (nearest("height", height // scale), nearest("width", width // scale)) for height, width in self._sizes
        ]
        # The most memory first: what grows has grown before anything is captured, for it moves.
        for noise_steps in (2, 1):
            for height, width in shapes:
                self._open_places(most, height, width, noise_steps)
                self.decode.reshape(**self._decode_sizes(most, height, width))
        for rows, noise_steps in steps:
            for height, width in shapes:
                self._open_places(most, height, width, noise_steps)
                self.denoiser.capture(rows)
        for height, width in shapes:
            self.decode.capture(**{**self._decode_sizes(most, height, width), "batch": least})
        self._sampling[0].capture(batch=least, tokens=self.bundle.text.length)
        self.conditioner.forget()

    def _open_places(self, places: int, height: int, width: int, noise_steps: int) -> None:
        tokens = self.bundle.text.length
        self.denoiser.open(places, steps=2, noise_steps=noise_steps, height=height, width=width, tokens=tokens)

    def _decode_sizes(self, batch: int, height: int, width: int) -> dict[str, int]:
        """The decoder has places of its own, of which it decodes the first."""
        return {"places": self.decode.limits.fit("places", batch), "batch": batch, "height": height, "width": width}

    def validate(self, job: Job) -> None:
        """Raises SettingsError when the graphs are compiled for other sizes than the job's."""
        scale = self.bundle.latents.vae_scale_factor
        height, width = job.height // scale, job.width // scale
        encode, denoise, decode = self._sampling
        for batch in part_sizes(job.images, self.batch):
            decode.limits.check(**self._decode_sizes(batch, height, width))
            for table in job.tables:
                denoise.limits.check(
                    places=batch,
                    rows=batch * max(map(len, table.roles)),
                    steps=len(table.rows),
                    noise_steps=max(1, len(table.noise_steps)),
                    height=height,
                    width=width,
                    tokens=job.windows * self.bundle.text.length,
                )
        encode.limits.check(tokens=job.windows * self.bundle.text.length)
        if job.runs_dns:
            self.captioner.validate_images(job.images, self.captioned(job.caption.beams), job.caption.beams)
            self.captioner.validate(job.height, job.width)

    def captioned(self, beams: int) -> int:
        """The most images captioned at once with so many beams each."""
        return min(self.batch, self.captioner.most(beams))

    def refit(self, other: Bundle) -> None:
        """Take over the weights of ``other``; see ``Pipeline.refit``."""
        self.bundle.check_same_model(other)
        unlike = self.bundle.unlike(other)
        for session in [self._sessions[graph] for graph in unlike if graph in self._sessions]:
            session.check_refit()  # before others are opened, which may take long
        changed = self.open(*unlike)
        for session in changed:
            session.check_refit()
        try:
            for session in changed:
                session.refit(other.graph(session.graph.name).path)
        except BaseException:
            self.close()  # some graphs have the new weights and some the old ones
            raise
        self.bundle = other
        if "encode_text" in self._sessions:
            self.conditioner.forget()
        captured, captioner = self._captured, self._has_captions
        self._captured = set()  # what was captured holds the old weights
        if captured:
            self.warm_up(captioner=captioner)

    def require_open(self) -> None:
        """Raises DnpError when closed, BackendError in a forked child."""
        if self.closed:
            raise DnpError("this pipeline is closed; open another one")
        self.backend.require_own_process("this pipeline")

    def close(self) -> None:
        """Free the graphs and their buffers; in a forked child nothing is freed."""
        self.closed = True
        if self.backend.forked:
            return
        with ExitStack() as ending:  # whatever fails, the rest is done too
            ending.callback(self.backend.close)
            for session in self._sessions.values():
                ending.callback(session.close)
