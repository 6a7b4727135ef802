"""Limits: the sizes that a session runs at, and those that it was made to run best at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dnp.engine.bundle.contract import Symbol, symbols
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.schema import nearest
from dnp.engine.errors import SettingsError
from dnp.engine.plans.profile import Profile, Range, asked_for, default_profile, largest, size_options

if TYPE_CHECKING:
    from dnp.engine.bundle.manifest import Manifest


@dataclass(frozen=True)
class Limits:
    """The sizes that a session runs at. ``Limits()`` takes every size as it is, as ordinary memory does.

    Attributes:
        graph: its name.
        ranges: the sizes that each symbol may have; any size for a symbol that is not there.
        symbols: what the bundle says of each symbol; empty for a graph that is in none.
        largest: the largest size that is captured, by symbol.
        command: what builds a plan such as this one, up to its sizes.
    """

    graph: str = ""
    ranges: Profile = field(default_factory=dict)
    symbols: Mapping[str, Symbol] = field(default_factory=dict)
    largest: Mapping[str, int] = field(default_factory=dict)
    command: str = "dnp build"

    @classmethod
    def of_plan(cls, graph: GraphSpec, profile: Profile, manifest: Manifest | None = None, command: str = "") -> Limits:
        """The limits of a plan with this profile, which ``command`` builds."""
        known = {} if manifest is None else symbols(manifest)
        return cls(graph.name, profile, known, largest(profile), command or cls.command)

    @classmethod
    def of_captures(cls, graph: GraphSpec, manifest: Manifest | None) -> Limits:
        """The limits of a backend that takes every size, and captures those of a default plan."""
        if manifest is None:
            return cls(graph.name)
        return cls(graph.name, {}, symbols(manifest), largest(default_profile(manifest, graph)))

    def check(self, **dims: int) -> None:
        """Raises SettingsError for a size out of its range, with the command that widens it; some may be left out."""
        if not self.ranges:
            return
        if unknown := [symbol for symbol in dims if symbol not in self.ranges]:
            raise SettingsError(
                f"graph {self.graph!r}: unknown size {unknown[0]!r}, {nearest(unknown[0], self.ranges)}"
            )
        beyond = {symbol: size for symbol, size in dims.items() if size not in self.ranges[symbol]}
        if not beyond:
            return
        remedy = f"; build a wider one: {self.build_command(beyond)}" if self.symbols else ""
        told = " and ".join(f"{symbol} {self.ranges[symbol]}, not for {size}" for symbol, size in beyond.items())
        raise SettingsError(f"graph {self.graph!r}: the plan was compiled for {told}{remedy}")

    def nearest(self, symbol: str, size: int) -> int:
        """The size nearest to ``size`` that is in the symbol's range."""
        sizes = self.ranges.get(symbol)
        return size if sizes is None else min(max(size, sizes.low), sizes.high)

    def fit(self, symbol: str, size: int) -> int:
        """The size to run ``size`` at: the next one that is captured, or ``size`` itself where any may be.

        The caller fills up what lies between. A size beyond all of them comes back as it is: ``check`` judges it.
        """
        known = self.symbols.get(symbol)
        if known is None or symbol not in self.largest or not (known.captured or known.largest):
            return size
        least = self.ranges[symbol].low if symbol in self.ranges else size
        return known.fit(max(size, least), self.largest[symbol])

    def build_command(self, beyond: Mapping[str, int] | None = None) -> str:
        """What builds a plan of these sizes, and of those in ``beyond`` besides."""
        wider = dict(self.ranges)
        for name, size in (beyond or {}).items():
            wider[name] = wider[name].with_(Range(size, size, size))
        return f"{self.command} {size_options(asked_for(wider, self.symbols))}".rstrip()
