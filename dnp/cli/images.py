"""The commands that make or read pictures: generate, dns, explore, caption."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dnp.cli.options import (
    PATH,
    PipelineOptions,
    Progress,
    caption_options,
    dns_options,
    final_options,
    given_options,
    image_options,
    json_option,
    out_options,
    pipeline_options,
    say,
    warn_if_truncated,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from dnp.runtime.pipeline.pipeline import Pipeline
    from dnp.runtime.request import Request
    from dnp.runtime.result import Result


@click.command()
@click.argument("prompt", required=False)
@click.option("--negative", help="Your own n*: skips DNS and captioning.")
@click.option("--no-dnp", is_flag=True, help="Plain classifier-free guidance against the empty prompt.")
@click.option("--compare", is_flag=True, help="Also make the plain image, and one picture of all side by side.")
@click.option("--images", type=int, default=1, show_default=True, help="How many, with seeds counted up.")
@click.option(
    "--from-image",
    type=PATH,
    help="Reproduce a picture that dnp made, with its request, from the settings inside it; no others are taken. "
    "Another version of dnp or of the library that ran may give other bits; that is told.",
)
@image_options
@final_options
@dns_options
@caption_options
@pipeline_options
@out_options
@json_option
def generate(
    prompt: str | None,
    from_image: Path | None,
    no_dnp: bool,
    options: PipelineOptions,
    out: Path,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Generate images for PROMPT by diffusion-negative prompting.

    They are called <prompt>-<seed>-<kind>.png; a prompt with more to it than words in lower case (or too long for a
    name) gets eight digits of its own behind them, so that no two prompts share a name.
    """
    from dnp.runtime.pictures import kinds_of, output_folder, outputs, save
    from dnp.runtime.request import Request

    made_with = None
    if from_image is not None:
        request, options, made_with = _settings_of(from_image, options)
    elif prompt is None:
        raise click.UsageError("name a PROMPT, or a picture to reproduce with --from-image")
    else:
        if no_dnp or settings["negative"] is not None:
            _refuse_dns_options("--no-dnp" if no_dnp else "--negative")
        request = Request(prompt, dnp=not no_dnp, **settings)

    pipeline = options.open()
    if from_image is not None and made_with is not None:
        _compare_makers(pipeline, from_image, made_with)
    job = pipeline.resolve(request)
    warn_if_truncated(pipeline, job, "prompt", job.prompt)
    kinds = [*kinds_of(job.request), *(["compared"] if job.compare else [])]
    files = outputs(out, job.request, pipeline.made_with, kinds)
    with output_folder(out, files, overwrite=overwrite):
        with closing(Progress()) as progress:
            result = pipeline.run(job, progress)
        warn_if_truncated(pipeline, job, "negative prompt", *dict.fromkeys(result.negatives))
        compared = {"compared": [_side_by_side(result)]} if job.compare else {}
        paths = save(files, {**result.by_kind, **compared}, result.negatives)
    say(_report(result, paths), as_json, _summary(result, paths))


@click.command()
@click.argument("prompt")
@click.option("--images", type=int, default=1, show_default=True, help="How many, with seeds counted up.")
@image_options
@dns_options
@caption_options
@pipeline_options
@out_options
@json_option
def dns(
    prompt: str,
    options: PipelineOptions,
    out: Path,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Only the diffusion-negative image of PROMPT, and its caption n*."""
    from dnp.runtime.pictures import output_folder, outputs, save
    from dnp.runtime.pipeline.pipeline import drive
    from dnp.runtime.request import Request

    pipeline = options.open()
    job = pipeline.resolve(Request(prompt, **settings))
    warn_if_truncated(pipeline, job, "prompt", prompt)
    files = outputs(out, job.request, pipeline.made_with, ["dns"])
    with output_folder(out, files, overwrite=overwrite):
        with closing(Progress()) as progress:
            result = drive(pipeline.dns_steps(job), progress)
        paths = save(files, result.by_kind, result.negatives)
    say(_report(result, paths), as_json, _summary(result, paths))


@click.command()
@click.argument("prompt")
@click.option("--images", type=int, default=4, show_default=True, help="How many seeds, a row each.")
@image_options
@final_options
@dns_options
@caption_options
@pipeline_options
@out_options
@json_option
def explore(
    prompt: str,
    options: PipelineOptions,
    out: Path,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """The paper's four panels for PROMPT, a row for each seed, as one picture.

    p alone; the DNS image with its caption n*; n* alone as the negative prompt; the pair (p, n*).
    """
    from dnp.runtime.pictures import output_folder, outputs, save, sheet
    from dnp.runtime.pipeline.pipeline import drive
    from dnp.runtime.request import Request
    from dnp.runtime.result import to_images

    pipeline = options.open()
    job = pipeline.resolve(Request(prompt, compare=True, **settings))
    warn_if_truncated(pipeline, job, "prompt", prompt)
    files = outputs(out, job.request, pipeline.made_with, ["explored"])
    with output_folder(out, files, overwrite=overwrite):
        with closing(Progress()) as progress:
            result = pipeline.run(job, progress)
            started = time.perf_counter()
            alone = drive(pipeline.sample([""] * job.images, result.negatives, job), progress)
        spent = time.perf_counter() - started
        seconds = {**result.seconds, "alone": spent, "total": result.seconds["total"] + spent}
        result = replace(result, seconds=seconds)
        warn_if_truncated(pipeline, job, "negative prompt", *dict.fromkeys(result.negatives))
        rows = [
            [(plain, ""), (dns_image, f"n* = {negative}"), (negative_only, ""), (pair, "")]
            for plain, dns_image, negative_only, pair, negative in zip(
                result.plain_images, result.dns_images, to_images(alone), result.images, result.negatives, strict=True
            )
        ]
        picture = sheet(
            rows,
            title=prompt,
            headings=["p alone", "DNS image", "n* alone, as negative", "the pair (p, n*)"],
            titles=[f"seed {seed}" for seed in job.seeds],
        )
        paths = save(files, {"explored": [picture]}, result.negatives)
    lines = [f"seed {seed}: n* = {negative}" for seed, negative in zip(job.seeds, result.negatives, strict=True)]
    say(_report(result, paths), as_json, "\n".join([*lines, *(f"wrote {path}" for path in paths), _time(result)]))


@click.command()
@click.argument("images", nargs=-1, required=True, type=PATH)
@caption_options
@pipeline_options
@json_option
def caption(
    images: tuple[Path, ...],
    options: PipelineOptions,
    as_json: bool,
    **settings: Any,
) -> None:
    """Put each of IMAGES into words."""
    from dnp.runtime.pictures import open_image

    pictures = [open_image(path) for path in images]
    pipeline = options.open()
    captions = pipeline.caption(pictures, **settings)
    report = {"captions": [{"image": str(p), "caption": c} for p, c in zip(images, captions, strict=True)]}
    text = captions if len(images) == 1 else [f"{p}: {c}" for p, c in zip(images, captions, strict=True)]
    say(report, as_json, "\n".join(text))


def _refuse_dns_options(switch: str) -> None:
    """Raises UsageError for an option about finding n*, which ``switch`` leaves out."""
    for name, option in given_options().items():
        if name.startswith("dns_") or name in ("beams", "prefix", "min_length", "max_length"):
            raise click.UsageError(f"{option} says how to find n*, and {switch} leaves that out; drop one of the two")


def _settings_of(path: Path, options: PipelineOptions) -> tuple[Request, PipelineOptions, dict[str, Any]]:
    """The request inside a picture, what made it where no other was asked for, and all that is inside."""
    from dnp.runtime.pictures import read_settings
    from dnp.runtime.request import Request

    ours = {"from_image", "out", "overwrite", "as_json", *(field.name for field in fields(PipelineOptions))}
    given = [name for name in given_options() if name not in ours]
    if given:
        names = ", ".join(sorted(given))
        raise click.UsageError(f"--from-image takes its settings from the picture; leave out {names}")
    settings = read_settings(path)
    if options.backend is None:
        precision = settings.get("precision") if options.precision is None else options.precision
        options = replace(options, backend=settings.get("backend"), precision=precision)
    if settings.get("version") not in (None, version("dnp-engine")):
        click.echo(
            f"dnp: {path} was made by dnp-engine {settings['version']}, this is {version('dnp-engine')}: "
            "the bits of the picture may differ",
            err=True,
        )
    return Request.from_dict(settings["request"]), options, settings


def _compare_makers(pipeline: Pipeline, path: Path, made_with: dict[str, Any]) -> None:
    """Refuse a picture of another bundle; say so when another library runs than the one that made it."""
    from dnp.engine.errors import SettingsError

    if made_with.get("bundle") != pipeline.bundle.fingerprint:
        raise SettingsError(
            f"{path} was made with bundle {made_with.get('bundle')}, this is {pipeline.bundle.fingerprint}; "
            "name the bundle it was made with by --bundle"
        )
    before, now = made_with.get("runs_on") or "", pipeline.runs_on
    if before.partition(",")[0] != now.partition(",")[0]:  # the library and its version, without the threads
        click.echo(f"dnp: {path} was made on {before}, this is {now}: the bits of the picture may differ", err=True)


def _side_by_side(result: Result) -> Image:
    from dnp.runtime.pictures import sheet

    columns = [("plain", result.plain_images, [""] * len(result.negatives))]
    if result.dns_arrays is not None:
        columns.append(("DNS image", result.dns_images, [f"n* = {n}" for n in result.negatives]))
    if result.request.dnp:
        written = result.request.negative is not None  # n* is told once: below the DNS image, where there is one
        columns.append(("DNP: the pair (p, n*)", result.images, [f"n* = {n}" * written for n in result.negatives]))
    rows = [[(images[i], texts[i]) for _, images, texts in columns] for i in range(len(result.negatives))]
    return sheet(
        rows,
        title=result.request.prompt,
        headings=[name for name, _, _ in columns],
        titles=[f"seed {result.request.seed + i}" for i in range(len(rows))],
        cell=256,
    )


def _report(result: Result, paths: list[Path]) -> dict[str, Any]:
    return {
        "images": [str(path) for path in paths],
        "negatives": result.negatives,
        "request": result.request.to_dict(),
        "seconds": {name: round(value, 4) for name, value in result.seconds.items()},
        "bundle": result.bundle,
        "backend": result.backend,
        "precision": result.precision,
        "runs_on": result.runs_on,
    }


def _summary(result: Result, paths: list[Path]) -> str:
    lines = [
        f"seed {result.request.seed + i}: n* = {negative}" if negative else f"seed {result.request.seed + i}"
        for i, negative in enumerate(result.negatives)
    ]
    lines += [f"wrote {path}" for path in paths]
    return "\n".join([*lines, _time(result)])


def _time(result: Result) -> str:
    spent = ", ".join(f"{name} {value:.2f} s" for name, value in result.seconds.items())
    return f"time: {spent} ({result.runs_on})"
