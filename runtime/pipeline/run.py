"""One job on the graphs of a pipeline: DNS, caption, regenerate; as a generator of steps."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from dnp.engine.errors import DnpError
from dnp.runtime.job import Job
from dnp.runtime.pipeline.clock import Clock
from dnp.runtime.pipeline.graphs import Graphs
from dnp.runtime.result import Step
from dnp.runtime.sampling.denoise import Sample, finite
from dnp.runtime.sampling.samplers import SamplerTable

Pixels = npt.NDArray[np.uint8]


class Run:
    """What a job does, part by part; each yields its ``Step``s and returns what it made.

    Attributes:
        clock: where the time went so far.
    """

    def __init__(self, graphs: Graphs, job: Job, clock: Clock) -> None:
        self._graphs, self._job, self.clock = graphs, job, clock

    def find_negatives(self) -> Generator[Step, None, tuple[Pixels, list[str]]]:
        """The DNS images, and n* of each."""
        job = self._job
        empty = [""] * job.images
        images = yield from self.sample("dns", job.dns, [job.prompt] * job.images, empty, job.dns_seeds)
        negatives: list[str] = []
        most = self._graphs.captioned(job.caption.beams)
        for start in range(0, job.images, most):
            part = images[start : start + most]
            negatives += yield from self.clock.timed("caption", self._describe(part, alone=job.images <= most))
        for number, negative in enumerate(negatives):
            if not negative.strip():
                raise DnpError(
                    f"the captioner has no words for the DNS image of seed {job.dns_seeds[number]}, and an empty n* "
                    "would be plain guidance; raise min_length, take another seed, or write n* yourself (negative)"
                )
        return images, negatives

    def sample(
        self,
        phase: str,
        table: SamplerTable,
        prompts: Sequence[str],
        negatives: Sequence[str],
        seeds: Sequence[int],
    ) -> Generator[Step, None, Pixels]:
        """Sample every (prompt, negative, seed) with ``table``, in batches; returns uint8 ``[B, H, W, 3]``."""
        images: list[Pixels] = []
        most = self._graphs.batch
        batches = range(0, len(seeds), most)
        total = table.calls * len(batches)
        for number, start in enumerate(batches):
            part = slice(start, start + most)
            places = range(len(seeds[part]))
            with self.clock.phase(phase):
                self._join(table, prompts[part], negatives[part], seeds[part])
            preview = partial(self._graphs.decoded, self._graphs.denoiser.clean_latents, places)
            for call in self.clock.timed(phase, self._steps()):
                yield Step(phase, number * table.calls + call, total, preview)
            with self.clock.phase("decode"):
                if not finite(self._graphs.denoiser.latents.read()[: len(places)]):
                    raise DnpError(
                        f"the latents of the {phase} pass are no longer finite numbers; bring the guidance nearer "
                        "to 0, or use a bundle of higher precision"
                    )
                images.append(self._graphs.decoded(self._graphs.denoiser.latents, places))
                if flat := [seeds[start + i] for i, image in enumerate(images[-1]) if image.min() == image.max()]:
                    raise DnpError(
                        f"the {phase} image of seed {flat[0]} is one flat colour, as when a decoder overflows in fp16; "
                        "use a bundle of higher precision, or export it with --check-ranges"
                    )
        return np.concatenate(images)

    def _join(
        self, table: SamplerTable, prompts: Sequence[str], negatives: Sequence[str], seeds: Sequence[int]
    ) -> None:
        """Put a sample into each place, with its negative prompt and its prompt; with Perp-Neg ∅ besides."""
        graphs, job = self._graphs, self._job
        scale = graphs.bundle.latents.vae_scale_factor
        denoiser = graphs.denoiser
        denoiser.open(
            len(seeds),
            steps=len(table.rows),
            noise_steps=len(table.noise_rows),
            height=job.height // scale,
            width=job.width // scale,
            tokens=job.windows * graphs.bundle.text.length,
        )
        for place, seed in enumerate(seeds):
            denoiser.join(place, Sample(table, seed))
        roles = ([""] * len(seeds), prompts, negatives) if table.perp_neg else (negatives, prompts)
        texts = dict(enumerate(zip(*roles, strict=True)))
        graphs.conditioner.write(denoiser.bank, texts, size=(job.height, job.width), windows=job.windows)

    def _steps(self) -> Generator[int, None, None]:
        call = 0
        while self._graphs.denoiser.step():
            call += 1
            yield call

    def _describe(self, images: Pixels, *, alone: bool) -> Generator[Step, None, list[str]]:
        settings = self._job.caption
        # The only batch of them is still where it was decoded.
        there = self._graphs.decode.outputs["image"] if alone else None
        steps = self._graphs.captioner.steps(images, settings, there)
        while True:
            try:
                length = next(steps)
            except StopIteration as stop:
                captions: list[str] = stop.value
                return captions
            yield Step("caption", length, settings.max_length, images.copy)
