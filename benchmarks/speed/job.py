"""What one worker is asked to do. Every contender gets the same; only the standard library is needed to read it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Point:
    """One size to time an image at: batch, denoising steps, and the width and height in pixels."""

    batch: int
    steps: int
    pixels: int


@dataclass(frozen=True)
class Job:
    """The work, the same for every contender, and what this one run of a worker is to do of it.

    Attributes:
        contender: a name in ``contenders.CONTENDERS``.
        model: a diffusers folder of Stable Diffusion, ``captioner`` a transformers folder of BLIP, float16 weights.
        converted: the folder of these weights in the formats of the peers that have their own, a subfolder each.
        bundle: the same weights exported by ``dnp export``.
        plans: the bundle's plans, built by ``dnp build``.
        guidance: w of a plain image and of the final pass.
        caption_tokens: the most tokens of a caption, the begin token included.
        dns_guidance: s of the DNS pass, ``eps(∅) + s·(eps(∅) − eps(p))``.
        works: any of ``steps`` (only the denoising loop counts), ``image`` and ``dnp``.
        warmups: requests that are made before the timed DNP requests; images are warmed up by the first one.
        repeats: timed images, and timed DNP requests, in this one process.
        points: more sizes to time images at.
        picture: where to leave the last plain image, as ``.npy``; nowhere when empty.
    """

    contender: str
    model: str
    captioner: str
    converted: str
    bundle: str
    plans: str
    threads: int
    prompt: str
    pixels: int
    steps: int
    seed: int = 0
    guidance: float = 4.0
    dns_guidance: float = 1.0
    caption_tokens: int = 20
    works: tuple[str, ...] = ("image", "dnp")
    warmups: int = 1
    repeats: int = 1
    points: tuple[Point, ...] = ()
    picture: str = ""

    @property
    def point(self) -> Point:
        """The size of the plain image."""
        return Point(1, self.steps, self.pixels)

    def with_(self, **changes: Any) -> Job:
        """The same job but for ``changes``."""
        return replace(self, **changes)

    def to_json(self) -> str:
        """For ``from_json``."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that ``to_json`` wrote."""
        fields = json.loads(text)
        points = tuple(Point(**point) for point in fields.pop("points"))
        return cls(**{**fields, "works": tuple(fields.pop("works"))}, points=points)
