"""Load on any server that speaks ``/v1/images/generations``: so many clients, or so many requests a second."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from dnp.engine.errors import SettingsError

PROMPTS: Final = (
    "a large red circle left of a small blue square on a plain yellow background",
    "a small white cross above a large green triangle on a plain black background",
    "a large blue cross on a plain red background",
    "a small yellow star right of a large white ring on a striped blue background",
)
# 70 % find n*; every sampler, number of steps and guidance may share a step with any other.
DEFAULT_MIX: Final[dict[str, list[Any]]] = {
    "prompt": list(PROMPTS),
    "dnp": [True] * 7 + [False] * 3,
    "steps": [15, 20, 25, 30, 40, 50],
    "dns_steps": [15, 20, 25],
    "sampler": ["ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "heun"],
    "guidance": [1.0, 1.5, 2.0, 3.0],
}


@dataclass(frozen=True)
class Load:
    """How hard a server is driven: by ``clients``, each of which waits for its answer, or at a ``rate`` a second, whose
    gaps are a Poisson process's and which waits for nobody."""

    clients: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.clients} clients" if self.rate is None else f"{self.rate:g} requests/s"


@dataclass(frozen=True)
class Answered:
    """One request: when it was sent, how long it took, and the kind of error (empty when it was answered)."""

    sent: float
    seconds: float
    images: int
    error: str = ""


@dataclass(frozen=True)
class Measured:
    """What a load gave.

    Attributes:
        seconds: from the first request to the last answer.
        latency: ``mean``, ``p50``, ``p95``, ``p99`` and ``max`` of those answered, in seconds.
        images_per_second: answered.
        goodput: images a second that came within the deadline.
        within: the share of all requests that did.
        errors: how many, by kind: the ``code`` of the answer, or the kind of failure.
    """

    load: str
    clients: int | None
    rate: float | None
    requests: int
    answered: int
    seconds: float
    latency: dict[str, float]
    images_per_second: float
    goodput: float
    within: float
    deadline: float | None
    errors: dict[str, int] = field(default_factory=dict)


def read_mix(path: Path | None) -> dict[str, list[Any]]:
    """What requests are made of: for each field of the body the values that it is drawn from, from a JSON file.

    Raises SettingsError for anything else.
    """
    if path is None:
        return DEFAULT_MIX
    try:
        mix = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"the mix in {str(path)!r} cannot be read: {error}; write a JSON object") from error
    if not isinstance(mix, dict) or not all(isinstance(values, list) and values for values in mix.values()):
        raise SettingsError(
            f"the mix in {str(path)!r} must be a JSON object whose values are lists to draw from, such as "
            '{"prompt": ["a red circle"], "steps": [20, 30]}'
        )
    return mix


def bodies(mix: Mapping[str, Sequence[Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Bodies drawn from a mix, without end; the same ones for the same ``seed``, each with a seed of its own."""
    draw = random.Random(seed)
    while True:
        yield {"seed": draw.randrange(2**31), **{name: draw.choice(values) for name, values in mix.items()}}


async def drive(
    url: str,
    load: Load,
    requests: Iterator[dict[str, Any]],
    count: int,
    *,
    key: str | None = None,
    deadline: float | None = None,
    timeout: float = 600.0,
    tell: Callable[[], object] = lambda: None,
) -> Measured:
    """Send ``count`` requests to the server at ``url`` and measure. ``tell`` is called at each answer."""
    done: list[Answered] = []
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=timeout, limits=limits) as client:
        started = time.perf_counter()

        async def one(body: dict[str, Any]) -> None:
            done.append(await _ask(client, body, started))
            tell()

        if load.rate is None:
            left = iter(range(count))

            async def loop() -> None:
                for _ in left:  # shared: each takes the next
                    await one(next(requests))

            await asyncio.gather(*(loop() for _ in range(load.clients or 1)))
        else:
            gaps = random.Random(0)
            tasks, due = [], started
            for _ in range(count):
                await asyncio.sleep(due - time.perf_counter())  # from the start, so that no delay adds up
                tasks.append(asyncio.create_task(one(next(requests))))
                due += gaps.expovariate(load.rate)
            await asyncio.gather(*tasks)
        seconds = time.perf_counter() - started
    return _summed(load, done, seconds, deadline)


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], started: float) -> Answered:
    sent = time.perf_counter()
    images, error = 0, ""
    try:
        answer = await client.post("/v1/images/generations", json=body)
        if answer.is_success:
            images = len(answer.json()["data"])
        else:
            error = _code(answer)
    except (httpx.HTTPError, ValueError, KeyError) as failure:
        error = type(failure).__name__
    return Answered(sent - started, time.perf_counter() - sent, images, error)


def _code(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["code"] or answer.status_code)
    except (ValueError, KeyError, TypeError):
        return str(answer.status_code)


def _summed(load: Load, done: Sequence[Answered], seconds: float, deadline: float | None) -> Measured:
    good = sorted(one.seconds for one in done if not one.error)
    in_time = [one for one in done if not one.error and (deadline is None or one.seconds <= deadline)]
    latency = {}
    if good:
        latency = {"mean": sum(good) / len(good), "max": good[-1]}
        latency |= {f"p{share}": percentile(good, share) for share in (50, 95, 99)}
    return Measured(
        load=str(load),
        clients=load.clients,
        rate=load.rate,
        requests=len(done),
        answered=len(good),
        seconds=seconds,
        latency=latency,
        images_per_second=sum(one.images for one in done) / seconds,
        goodput=sum(one.images for one in in_time) / seconds,
        within=len(in_time) / len(done) if done else 0.0,
        deadline=deadline,
        errors=dict(Counter(one.error for one in done if one.error)),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of ``ordered`` numbers that so many per cent are not above (nearest rank)."""
    return ordered[max(0, -(-len(ordered) * int(share) // 100) - 1)]


def table(found: Sequence[Measured]) -> str:
    """The figures for people."""
    lines = [f"{'load':>16}{'images/s':>10}{'mean s':>9}{'p50':>9}{'p95':>9}{'p99':>9}{'in time':>9}  errors"]
    for one in found:
        figures = "".join(f"{one.latency.get(name, float('nan')):>9.3f}" for name in ("mean", "p50", "p95", "p99"))
        errors = ", ".join(f"{count} {kind}" for kind, count in one.errors.items()) or "none"
        lines.append(f"{one.load:>16}{one.images_per_second:>10.2f}{figures}{one.within:>9.0%}  {errors}")
    return "\n".join(lines)


def report(url: str, found: Sequence[Measured], mix: Mapping[str, Sequence[Any]], seed: int) -> dict[str, Any]:
    """All of it as JSON."""
    return {"url": url, "seed": seed, "mix": dict(mix), "loads": [asdict(one) for one in found]}


def plot(series: Mapping[str, Sequence[Measured]], file: Path) -> None:
    """Throughput and latency over the load, a line for each of ``series``, as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, (name, found) in enumerate(series.items()):
        over = [float(one.rate if one.rate is not None else one.clients or 1) for one in found]
        colour = f"C{number}"
        left.plot(over, [one.images_per_second for one in found], "o-", color=colour, label=name)
        for share, style in (("p50", "o-"), ("p95", "o--")):
            values = [one.latency.get(share, float("nan")) for one in found]
            right.plot(over, values, style, color=colour, label=f"{name}, {share}")
    rates = {one.rate is not None for found in series.values() for one in found}
    unit = " or ".join(name for rate, name in ((False, "clients"), (True, "requests per second")) if rate in rates)
    left.set(xlabel=unit, ylabel="images per second", ylim=(0, None))
    right.set(xlabel=unit, ylabel="seconds", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
