"""The five graphs of a bundle on one backend: opened when first needed, warmed up, given other weights, closed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Final

from dnp.engine.backends.session import Backend, Session
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.errors import DnpError
from dnp.engine.plans.profile import BATCH
from dnp.runtime.captioning.captioner import Captioner, part_sizes
from dnp.runtime.request import Request
from dnp.runtime.sampling.denoise import Sample, load_samples
from dnp.runtime.sampling.samplers import sampler_table
from dnp.runtime.sampling.schedule import NoiseSchedule

_OPENERS: Final = {  # what opens a graph, with what it stands on
    "encode_text": "encode_text",
    "denoise": "denoise",
    "decode_latents": "decode",
    "encode_image": "captioner",
    "caption_step": "captioner",
}


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
        latents = bundle.latents
        self._sizes = [(latents.height * latents.pixels, latents.width * latents.pixels)]  # that runs are recorded for
        self._prepared: set[str] = set()

    @cached_property
    def encode_text(self) -> Session:
        """Ids to a context."""
        return self._session("encode_text")

    @cached_property
    def denoise(self) -> Session:
        """One step of any sampler."""
        return self._session("denoise")

    @cached_property
    def decode(self) -> Session:
        """Latents, read where ``denoise`` leaves them, to images."""
        latents = self.denoise.outputs["latents"]
        session = self._session("decode_latents")
        session.alias("latents", latents)
        return session

    @cached_property
    def captioner(self) -> Captioner:
        """Images to words, by the last two graphs."""
        return Captioner(self._plans, self._session("encode_image"), self._session("caption_step"))

    @property
    def batch(self) -> int:
        """The most images sampled at once."""
        return min(BATCH, *(session.most.get("batch", BATCH) for session in self._sampling))

    @property
    def _sampling(self) -> tuple[Session, Session, Session]:
        return self.encode_text, self.denoise, self.decode

    def _session(self, graph: str) -> Session:
        self.require_open()
        if graph in self._sessions:  # and what was to be opened with it failed
            return self._sessions[graph]
        started = time.perf_counter()
        session = self.backend.session(self._plans.graph(graph), self._plans)
        self._sessions[graph] = session
        self.opening += time.perf_counter() - started
        return session

    def _open(self, graph: str) -> Session:
        """The session of a graph, opened if it is not."""
        getattr(self, _OPENERS[graph])
        return self._sessions[graph]

    def warm_up(self, *, captioner: bool, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Open the graphs and prepare them for every batch size and image size; see ``Pipeline.warm_up``."""
        self.require_open()
        self.decode  # noqa: B018  reads the latents of the denoise session, so that one is opened too
        if captioner:
            self.captioner  # noqa: B018
        new = [size for size in dict.fromkeys(sizes) if size not in self._sizes]
        for height, width in new:
            Request("a size", height=height, width=width).resolve(self.bundle)
            self.validate(height, width, captioner=captioner)
        before = self._sizes, self._prepared
        if new:
            captioner = captioner or "captions" in self._prepared
            self._sizes, self._prepared = [*self._sizes, *new], set()
        try:
            self._prepare(captioner=captioner)
        except BaseException:
            self._sizes, self._prepared = before  # a size that cannot be had is not tried again with each request
            raise

    def _prepare(self, *, captioner: bool) -> None:
        todo = ({"sampling", "captions"} if captioner else {"sampling"}) - self._prepared
        if not todo:
            return
        least = max(session.least.get("batch", 1) for session in self._sampling)
        batches = [batch for batch in self.backend.batches if least <= batch <= self.batch]
        if "sampling" in todo:
            self._prepare_sampling(batches)
            self._prepared.add("sampling")
        if "captions" in todo:
            self.captioner.prepare([batch for batch in batches if self.captioner.takes(batch)], self._sizes)
            self._prepared.add("captions")
        for session in self._sessions.values():
            session.prepared()

    def _prepare_sampling(self, batches: Sequence[int]) -> None:
        """Prepare the three sessions for ``batches``, the largest first, and every size or the nearest that they have.

        A run's sizes depend on the sampler only in whether it draws noise on the way.
        """
        schedule = NoiseSchedule.from_config(self.bundle.schedule)
        tables = [sampler_table(schedule, sampler, 2, 1.0) for sampler in ("euler_a", "ddim")]  # most noise first
        latents, denoise, decode = self.bundle.latents, self.denoise, self.decode
        shapes = [
            (
                latents.channels,
                denoise.nearest("height", height // latents.pixels),
                denoise.nearest("width", width // latents.pixels),
            )
            for height, width in self._sizes
        ]
        for shape in shapes:  # what grows has grown before anything is recorded, for it moves
            for batch in batches[:1]:
                load_samples(denoise, [Sample(tables[0], 0)] * batch, shape)
                decode.reshape(batch=batch, height=shape[1], width=shape[2])
        for batch in batches:
            self.encode_text.reshape(batch=batch)
            self.encode_text.prepare()
            for shape in shapes:
                for table in tables:
                    load_samples(denoise, [Sample(table, 0)] * batch, shape)
                    denoise.prepare()
                decode.reshape(batch=batch, height=shape[1], width=shape[2])
                decode.prepare()

    def validate_images(self, count: int, *, captioner: bool, beams: int) -> None:
        """Raises SettingsError when the graphs are compiled for other batches than those of so many images."""
        for batch in part_sizes(count, self.batch):
            for session in self._sampling:
                session.validate(batch=batch)
        if captioner:
            self.captioner.validate_images(count, self.captioned(beams), beams)

    def captioned(self, beams: int) -> int:
        """The most images captioned at once with so many beams each."""
        return min(self.batch, self.captioner.most(beams))

    def validate(self, height: int, width: int, *, captioner: bool) -> None:
        """Raises SettingsError when the graphs are compiled for other image sizes than this one, in pixels."""
        pixels = self.bundle.latents.pixels
        for session in (self.denoise, self.decode):
            session.validate(height=height // pixels, width=width // pixels)
        if captioner:
            self.captioner.validate(height, width)

    def refit(self, other: Bundle) -> None:
        """Take over the weights of ``other``; see ``Pipeline.refit``."""
        self.bundle.check_same_model(other)
        unlike = self.bundle.unlike(other)
        for session in [self._sessions[graph] for graph in unlike if graph in self._sessions]:
            session.check_refit()  # before others are opened, which may take long
        changed = [self._open(graph) for graph in unlike]
        for session in changed:
            session.check_refit()
        try:
            for session in changed:
                session.refit(other.graph(session.graph.name).path)
        except BaseException:
            self.close()  # some graphs have the new weights and some the old ones
            raise
        self.bundle = other
        recorded = set(self._prepared)
        self._prepared.clear()  # what was recorded holds the old weights
        if recorded:
            self.warm_up(captioner="captions" in recorded)

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
