"""The speed of this engine beside its peers: ``make bench``, or ``python benchmarks/speed/bench.py``.

Makes what is missing (environments, weights, the peers' own formats), runs the contenders round by round, and writes
benchmarks/results/speed-SIZE.json, the tables and plots made from it, and the section of docs/speed.md.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click
from contenders import CONTENDERS
from job import Job, Point
from measure import Plan, measure, settings
from prepare import BUILD, MODELS, REPOSITORY, Model, prepare_model
from render import PAGE, render

from dnp.engine.system.files import write_together
from dnp.engine.system.processor import core_count, processor_name

RESULTS = REPOSITORY / "benchmarks" / "results"
PROMPT = "a large red circle left of a small blue square on a plain yellow background"
BATCHES, STEPS = (1, 2, 4, 8), (2, 4, 8, 16)
BUSY = 0.5  # load average from which the figures are doubtful
SCALE_STEPS = 4  # of the points where another axis is varied


@click.command()
@click.option("--size", "sizes", type=click.Choice(list(MODELS)), multiple=True, help="Models; all when left out.")
@click.option(
    "--only", "names", type=click.Choice(list(CONTENDERS)), multiple=True, help="Contenders; all if left out."
)
@click.option("--rounds", type=click.IntRange(1), help="Processes of each contender; 5 for the default model, else 2.")
@click.option("--repeats", type=click.IntRange(1), help="Timed requests in a process; 3 for the default model, else 1.")
@click.option("--steps", type=click.IntRange(2), help="Denoising steps of a pass; 25 for the default model, else 2.")
@click.option("--pixels", type=click.IntRange(8), help="Width and height; the model's own when left out.")
@click.option("--threads", type=click.IntRange(1), help="Threads of every contender; all physical cores if left out.")
@click.option("--scale/--no-scale", default=None, help="Also other batches, steps and sizes; the default model's only.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Where the results go.")
def main(
    sizes: tuple[str, ...],
    names: tuple[str, ...],
    rounds: int | None,
    repeats: int | None,
    steps: int | None,
    pixels: int | None,
    threads: int | None,
    scale: bool | None,
    out: Path,
) -> None:
    """Measure, write the results, and render them."""
    for size in sizes or tuple(MODELS):
        model = MODELS[size]
        tiny = size == "default"
        prepare_model(model)
        job = Job(
            contender="",
            model=str(model.source),
            captioner=str(model.captioner),
            converted=str(model.folder),
            bundle=str(model.bundle),
            plans=str(model.plans),
            threads=threads or core_count(),
            prompt=PROMPT,
            pixels=pixels or model.pixels,
            steps=steps or model.steps,
            warmups=1 if tiny else 0,
            repeats=repeats or (3 if tiny else 1),
        )
        points = scale_points(model, job) if (tiny if scale is None else scale) else ()
        plan = Plan(model, job, rounds or (5 if tiny else 2), points)
        load = os.getloadavg()[0]
        if load > BUSY:
            click.echo(f"the load average is {load:.1f}: what is measured beside other work says little", err=True)
        shutil.rmtree(BUILD / "inductor", ignore_errors=True)  # so that the first round compiles from nothing
        started = time.time()
        report = {"size": size, "title": model.title, "settings": settings(plan), "machine": machine(load)}
        path = out / f"speed-{size}.json"

        def keep(found: dict[str, Any], report: dict = report, path: Path = path, started: float = started) -> None:
            whole = {**report, "command": command(), "seconds": time.time() - started, **found}
            write_together({path: (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode()})

        measure(plan, [name for name in CONTENDERS if not names or name in names], keep)
    render(out, PAGE if out == RESULTS else None)


def scale_points(model: Model, job: Job) -> tuple[Point, ...]:
    """Batches at the model's own size; steps, and pixels, at batch 1. Fewer of them at full size."""
    tiny = model.name == "default"
    steps = SCALE_STEPS if tiny else 2
    batches, counts = (BATCHES, STEPS) if tiny else (BATCHES[:2], STEPS[:2])
    sides = [model.pixels * part // 4 for part in ((2, 4, 8, 16) if tiny else (2, 3, 4))]
    wanted = [Point(batch, steps, model.pixels) for batch in batches]
    wanted += [Point(1, count, model.pixels) for count in counts]
    wanted += [Point(1, steps, side) for side in sides]
    return tuple(dict.fromkeys(wanted))


def machine(load: float) -> dict[str, Any]:
    """What it ran on; ``load`` is the load average before the first run, which should be near 0."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": processor_name(),
        "cores": core_count(),
        "memory_bytes": pages,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_before": load,
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def command() -> str:
    """The command line, as one would type it in the repository."""
    return " ".join(["python benchmarks/speed/bench.py", *map(shlex.quote, sys.argv[1:])])


if __name__ == "__main__":
    main()
