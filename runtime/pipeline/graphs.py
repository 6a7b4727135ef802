"""The five graphs of a bundle on one backend: opened when first needed, warmed up, given other weights, closed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
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
from dnp.runtime.sampling.schedule import read_schedule
from dnp.runtime.tokenizer import PromptTokenizer


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
        self._captured: set[str] = set()

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

    def warm_up(self, *, captioner: bool, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Open the graphs and capture them for every batch size and image size; see ``Pipeline.warm_up``."""
        self.require_open()
        self.open("encode_text", "denoise", "decode_latents", *(["encode_image", "caption_step"] if captioner else []))
        new = [size for size in dict.fromkeys(sizes) if size not in self._sizes]
        for height, width in new:
            request = Request("a size", height=height, width=width, dnp=captioner)
            self.validate(resolve(request, self.bundle, read_schedule(self.bundle.schedule)))
        before = self._sizes, self._captured
        if new:
            captioner = captioner or "captions" in self._captured
            self._sizes, self._captured = [*self._sizes, *new], set()
        try:
            self._capture(captioner=captioner)
        except BaseException:
            self._sizes, self._captured = before  # a size that cannot be had is not tried again with each request
            raise

    def _capture(self, *, captioner: bool) -> None:
        todo = ({"sampling", "captions"} if captioner else {"sampling"}) - self._captured
        if not todo:
            return
        batches = [batch for batch in self.backend.batches if batch <= self.batch]
        batches = [
            batch for batch in batches if all(s.limits.nearest("batch", batch) == batch for s in self._sampling[::2])
        ]
        if "sampling" in todo:
            self._capture_sampling(batches)
            self._captured.add("sampling")
        if "captions" in todo:
            self.captioner.capture([batch for batch in batches if self.captioner.takes(batch)], self._sizes)
            self._captured.add("captions")

    def _capture_sampling(self, batches: Sequence[int]) -> None:
        """Capture the three sessions for ``batches``, the largest first, and every size or the nearest that they have.

        A step's sizes depend on the samplers only in whether they draw noise on the way.
        """
        if not batches:
            return
        scale = self.bundle.latents.vae_scale_factor
        nearest = self.denoiser.session.limits.nearest
        shapes = [
            (nearest("height", height // scale), nearest("width", width // scale)) for height, width in self._sizes
        ]
        roles = range(1, self.bundle.guidance.roles + 1)
        rows = {self.denoiser.session.limits.fit("rows", role * batch) for batch in batches for role in roles}
        for noise_steps in (
            2,
            1,
        ):  # the most memory first: what grows has grown before anything is captured, for it moves
            for height, width in shapes:
                self._open_places(batches[0], height, width, noise_steps)
                self.decode.reshape(**self._decode_sizes(batches[0], height, width))
        for noise_steps in (2, 1):
            for height, width in shapes:
                self._open_places(batches[0], height, width, noise_steps)
                for count in sorted(rows, reverse=True):
                    self.denoiser.capture(count)
        for height, width in shapes:
            for batch in batches:
                self.decode.capture(**self._decode_sizes(batch, height, width))
        for batch in batches:
            self._sampling[0].capture(batch=batch, tokens=self.bundle.text.length)
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
        captured = set(self._captured)
        self._captured.clear()  # what was captured holds the old weights
        if captured:
            self.warm_up(captioner="captions" in captured)

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
