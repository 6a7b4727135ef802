"""What requests do, as coroutines: each yields what it wants done, is sent what that gave, and returns its outcome.

Nothing here knows what else runs. Whoever drives a coroutine may do what several want in the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dnp.engine.errors import DnpError, SettingsError
from dnp.runtime.batching.events import Event, Negatives, Plain
from dnp.runtime.batching.negatives import Found, Kept
from dnp.runtime.captioning.captioner import CaptionSettings
from dnp.runtime.job import Job
from dnp.runtime.sampling.samplers import SamplerTable

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Sampling:
    """Images wanted of pairs (prompt, negative), each from a seed of its own, by one sampler table.

    Gives uint8 ``[images, height, width, 3]``. Where there are ``keys``, one for each image, whoever wants images of
    equal keys wants the same images, and one of them may be made for all.
    """

    phase: str
    table: SamplerTable
    prompts: Sequence[str]
    negatives: Sequence[str]
    seeds: Sequence[int]
    height: int
    width: int
    windows: int
    keys: Sequence[str] = ()

    def texts(self, number: int) -> tuple[str, ...]:
        """What an image is conditioned on, by role: negative prompt and prompt; with Perp-Neg ∅ first."""
        negative, prompt = self.negatives[number], self.prompts[number]
        return ("", prompt, negative) if self.table.perp_neg else (negative, prompt)


@dataclass(frozen=True)
class Captioning:
    """Words wanted for images, uint8 ``[images, height, width, 3]``; gives a list of captions. ``keys`` are as of
    ``Sampling``.
    """

    images: Pixels
    settings: CaptionSettings
    keys: Sequence[str] = ()


Want = Sampling | Captioning
Work = Generator[Want, Any, T]
Tell = Callable[[Event], object]


def nobody(event: Event) -> None:
    """Is told, and does nothing."""


@dataclass(frozen=True)
class Made:
    """What a request gave: the fields of ``Result`` that are its own."""

    arrays: Pixels
    dns_arrays: Pixels | None
    plain_arrays: Pixels | None
    negatives: list[str]


def make_images(job: Job, tell: Tell = nobody, kept: Kept | None = None) -> Work[Made]:
    """The whole request: DNS and captions where n* is not written, the plain images where asked for, the final ones."""
    dns = plain = None
    prompts, negatives = [job.prompt] * job.images, [job.negative] * job.images
    if job.runs_dns:
        dns, negatives = yield from _negatives(job, tell, kept)
    if job.compare:
        plain = yield sampling("plain", job, prompts, [""] * job.images)
        tell(Plain(plain))
    arrays = yield sampling("final", job, prompts, negatives)
    return Made(arrays, dns, plain, negatives)


def find_negatives(job: Job, tell: Tell = nobody, kept: Kept | None = None) -> Work[Made]:
    """The first half: the DNS images, and n* of each. Raises SettingsError at once for a job that runs no DNS."""
    if not job.runs_dns:
        raise SettingsError("DNS finds n*; it takes no negative prompt of your own and cannot be switched off")

    def work() -> Work[Made]:
        arrays, texts = yield from _negatives(job, tell, kept)
        return Made(arrays, arrays, None, texts)

    return work()


def describe(pictures: Sequence[Pixels], settings: CaptionSettings) -> Work[list[str]]:
    """One caption for each picture, uint8 ``[height, width, 3]``, of sizes that may differ."""
    found: list[str] = []
    for picture in pictures:
        found += yield Captioning(picture[None], settings)
    return found


def alone(want: Sampling) -> Work[Pixels]:
    """Nothing but the images of some pairs."""
    images: Pixels = yield want
    return images


def sampling(phase: str, job: Job, prompts: Sequence[str], negatives: Sequence[str]) -> Sampling:
    """Sampling of pairs, from the job's seeds on, with the settings of its DNS or its final pass."""
    table, first = (job.dns, job.dns_seeds[0]) if phase == "dns" else (job.final, job.seeds[0])
    seeds = [first + number for number in range(len(prompts))]
    return Sampling(phase, table, prompts, negatives, seeds, job.height, job.width, job.windows)


def _negatives(job: Job, tell: Tell, kept: Kept | None) -> Work[tuple[Pixels, list[str]]]:
    """Find n* of each image, but for those that were found before; what others are finding now has the same key."""
    found = {} if kept is None else kept.found()
    missing = [number for number in range(job.images) if number not in found]
    if missing:
        keys = [] if kept is None else [kept.keys[number] for number in missing]
        wanted = sampling("dns", job, [job.prompt] * len(missing), [""] * len(missing))
        arrays = yield replace(wanted, seeds=[job.dns_seeds[number] for number in missing], keys=keys)
        texts = yield Captioning(arrays, job.caption, keys)
        for number, image, text in zip(missing, arrays, texts, strict=True):
            if not text.strip():
                raise DnpError(
                    f"the captioner has no words for the DNS image of seed {job.dns_seeds[number]}, and an empty n* "
                    "would be plain guidance; raise min_length, take another seed, or write n* yourself (negative)"
                )
            found[number] = Found(image.copy(), text)
            if kept is not None:
                kept.put(number, found[number])
    images = arrays if len(missing) == job.images else np.stack([found[n].image for n in range(job.images)])
    texts = [found[number].text for number in range(job.images)]
    tell(Negatives(images, texts))
    return images, texts
