"""Optimisation profiles: the sizes that a compiled plan takes, as ranges of the symbols in a graph's shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Final

import numpy as np

from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.schema import nearest, shown
from dnp.engine.errors import SettingsError

if TYPE_CHECKING:
    from dnp.engine.bundle.bundle import Bundle

# Images sampled at once: larger requests are cut into batches of this size. A constant, because the batch size decides
# the last bits of an image, and an image must be reproducible from its settings alone.
BATCH: Final = 8
BEAMS: Final = 4  # rows of the caption decoder for each image
ROWS: Final = 128  # rows of a sampler table: 64 steps of a sampler that runs the network twice a step
_OPTIONS: Final = {  # of `dnp build`, by symbol
    "batch": "--batch",
    "images": "--batch",
    "height": "--height",
    "width": "--width",
    "image_height": "--image-height",
    "image_width": "--image-width",
    "rows": "--rows",
    "draws": "--rows",
}


@dataclass(frozen=True)
class Range:
    """The sizes of one symbol: the smallest, the one to be fastest at, and the largest.

    Raises SettingsError unless 1 <= low <= best <= high.
    """

    low: int
    best: int
    high: int

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.low, self.best, self.high))
        if not (whole and 1 <= self.low <= self.best <= self.high <= 1 << 24):
            raise SettingsError(
                f"{shown(self.low)}:{shown(self.best)}:{shown(self.high)} is no range; give whole numbers as "
                "smallest:best:largest, in this order"
            )

    @classmethod
    def parse(cls, text: str) -> Range:
        """``4`` is that size alone, ``1:8`` is best at the smallest, ``1:4:8`` names all three.

        Raises SettingsError for anything else.
        """
        try:
            numbers = [int(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            return cls(*numbers * 3)
        if len(numbers) == 2:
            return cls(numbers[0], *numbers)
        if len(numbers) == 3:
            return cls(*numbers)
        raise SettingsError(f"{shown(text)} is no range; write 4, 1:8 or 1:4:8 (smallest:best:largest)")

    def scaled(self, divisor: int, name: str) -> Range:
        """Sizes in pixels as sizes in units of ``divisor`` pixels. Raises SettingsError when they do not fit."""
        sizes = (self.low, self.best, self.high)
        if any(size % divisor for size in sizes):
            raise SettingsError(f"{name} {self} has sizes that are no multiples of {divisor} pixels")
        return Range(*(size // divisor for size in sizes))

    def with_(self, other: Range) -> Range:
        """The sizes of both, best where this one is."""
        return Range(min(self.low, other.low), self.best, max(self.high, other.high))

    def __contains__(self, size: int) -> bool:
        return self.low <= size <= self.high

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low}:{self.best}:{self.high}"


Profile = Mapping[str, Range]
"""The range of each symbol of one graph."""


def default_profile(bundle: Bundle, graph: GraphSpec, ranges: Mapping[str, Range] | None = None) -> dict[str, Range]:
    """The profile of one of the bundle's graphs: its default image size, batches up to 8, tables up to 128 rows.

    ``ranges`` replaces some of it: ``batch`` and ``rows`` in their own units, ``height``, ``width``,
    ``image_height`` and ``image_width`` in pixels. Raises SettingsError when one of them cannot be had.
    """
    ranges = dict(ranges or {})
    for name, asked in ranges.items():
        if not isinstance(asked, Range):
            raise SettingsError(f"the sizes of {name!r} are a Range(smallest, best, largest), not {shown(asked)}")
        if name not in ("batch", "rows", "height", "width", "image_height", "image_width"):
            raise SettingsError(f"a profile has no {name!r}; batch, rows, height, width, image_height, image_width")
    latents = bundle.latents
    batch = ranges.get("batch", Range(1, 1, BATCH))
    rows = ranges.get("rows", Range(1, min(25, ROWS), ROWS))
    found = {"batch": batch, "images": batch, "rows": rows, "draws": Range(1, 1, rows.high)}
    for side in ("height", "width"):
        grain, most = latents.multiple * latents.pixels, getattr(latents, f"max_{side}") * latents.pixels
        size = getattr(latents, side) * latents.pixels
        pixels = ranges.get(side, Range(size, size, size))
        pixels.scaled(grain, side)
        if pixels.high > most:
            raise SettingsError(f"{side} {pixels} goes beyond {most} pixels, which is the most this bundle can make")
        found[side] = pixels.scaled(latents.pixels, side)
        found[f"image_{side}"] = ranges.get(f"image_{side}", pixels)
    if graph.name == "caption_step":
        found["batch"] = Range(batch.low, batch.best, batch.high * BEAMS)
    return {symbol: found[symbol] for symbol in graph.symbols}


def any_profile(graph: GraphSpec) -> dict[str, Range]:
    """For a graph that is in no bundle: every symbol from 1 to 8."""
    return {symbol: Range(1, 4, 8) for symbol in graph.symbols}


@dataclass(frozen=True)
class Limits:
    """The profile of a plan, and how to get a wider one.

    Attributes:
        units: what a user's number is multiplied with to give a size: a latent has so many pixels, an image beams.
        command: what builds plans, up to its options.
    """

    profile: Profile
    units: Mapping[str, Fraction] = field(default_factory=dict)
    command: str = "dnp build"

    def check(self, graph: str, dims: Mapping[str, int]) -> None:
        """Raises SettingsError for a size that the plan has no code for: its range, and the command that widens it."""
        if unknown := [symbol for symbol in dims if symbol not in self.profile]:
            raise SettingsError(f"graph {graph!r}: unknown size {unknown[0]!r}, {nearest(unknown[0], self.profile)}")
        beyond = {symbol: size for symbol, size in dims.items() if size not in self.profile[symbol]}
        if not beyond:
            return
        options: dict[str, Range] = {}
        for symbol in beyond:
            if option := _OPTIONS.get(symbol):
                sizes = self._wider(symbol, beyond[symbol])
                options[option] = sizes.with_(options[option]) if option in options else sizes
        wider = " ".join(f"{option} {sizes.low}:{sizes.best}:{sizes.high}" for option, sizes in options.items())
        remedy = f"; build a wider one: {self.command} {wider}" if wider else ""
        told = " and ".join(f"{symbol} {self.profile[symbol]}, not for {size}" for symbol, size in beyond.items())
        raise SettingsError(f"graph {graph!r}: the plan was compiled for {told}{remedy}")

    def _wider(self, symbol: str, size: int) -> Range:
        """What to ask ``dnp build`` for, for a plan that takes ``size`` too."""
        range_, unit = self.profile[symbol], self.units.get(symbol, Fraction(1))
        asked = math.ceil(size * unit)
        low = max(1, min(int(range_.low * unit), asked))
        high = max(math.ceil(range_.high * unit), asked)
        return Range(low, max(int(range_.best * unit), low), high)


def limits_of(bundle: Bundle, graph: GraphSpec, profile: Profile, command: str) -> Limits:
    """The limits of one of the bundle's plans, which ``command`` builds."""
    pixels = Fraction(bundle.latents.pixels)
    units = {"height": pixels, "width": pixels}
    if graph.name == "caption_step":
        units["batch"] = Fraction(1, BEAMS)
    return Limits(profile, units, command)


def largest(profile: Profile) -> dict[str, int]:
    """The largest size of every symbol."""
    return {symbol: range_.high for symbol, range_ in profile.items()}


def buffer_bytes(graph: GraphSpec, profile: Profile) -> int:
    """Bytes of all inputs and outputs at the largest sizes; less where a session reads another one's buffers."""
    dims = largest(profile)
    specs = [*graph.inputs.values(), *graph.outputs.values()]
    return sum(math.prod(spec.resolve(dims)) * np.dtype(spec.dtype).itemsize for spec in specs)


def smallest(profile: Profile) -> dict[str, int]:
    """The smallest size of every symbol."""
    return {symbol: range_.low for symbol, range_ in profile.items()}


def to_dict(ranges: Mapping[str, Range]) -> dict[str, list[int]]:
    """Ranges as JSON holds them: ``[low, best, high]`` by name."""
    return {name: [range_.low, range_.best, range_.high] for name, range_ in ranges.items()}


def from_dict(ranges: Mapping[str, Sequence[int]]) -> dict[str, Range]:
    """What ``to_dict`` gave. Raises SettingsError or TypeError for anything else."""
    return {name: Range(*numbers) for name, numbers in ranges.items()}
