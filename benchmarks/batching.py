"""How much sharing steps brings, and how long requests wait: one at a time, by whole requests, and step by step.

    python benchmarks/batching.py [--bundle FOLDER] [--backend NAME] [--requests 24] [--load 0.9] [--json FILE]

The same requests, with the same gaps, go three ways through the same scheduler: one request at a time; up to the cap
of them together, the next ones when all of these are done; and step by step. The clock is the processor time of this
process, computing with one thread, so that what else runs on the machine counts little; on a GPU it is the wall's. The
ways take turns, and what is printed are medians over the turns, and ratios to one at a time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import dnp
from dnp.runtime.batching.core import Core
from dnp.runtime.batching.stages import Room, Stages
from dnp.runtime.batching.tasks import Task
from dnp.runtime.batching.warmup import measure_cap
from dnp.runtime.batching.work import make_images

STEPS = 127


class Clock:
    """Seconds of work, and of waiting for the next request, which is passed over."""

    def __init__(self, on_processor: bool) -> None:
        self._now = time.process_time if on_processor else time.perf_counter
        self._skipped = 0.0

    def __call__(self) -> float:
        return self._now() + self._skipped

    def skip_to(self, moment: float) -> None:
        self._skipped += max(0.0, moment - self())


def requests(count: int, seed: int) -> list[dnp.Request]:
    """A mix: 70 % DNP, the others plain; of 10, 20 or 30 steps, by samplers that differ."""
    rng = random.Random(seed)
    return [
        dnp.Request(
            "a large red circle left of a small blue square on a plain yellow background",
            dnp=rng.random() < 0.7,
            seed=number,
            steps=rng.choice([10, 20, 30]),
            dns_steps=rng.choice([10, 20]),
            sampler=rng.choice(["ddim", "euler_a", "dpmpp_2m"]),
        )
        for number in range(count)
    ]


def serve(pipeline: dnp.Pipeline, jobs, gaps, places: int, way: str, clock: Clock) -> tuple[float, list[float]]:
    """Seconds for all, and from arrival to end for each."""
    stages = Stages(pipeline.graphs, waits=True)
    core = Core(stages, lambda w: Room(places, STEPS + 1, STEPS + 1, w.height, w.width, w.windows), clock)
    start, moment, latencies = clock(), clock(), []
    coming = []
    for job, gap in zip(jobs, gaps, strict=True):
        moment += gap
        coming.append((moment, job))
    while coming or core.tasks:
        if not core.tasks and coming:
            clock.skip_to(coming[0][0])
        room = len(coming) if way == "steps" else 0 if core.tasks else places if way == "requests" else 1
        while coming and room and coming[0][0] <= clock():
            arrived, job = coming.pop(0)
            core.add(
                Task(
                    make_images(job),
                    lambda made, error, arrived=arrived: latencies.append(clock() - arrived),
                    lambda told: None,
                    arrived=arrived,
                )
            )
            room -= 1
        core.tick()
    return clock() - start, latencies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--load", type=float, default=0.9, help="of what one request at a time can bear")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--samples", type=int, help="how many share a step; measured when left out")
    parser.add_argument("--json", type=Path, dest="file")
    options = parser.parse_args()
    on_processor = options.backend in ("cpu", "openvino")
    pipeline = dnp.Pipeline.open(options.bundle, options.backend, threads=1 if on_processor else None)
    pipeline.warm_up()
    clock, latents = Clock(on_processor), pipeline.bundle.latents
    size = (latents.height * latents.vae_scale_factor, latents.width * latents.vae_scale_factor)
    stages, shortest = Stages(pipeline.graphs, waits=True), {}
    stages.open(Room(8, STEPS + 1, STEPS + 1, *size, 1))

    def seconds_of(samples: int) -> float:
        started = clock()
        stages.rehearse(2 * samples)
        spent = clock() - started
        shortest[samples] = min(shortest.get(samples, spent), spent)
        return spent

    cap = measure_cap(seconds_of, 8, clock)
    print(f"{pipeline.runs_on}\nseconds of a step by samples, and samples a second beside one:")
    for samples, seconds in sorted(shortest.items()):
        print(f"{samples:3d}  {seconds * 1e3:8.2f} ms  {samples * shortest[1] / seconds:.2f}")
    print(f"cap: {cap}")
    places = options.samples or cap
    jobs = [pipeline.resolve(request) for request in requests(options.requests, 0)]
    ways = {"one": 1, "requests": places, "steps": places}
    alone, _ = serve(pipeline, jobs, [0.0] * len(jobs), 1, "one", clock)
    rng = random.Random(1)
    gaps = [rng.expovariate(options.load * len(jobs) / alone) for _ in jobs]
    found = {name: {"throughput": [], "mean": [], "p95": []} for name in ways}
    for _ in range(options.turns):
        for name, count in ways.items():
            seconds, _ = serve(pipeline, jobs, [0.0] * len(jobs), count, name, clock)
            _, latencies = serve(pipeline, jobs, gaps, count, name, clock)
            found[name]["throughput"].append(len(jobs) / seconds)
            found[name]["mean"].append(statistics.mean(latencies))
            found[name]["p95"].append(sorted(latencies)[int(0.95 * len(latencies))])
    print(f"{places} share a step; requests a second all at once, and seconds to the answer at load {options.load}:")
    medians = {name: {what: statistics.median(values) for what, values in of.items()} for name, of in found.items()}
    for name, values in medians.items():
        told = "  ".join(f"{what} {value:.3f} ({value / medians['one'][what]:.2f})" for what, value in values.items())
        print(f"{name:>8}  {told}")
    if options.file:
        report = {"runs_on": pipeline.runs_on, "steps": shortest, "cap": cap, "samples": places, "ways": medians}
        options.file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
