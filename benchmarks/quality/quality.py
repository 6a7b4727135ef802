"""Does DNP help? ``make quality``, or for a bundle and prompts of one's own:

python benchmarks/quality/quality.py --bundle BUNDLE --texts PROMPTS.txt --clip CLIP_FOLDER --out build/quality-of-mine
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import click
from evaluation_sets import ClipTexts, EvaluationSet, Scenes
from experiment import Experiment, Grid, choose, measure
from joblib import Memory
from report import contact_sheet, plot, table

from dnp import Pipeline
from dnp.engine.system.files import write_together
from dnp.engine.system.processor import core_count, processor_name
from dnp.runtime.pictures import png

USED = ("dnp-engine", "numpy", "onnxruntime", "openvino", "torch")


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="A bundle folder; the shipped default when left out.")
@click.option("--backend", default="cpu", show_default=True)
@click.option("--threads", type=int, help="The backend's own choice when left out.")
@click.option("--texts", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Prompts, one a line.")
@click.option("--clip", type=click.Path(path_type=Path, exists=True, file_okay=False), help="The judge of --texts.")
@click.option("--prompts", default=300, show_default=True, type=click.IntRange(2), help="How many are reported on.")
@click.option("--choosing", default=60, show_default=True, type=click.IntRange(2), help="How many choose settings.")
@click.option("--w", multiple=True, type=float, default=Grid.w, show_default=True, help="Guidance to choose from.")
@click.option("--s", multiple=True, type=float, default=Grid.s, show_default=True, help="DNS guidance, likewise.")
@click.option("--sampler", multiple=True, default=Grid.samplers, show_default=True)
@click.option("--steps", multiple=True, type=int, default=Grid.steps, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/quality"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(
    bundle: Path | None,
    backend: str,
    threads: int | None,
    texts: Path | None,
    clip: Path | None,
    prompts: int,
    choosing: int,
    w: tuple[float, ...],
    s: tuple[float, ...],
    sampler: tuple[str, ...],
    steps: tuple[int, ...],
    work: Path,
    out: Path,
) -> None:
    """Compare plain guidance, DNP and its controls, and write quality.json, .md and .png and quality-sheet.png to OUT.

    The first prompts choose the settings, the others report. What was sampled is kept in WORK, so that a run that was
    stopped goes on where it was.
    """
    if (texts is None) != (clip is None):
        raise click.UsageError("--texts and --clip go together: prompts of your own, and the model that judges them")
    try:
        evaluated: EvaluationSet = Scenes.draw(choosing + prompts) if texts is None else ClipTexts.load(texts, clip)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if len(evaluated.prompts) < choosing + 2:
        raise click.UsageError(
            f"{len(evaluated.prompts)} prompts leave none to report on after {choosing}; lower --choosing"
        )
    started, grid, cache = time.monotonic(), Grid(w, s, sampler, steps), Memory(work, verbose=0)
    with Pipeline.open(bundle, backend, threads=threads) as pipeline:
        chooser = Experiment(pipeline, evaluated.part(slice(choosing)), 0, cache)
        reporter = Experiment(pipeline, evaluated.part(slice(choosing, choosing + prompts)), 1_000_000, cache)
        rows, best = choose(chooser, grid)
        found = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": f"{processor_name()}, {core_count()} cores, {platform.system()}",
            "versions": {"python": platform.python_version(), **{name: version(name) for name in USED}},
            "made": time.strftime("%Y-%m-%d", time.gmtime()),
            "bundle": {"name": pipeline.bundle.name, "fingerprint": pipeline.bundle.fingerprint},
            "runs on": pipeline.runs_on,
            "evaluation set": evaluated.name,
            "unit": evaluated.unit,
            "prompts": {"choosing": choosing, "reporting": len(reporter.evaluated.prompts)},
            "grid": asdict(grid),
            "chosen from": rows,
            **measure(reporter, grid, best),
        }
        pictures = contact_sheet(reporter, grid, best)
    found["seconds"] = round(time.monotonic() - started)
    out.mkdir(parents=True, exist_ok=True)
    write_together(
        {
            out / "quality.json": (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode(),
            out / "quality.md": table(found).encode(),
            out / "quality.png": plot(found),
            out / "quality-sheet.png": png(pictures),
        }
    )
    click.echo(table(found))


if __name__ == "__main__":
    main()
