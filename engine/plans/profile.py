"""Optimisation profiles: the sizes that a compiled plan takes, as ranges of the symbols in a graph's shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dnp.engine.bundle.contract import BATCH, STEPS, WINDOWS, Symbol, symbols
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.schema import nearest, shown
from dnp.engine.errors import SettingsError

if TYPE_CHECKING:
    from dnp.engine.bundle.manifest import Manifest


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

    def with_(self, other: Range) -> Range:
        """The sizes of both, best where this one is."""
        return Range(min(self.low, other.low), self.best, max(self.high, other.high))

    def __contains__(self, size: int) -> bool:
        return self.low <= size <= self.high

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low}:{self.best}:{self.high}"


Profile = Mapping[str, Range]
"""The range of each symbol of one graph."""


def default_profile(
    manifest: Manifest, graph: GraphSpec, ranges: Mapping[str, Range] | None = None
) -> dict[str, Range]:
    """The profile of one of the bundle's graphs: its default image size, batches up to 8, tables up to 128 rows.

    ``ranges`` replaces some of it, by option: ``batch``, ``steps``, ``windows``, and in pixels ``height``, ``width``,
    ``image_height`` and ``image_width``. Raises SettingsError when one of them cannot be had.
    """
    asked = _options(manifest, ranges or {})
    found = {name: _sizes(symbol, asked[symbol.option]) for name, symbol in symbols(manifest).items()}
    return {symbol: found[symbol] for symbol in graph.symbols}


def _options(manifest: Manifest, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """What is asked for of every option: the usual where ``ranges`` does not say. Raises SettingsError."""
    latents, scale = manifest.latents, manifest.latents.vae_scale_factor
    usual = {"batch": Range(1, 1, BATCH), "steps": Range(1, 25, STEPS), "windows": Range(1, 1, WINDOWS)}
    for side in ("height", "width"):
        size, most = getattr(latents, side) * scale, getattr(latents, f"max_{side}") * scale
        usual[side] = ranges.get(side, Range(size, size, size))
        usual[f"image_{side}"] = usual[side]  # what is captioned is what was made, unless it is said
        if isinstance(usual[side], Range) and usual[side].high > most:
            raise SettingsError(f"{side} {usual[side]} goes beyond {most} pixels, the most that this bundle can make")
    for name, asked in ranges.items():
        if not isinstance(asked, Range):
            raise SettingsError(f"the sizes of {name!r} are a Range(smallest, best, largest), not {shown(asked)}")
        if name not in usual:
            raise SettingsError(f"a profile has no {name!r}, {nearest(name, usual)}")
    return {**usual, **ranges}


def _sizes(symbol: Symbol, asked: Range) -> Range:
    """The sizes of a symbol that follow from the range of its option. Raises SettingsError when there are none."""
    sizes = asked.low * symbol.least, asked.best * symbol.usual, asked.high * symbol.most
    grain = symbol.divisor * symbol.multiple
    if any(size % grain for size in sizes):
        raise SettingsError(f"{symbol.option} {asked} has sizes that are no multiples of {grain}")
    low, best, high = (size // symbol.divisor for size in sizes)
    return Range(low, min(best, high), high)


def asked_for(profile: Profile, known: Mapping[str, Symbol]) -> dict[str, Range]:
    """The options that give at least these sizes: what ``default_profile`` turns into such a profile."""
    options: dict[str, Range] = {}
    for name, sizes in profile.items():
        if (symbol := known.get(name)) is not None:
            low = max(1, sizes.low * symbol.divisor // symbol.least)
            high = max(low, math.ceil(sizes.high * symbol.divisor / symbol.most))
            asked = Range(low, min(max(low, sizes.best * symbol.divisor // symbol.usual), high), high)
            options[symbol.option] = options.get(symbol.option, asked).with_(asked)
    return options


def size_options(ranges: Mapping[str, Range]) -> str:
    """Options of ``dnp build`` that ask for these ranges."""
    return " ".join(f"--{name.replace('_', '-')} {r.low}:{r.best}:{r.high}" for name, r in ranges.items())


def any_profile(graph: GraphSpec) -> dict[str, Range]:
    """For a graph that is in no bundle: every symbol from 1 to 8."""
    return {symbol: Range(1, 4, 8) for symbol in graph.symbols}


def largest(profile: Profile) -> dict[str, int]:
    """The largest size of every symbol."""
    return {symbol: range_.high for symbol, range_ in profile.items()}


def buffer_bytes(graph: GraphSpec, profile: Profile) -> int:
    """Bytes of all inputs and outputs at the largest sizes; less where a session reads another one's buffers."""
    dims = largest(profile)
    specs = [*graph.inputs.values(), *graph.outputs.values()]
    return sum(math.prod(spec.resolve(dims)) * np.dtype(spec.dtype).itemsize for spec in specs)


def to_dict(ranges: Mapping[str, Range]) -> dict[str, list[int]]:
    """Ranges as JSON holds them: ``[low, best, high]`` by name."""
    return {name: [range_.low, range_.best, range_.high] for name, range_ in ranges.items()}


def from_dict(ranges: Mapping[str, Sequence[int]]) -> dict[str, Range]:
    """What ``to_dict`` gave. Raises SettingsError or TypeError for anything else."""
    return {name: Range(*numbers) for name, numbers in ranges.items()}
