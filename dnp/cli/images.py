"""The commands that make or read pictures: generate, dns, explore, caption."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dnp.cli.options import (
    PATH,
    Engine,
    Progress,
    caption_options,
    dns_options,
    engine_options,
    final_options,
    image_options,
    json_option,
    out_option,
    say,
    warn_if_truncated,
)

if TYPE_CHECKING:
    from dnp.runtime.pipeline.pipeline import Pipeline
    from dnp.runtime.request import Request, Result


@click.command()
@click.argument("prompt", required=False)
@click.option("--negative", help="Your own n*: skips DNS and captioning.")
@click.option("--no-dnp", is_flag=True, help="Plain classifier-free guidance against the empty prompt.")
@click.option("--compare", is_flag=True, help="Also make the plain image, and one picture of all side by side.")
@click.option("--images", type=int, default=1, show_default=True, help="How many, with seeds counted up.")
@click.option(
    "--from-image",
    type=PATH,
    help="Reproduce a picture that dnp made, with its request, from the settings inside it; no others are taken.",
)
@image_options
@final_options
@dns_options
@caption_options
@engine_options
@out_option
@json_option
@click.pass_context
def generate(
    context: click.Context,
    /,
    prompt: str | None,
    from_image: Path | None,
    no_dnp: bool,
    engine: Engine,
    out: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    """Generate images for PROMPT by diffusion-negative prompting."""
    from dnp.runtime.pictures import file_name, output_folder, save
    from dnp.runtime.request import Request

    if from_image is not None:
        request, engine = _settings_of(context, from_image, engine)
    elif prompt is None:
        raise click.UsageError("name a PROMPT, or a picture to reproduce with --from-image")
    else:
        request = Request(prompt, dnp=not no_dnp, **settings)

    pipeline = engine.open()
    if from_image is not None:
        _same_bundle(pipeline, from_image)
    request = pipeline.resolve(request)
    warn_if_truncated(pipeline, "prompt", request.prompt)
    with output_folder(out):
        with closing(Progress()) as progress:
            result = pipeline.run(request, progress)
        warn_if_truncated(pipeline, "negative prompt", *dict.fromkeys(result.negatives))
        compared = out / f"{file_name(request.prompt)}-{request.seed}-compared.png"
        paths = save(result, out, {compared: _side_by_side(result)} if request.compare else None)
    say(_report(result, paths), as_json, _summary(result, paths))


@click.command()
@click.argument("prompt")
@click.option("--images", type=int, default=1, show_default=True, help="How many, with seeds counted up.")
@image_options
@dns_options
@caption_options
@engine_options
@out_option
@json_option
def dns(
    prompt: str,
    engine: Engine,
    out: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    """Only the diffusion-negative image of PROMPT, and its caption n*."""
    from dnp.runtime.pictures import output_folder, save
    from dnp.runtime.request import Request

    pipeline = engine.open()
    request = pipeline.resolve(Request(prompt, **settings))
    warn_if_truncated(pipeline, "prompt", prompt)
    with output_folder(out):
        with closing(Progress()) as progress:
            result = pipeline.dns(progress=progress, **request.to_dict())
        paths = save(result, out)
    say(_report(result, paths), as_json, _summary(result, paths))


@click.command()
@click.argument("prompt")
@click.option("--images", type=int, default=4, show_default=True, help="How many seeds, a row each.")
@image_options
@final_options
@dns_options
@caption_options
@engine_options
@out_option
@json_option
def explore(
    prompt: str,
    engine: Engine,
    out: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    """The paper's four panels for PROMPT, a row for each seed, as one picture.

    p alone; the DNS image with its caption n*; n* alone as the negative prompt; the pair (p, n*).
    """
    from dnp.runtime.pictures import file_name, output_folder, png, sheet, write_atomically
    from dnp.runtime.pipeline.pipeline import drive
    from dnp.runtime.request import Request, to_images

    pipeline = engine.open()
    request = pipeline.resolve(Request(prompt, compare=True, **settings))
    warn_if_truncated(pipeline, "prompt", prompt)
    path = out / f"{file_name(prompt)}-{request.seed}-explored.png"
    with output_folder(out):
        with closing(Progress()) as progress:
            result = pipeline.run(request, progress)
            started = time.perf_counter()
            alone = drive(pipeline.sample([""] * request.images, result.negatives, request), progress)
        spent = time.perf_counter() - started
        seconds = {**result.seconds, "alone": spent, "total": result.seconds["total"] + spent}
        result = replace(result, seconds=seconds)
        warn_if_truncated(pipeline, "negative prompt", *dict.fromkeys(result.negatives))
        rows = [
            [(plain, ""), (dns_image, f"n* = {negative}"), (negative_only, ""), (pair, "")]
            for plain, dns_image, negative_only, pair, negative in zip(
                result.plain_images, result.dns_images, to_images(alone), result.images, result.negatives, strict=True
            )
        ]
        picture = sheet(
            rows,
            headings=["p alone", "DNS image", "n* alone, as negative", "the pair (p, n*)"],
            titles=[f"seed {request.seed + i}" for i in range(request.images)],
        )
        write_atomically(path, png(picture))
    lines = [f"seed {request.seed + i}: n* = {negative}" for i, negative in enumerate(result.negatives)]
    say(_report(result, [path]), as_json, "\n".join([*lines, f"wrote {path}", _time(result)]))


@click.command()
@click.argument("images", nargs=-1, required=True, type=PATH)
@caption_options
@engine_options
@json_option
def caption(
    images: tuple[Path, ...],
    engine: Engine,
    as_json: bool,
    **settings: Any,
) -> None:
    """Put each of IMAGES into words."""
    from dnp.runtime.pictures import open_image

    pictures = [open_image(path) for path in images]
    pipeline = engine.open()
    captions = pipeline.caption(pictures, **settings)
    report = {"captions": [{"image": str(p), "caption": c} for p, c in zip(images, captions, strict=True)]}
    text = captions if len(images) == 1 else [f"{p}: {c}" for p, c in zip(images, captions, strict=True)]
    say(report, as_json, "\n".join(text))


def _settings_of(context: click.Context, path: Path, engine: Engine) -> tuple[Request, Engine]:
    """The request inside a picture, and the engine that made it where no other was asked for."""
    from dnp.runtime.pictures import read_settings
    from dnp.runtime.request import Request

    ours = {"from_image", "out", "as_json", *(field.name for field in fields(Engine))}
    given = [
        name
        for name in context.params
        if name not in ours and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        names = ", ".join(sorted(given))
        raise click.UsageError(f"--from-image takes its settings from the picture; leave out {names}")
    settings = read_settings(path)
    if engine.backend is None:
        precision = settings.get("precision") if engine.precision is None else engine.precision
        engine = replace(engine, backend=settings.get("backend"), precision=precision)
    return Request.from_dict(settings["request"]), engine


def _same_bundle(pipeline: Pipeline, path: Path) -> None:
    from dnp.engine.errors import SettingsError
    from dnp.runtime.pictures import read_settings

    made_with = read_settings(path).get("bundle")
    if made_with != pipeline.bundle.fingerprint:
        raise SettingsError(
            f"{path} was made with bundle {made_with}, this is {pipeline.bundle.fingerprint}; "
            "name the bundle it was made with by --bundle"
        )


def _side_by_side(result: Result) -> bytes:
    from dnp.runtime.pictures import png, sheet

    columns = [("plain", result.plain_images, [""] * len(result.negatives))]
    if result.dns_arrays is not None:
        columns.append(("DNS image", result.dns_images, [f"n* = {n}" for n in result.negatives]))
    if result.request.dnp:
        columns.append(("DNP: the pair (p, n*)", result.images, [""] * len(result.negatives)))
    rows = [[(images[i], texts[i]) for _, images, texts in columns] for i in range(len(result.negatives))]
    seeds = [f"{result.request.prompt} · seed {result.request.seed + i}" for i in range(len(rows))]
    return png(sheet(rows, headings=[name for name, _, _ in columns], titles=seeds, cell=256))


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
