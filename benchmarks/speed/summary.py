"""From the raw times of a report to its figures: medians over rounds, their spread, ratios to the first, slopes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

Run = Mapping[str, Any]  # one worker: contender, round, and its events in order


@dataclass(frozen=True)
class Spread:
    """The median over rounds, and the smallest and largest of them."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of one value for each round; None when there is none."""
        return cls(median(values), min(values), max(values), len(values)) if values else None


def events(run: Run, name: str) -> list[Mapping[str, Any]]:
    """The events of one kind, in order."""
    return [event for event in run["events"] if event["event"] == name]


def steps_of(figures: Mapping[str, Any], steps: int, key: str = "marks") -> list[float]:
    """What each step of one request took, from its marks; a pass has ``steps`` of them, its first has no start.

    Raises ValueError when the marks are not those of whole passes: the contender did other work than it was asked for.
    """
    marks = figures.get(key, [])
    if len(marks) % steps:
        raise ValueError(f"{len(marks)} steps were marked where each pass has {steps}")
    passes = [marks[start : start + steps] for start in range(0, len(marks), steps)]
    return [after - before for part in passes for before, after in pairwise(part)]


def step_seconds(run: Run, steps: int) -> float | None:
    """The median step of a run, over all warm requests."""
    found = [s for kind in ("image", "dnp") for event in events(run, kind) for s in steps_of(event, steps)]
    return median(found) if found else None


def seconds(run: Run, kind: str) -> float | None:
    """The median of the run's events of one kind."""
    found = [event["seconds"] for event in events(run, kind)]
    return median(found) if found else None


def outside_share(run: Run, kind: str, steps: int) -> float | None:
    """The share of a step, an image or a DNP request (``kind``) that is not the inference library's own run, 0 to 1."""
    if kind != "step":
        found = [1.0 - e["inside"] / e["seconds"] for e in events(run, kind) if "inside" in e]
        return median(found) if found else None
    whole: list[float] = []
    within: list[float] = []
    for event in [*events(run, "image"), *events(run, "dnp")]:
        if event.get("marks_inside"):
            whole += steps_of(event, steps)
            within += steps_of(event, steps, "marks_inside")
    return 1.0 - sum(within) / sum(whole) if whole else None


def figure(report: Mapping[str, Any], name: str, kind: str) -> Spread | None:
    """One figure of a contender over the rounds.

    ``kind``: ``import``, ``open``, ``first``, ``image``, ``dnp`` and ``step`` are seconds, ``memory`` bytes.
    """
    told = report["contenders"].get(name)
    if told is None or (kind in ("first", "image", "dnp") and kind.replace("first", "image") not in told["works"]):
        return None  # it was not asked for, or its loop was run for the steps alone
    values: list[float | None] = []
    for run in runs(report, name):
        if kind == "step":
            values.append(step_seconds(run, told["steps"]))
        elif kind == "memory":
            values += [event["bytes"] for event in events(run, "memory")]
        else:
            values.append(seconds(run, kind))
    return Spread.of([value for value in values if value is not None])


def share(report: Mapping[str, Any], name: str, kind: str) -> Spread | None:
    """``outside_share`` over the rounds."""
    found = [outside_share(run, kind, report["contenders"][name]["steps"]) for run in runs(report, name)]
    return Spread.of([value for value in found if value is not None])


def ratio(report: Mapping[str, Any], name: str, kind: str, base: str) -> float | None:
    """The median of a contender over the median of another, as shown: below 1 is faster."""
    one, other = figure(report, name, kind), figure(report, base, kind)
    return one.median / other.median if one and other and other.median else None


def runs(report: Mapping[str, Any], name: str) -> list[Run]:
    """The runs of a contender, one for each round."""
    return [run for run in report["runs"] if run["contender"] == name]


def points(report: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The other sizes a contender was timed at, with ``seconds`` and ``step`` as medians over the rounds."""
    grouped: dict[tuple[int, int, int], list[Mapping[str, Any]]] = {}
    for run in runs(report, name):
        for event in events(run, "point"):
            grouped.setdefault((event["batch"], event["steps"], event["pixels"]), []).append(event)
    found = []
    for (batch, steps, pixels), same in sorted(grouped.items()):
        taken = [s for event in same for s in steps_of(event, steps)]
        found.append(
            {
                "batch": batch,
                "steps": steps,
                "pixels": pixels,
                "seconds": median(event["seconds"] for event in same),
                "step": median(taken) if taken else None,
            }
        )
    return found


def series(found: Sequence[Mapping[str, Any]], axis: str) -> list[Mapping[str, Any]]:
    """The points along one axis (``batch``, ``steps`` or ``pixels``), the other two as most points have them."""
    others = [name for name in ("batch", "steps", "pixels") if name != axis]
    lines: dict[tuple[int, ...], list[Mapping[str, Any]]] = {}
    for point in found:
        lines.setdefault(tuple(point[name] for name in others), []).append(point)
    longest = max(lines.values(), key=len, default=[])
    return sorted(longest, key=lambda point: int(point[axis])) if len(longest) > 1 else []


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of the line through (log x, log y): y grows as x to this power."""
    a, b = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / sum((x - mean_a) ** 2 for x in a)
