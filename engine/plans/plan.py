"""Compiled plans: everything that changes one, and what making one tells and costs. ``store.py`` keeps them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from dnp.engine.errors import Cancelled
from dnp.engine.system.processor import peak_memory

FOLDER: Final = "plans"


@dataclass(frozen=True)
class PlanSpec:
    """Everything that changes a plan, and nothing else.

    Attributes:
        graph: its name.
        graph_sha256: of the ONNX file, and of its weights where they lie beside it.
        backend, version: the compiler, in full: plans do not survive a change of version.
        architecture: what it is compiled for, as ``sm89`` or ``sm89,sm120``; with ``tensorrt`` also the GPU's name;
            with ``cpu`` the processor's name and vector units.
        precision: the bundle's, which is in the graph's hash too; here to be read.
        profile: ``[low, best, high]`` of each symbol; with ``cpu``, whose plans take every size, nothing.
        flags: what the compiler was told.
    """

    graph: str
    graph_sha256: str
    backend: str
    version: str
    architecture: str
    precision: str
    profile: dict[str, list[int]]
    flags: dict[str, Any]

    @property
    def key(self) -> str:
        """16 hexadecimal digits over all fields."""
        said = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def difference(self, other: PlanSpec) -> str:
        """The first field in which ``other`` differs, with both values; empty when none does."""
        for field in fields(self):
            mine, its = getattr(self, field.name), getattr(other, field.name)
            if mine == its:
                continue
            if isinstance(mine, dict) and isinstance(its, dict):
                inner = next(key for key in {**mine, **its} if mine.get(key, its) != its.get(key, its))
                return f"{field.name}.{_short(inner)} is {_short(its.get(inner))}, wanted is {_short(mine.get(inner))}"
            return f"{field.name} is {_short(its)}, wanted is {_short(mine)}"
        return ""


@dataclass(frozen=True)
class BuildProgress:
    """Where a build is: the compiler's own phase, how many of its steps are done, and the seconds so far."""

    graph: str
    phase: str
    done: int
    total: int
    seconds: float


BuildProgressCallback = Callable[[BuildProgress], object]
"""Called some times a second while a plan is compiled, and from no other thread; ``False`` stops the build."""
BuildMessageCallback = Callable[[str], None]
"""Called with one line: that a plan is there already, or why one is built anew, and what the build will need."""


def tell(progress: BuildProgressCallback | None, state: BuildProgress) -> None:
    """Tell ``progress`` where a build is. Raises Cancelled when it answers ``False``."""
    if progress is not None and progress(state) is False:
        raise Cancelled(f"the build of {state.graph!r} was stopped; no plan is half-written")


def cost(started: float) -> dict[str, Any]:
    """The statistics of a build that began at ``started`` of ``time.perf_counter`` and ends now: its cost, and when.

    The memory is the largest that the process ever had.
    """
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": peak_memory(),
        "built": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),  # as text it sorts by time
    }


@dataclass(frozen=True)
class Plan:
    """A plan on disk, and what its sidecar says of it.

    Attributes:
        path: the plan itself; its sidecar lies beside it.
        nbytes: its size, without that of weights in a file of their own.
        spec: what it is.
        statistics: what building it cost and what it will need, by the module that builds it.
    """

    path: Path
    nbytes: int
    spec: PlanSpec
    statistics: dict[str, Any]


def _short(value: Any) -> str:
    text = "".join(c if c.isprintable() else "?" for c in str(value))  # sidecars can be edited
    return text if len(text) <= 40 else f"{text[:12]}..."
