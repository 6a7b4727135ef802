"""The commands about serving: serve, bench-serve."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from dnp.cli.options import PATH, PipelineOptions, backend_options, json_option, say
from dnp.cli.streams import complain

if TYPE_CHECKING:
    from dnp.engine.errors import BackendError

SECONDS: Final = click.FloatRange(0, min_open=True)
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 is every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 is any free one.")
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    metavar="[NAME=]PATH",
    help="Serve this bundle, under this name or its own; several times for several. The first is the default model; "
    "the shipped bundle when left out.",
)
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    metavar="NAME",
    help="Another name for the default model, besides gpt-image-1, dall-e-2 and dall-e-3.",
)
@click.option(
    "--api-keys",
    type=PATH,
    help="File of the keys that clients must send, one a line; DNP_API_KEYS in the environment adds to them.",
)
@click.option("--cors-origin", "origins", multiple=True, metavar="ORIGIN", help="Let pages from there call; * is all.")
@click.option("--sdapi", is_flag=True, help="Also serve AUTOMATIC1111's API below /sdapi/v1.")
@click.option("--samples", type=click.IntRange(1), help="Most images in one step; measured at warm-up when left out.")
@click.option("--queue", type=click.IntRange(1), default=64, show_default=True, help="Most requests that wait.")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="WxH",
    help="Serve this image size, in pixels; several times for several. The bundle's own when left out.",
)
@click.option(
    "--max-steps", type=click.IntRange(8), default=127, show_default=True, help="Most calls of the network in a pass."
)
@click.option("--windows", type=click.IntRange(1, 8), default=1, show_default=True, help="Most that a text may fill.")
@click.option(
    "--max-images", type=click.IntRange(1, 256), default=10, show_default=True, help="Most images of a request."
)
@click.option("--deadline", type=SECONDS, default=600.0, show_default=True, help="Seconds until a request is given up.")
@click.option("--drain", type=SECONDS, default=120.0, show_default=True, help="Seconds for work in flight at the end.")
@click.option("--body-limit", type=click.IntRange(1), default=16, show_default=True, metavar="MB", help="Largest body.")
@click.option("--no-cache", is_flag=True, help="Find n* anew for each request; share none.")
@click.option("--cache", type=PATH, metavar="FOLDER", help="Keep n* there, too, as PNG files with the prompt inside.")
@click.option("--log", "log", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Its form.")
@click.option("--log-prompts", is_flag=True, help="Write prompts to the log, which never holds them otherwise.")
@click.option("--ray", is_flag=True, help="Serve on Ray: on the cluster that this machine is part of, or its own.")
@click.option("--fronts", type=click.IntRange(1), default=2, show_default=True, help="With --ray: replicas of the API.")
@click.option("--replicas", default="1:4", show_default=True, metavar="MIN:MAX", help="With --ray: engines of a model.")
@click.option("--cpus", type=click.FloatRange(0), default=1.0, show_default=True, help="With --ray: of each engine.")
@click.option("--gpus", type=click.FloatRange(0), default=0.0, show_default=True, help="With --ray: of each engine.")
@backend_options
def serve(
    options: PipelineOptions,
    host: str,
    port: int,
    bundles: tuple[str, ...],
    aliases: tuple[str, ...],
    api_keys: Path | None,
    origins: tuple[str, ...],
    sdapi: bool,
    samples: int | None,
    queue: int,
    sizes: tuple[str, ...],
    max_steps: int,
    windows: int,
    max_images: int,
    deadline: float,
    drain: float,
    body_limit: int,
    no_cache: bool,
    cache: Path | None,
    log: str,
    log_prompts: bool,
    ray: bool,
    replicas: str,
    fronts: int,
    cpus: float,
    gpus: float,
) -> int:
    """Serve bundles over HTTP, in OpenAI's form, with a page at / to try them.

    SIGTERM or Ctrl-C finishes what is in flight, and takes nothing more; a second one ends it at once.
    """
    try:
        from dnp.runtime.batching import BatchOptions, NegativeCache
        from dnp.serving import logs
        from dnp.serving.app import create_app
        from dnp.serving.engines import LocalEngine
        from dnp.serving.server import bind
        from dnp.serving.server import serve as run
        from dnp.serving.settings import ALIASES, ServerSettings, read_keys
    except ModuleNotFoundError as error:
        raise _missing(error, "cpu,serve", "serving") from error

    settings = ServerSettings(
        keys=read_keys(api_keys),
        origins=origins,
        aliases=(*aliases, *ALIASES),
        most_images=max_images,
        body_limit=body_limit * 1_000_000,
        deadline=deadline,
        drain_seconds=drain,
        sdapi=sdapi,
        log_prompts=log_prompts,
    )
    served: dict[str, Any] = {
        "samples": samples,
        "queue": queue,
        "sizes": tuple(map(_size, sizes)),
        "windows": tuple(range(1, windows + 1)),
        "steps": max_steps,
    }
    if host not in _LOOPBACK and not settings.keys:
        complain(f"{host} can be reached from other machines, and no key is asked for; consider --api-keys")
    if cache and no_cache:
        raise click.BadParameter("nothing is kept with --no-cache; say one of them", param_hint="--cache")
    listener = bind(host, port, writer_seconds=settings.writer_seconds)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

    def ready() -> None:
        click.echo(f"ready: open {address}/ in a browser, or point a client at {address}/v1")

    if ray:
        port = listener.getsockname()[1]
        listener.close()  # Ray's own process takes the port
        click.echo(f"starting on Ray, to serve on {address}")
        more = {"server": settings, "log": log, "fronts": fronts, "cpus": cpus, "gpus": gpus}
        kept = {"cache": not no_cache, "cache_folder": cache and cache.absolute()}
        args = {**served, **more, **kept, "replicas": _range(replicas)}
        return _stopped(_run_on_ray(options, bundles, args, host, port, ready))
    engines: list[LocalEngine] = []
    try:
        logs.configure(log, prompts=log_prompts)
        negatives = None if no_cache else NegativeCache(folder=cache)
        if negatives is not None:
            click.get_current_context().call_on_close(negatives.close)
        batching = BatchOptions(**served, negatives=negatives)
        for name, path in map(_named, bundles or [None]):
            pipeline = replace(options, bundle=path).open()
            engines.append(LocalEngine(name or pipeline.bundle.name, pipeline, batching))
        app = create_app(engines, settings)
    except BaseException:
        listener.close()
        for engine in engines:
            engine.close()
        raise

    click.echo(f"serving {', '.join(engine.name for engine in engines)} on {address}; warming up")
    return _stopped(run(app, listener, engines, ready))


def _stopped(whole: bool) -> int:
    """Say that it is over. Raises KeyboardInterrupt when it is not ``whole``: what was in flight was cut off."""
    if not whole:
        raise KeyboardInterrupt
    click.echo("stopped; everything that was in flight was answered")
    return 0


def _run_on_ray(
    options: PipelineOptions,
    bundles: tuple[str, ...],
    args: dict[str, Any],
    host: str,
    port: int,
    ready: Callable[[], None],
) -> bool:
    """Serve on Ray with these ``args`` of ``ray_app.Args``. Returns whether all work was finished."""
    from dnp.engine.backends.session import BackendOptions
    from dnp.engine.bundle.bundle import Bundle
    from dnp.engine.errors import SettingsError

    os.environ.update(RAY_DISABLE_WORKER_LOG_PREFIX="1", RAY_DEDUP_LOGS="0")  # every line of the log, as it is
    try:
        from dnp.serving import ray_app
    except ModuleNotFoundError as error:
        raise _missing(error, "cpu,ray", "serving on Ray") from error

    paths = {name or Bundle.open(path).name: path for name, path in map(_named, bundles) if path}
    if len(paths) < len(bundles):
        raise SettingsError(f"two models have the same name ({', '.join(bundles)}); name them apart, as NAME=PATH")
    backend = BackendOptions(**options.of_backend)
    found = ray_app.Args(bundles=paths, backend=options.backend or "cpu", options=backend, **args)
    return ray_app.run(found, host, port, ready)


def _range(text: str) -> tuple[int, int]:
    """``2:4``, or ``2`` for exactly so many."""
    least, colon, most = text.partition(":")
    most = most if colon else least
    if not (least.isascii() and least.isdigit() and most.isascii() and most.isdigit() and 1 <= int(least) <= int(most)):
        raise click.BadParameter(f"{text!r} is no MIN:MAX, such as 1:4", param_hint="--replicas")
    return int(least), int(most)


def _named(text: str | None) -> tuple[str | None, Path | None]:
    """``name=path`` or ``path`` as a name and a path."""
    if text is None:
        return None, None
    name, equals, path = text.partition("=")
    if not equals or "/" in name:
        name, path = "", text
    if not path:
        raise click.BadParameter(f"{text!r} names no folder; write PATH, or NAME=PATH", param_hint="--bundle")
    return name or None, Path(path)


def _size(text: str) -> tuple[int, int]:
    """``512x768``, width first, as (height, width)."""
    width, cross, height = text.partition("x")
    if not (cross and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise click.BadParameter(f"{text!r} is no WIDTHxHEIGHT, such as 512x768", param_hint="--size")
    return int(height), int(width)


def _missing(error: ModuleNotFoundError, extra: str, purpose: str) -> BackendError:
    """What to install. Raises ``error`` itself when it is a module of ours."""
    from dnp.engine.system.imports import missing_extra

    if not error.name or error.name.startswith("dnp"):
        raise error
    return missing_extra(error.name, extra, purpose)


@click.command("bench-serve")
@click.argument("url")
@click.option("--clients", "clients", multiple=True, type=click.IntRange(1), help="Clients that each wait; repeatable.")
@click.option("--rate", "rates", multiple=True, type=float, help="Requests a second, waiting for nobody; repeatable.")
@click.option("--requests", type=click.IntRange(1), default=50, show_default=True, help="How many for each load.")
@click.option("--mix", type=PATH, help="JSON file with lists that each field of the body is drawn from.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw.")
@click.option("--deadline", type=float, help="Seconds by which an answer is of use: what comes later is no goodput.")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds that a client waits.")
@click.option("--plot", "picture", type=PATH, help="Draw throughput and latency into this file.")
@json_option
def bench_serve(
    url: str,
    clients: tuple[int, ...],
    rates: tuple[float, ...],
    requests: int,
    mix: Path | None,
    seed: int,
    deadline: float | None,
    timeout: float,
    picture: Path | None,
    as_json: bool,
) -> int:
    """Measure the server at URL, ours or any that speaks OpenAI's /v1/images/generations.

    1 to 16 clients when no load is named. The key is read from DNP_API_KEY in the environment.
    """
    import asyncio

    from tqdm import tqdm

    try:
        from dnp.serving import load
    except ModuleNotFoundError as error:
        raise _missing(error, "bench", "measuring a server") from error

    if any(rate <= 0 for rate in rates):
        raise click.BadParameter("a rate must be more than 0 requests a second", param_hint="--rate")
    drawn = load.read_mix(mix)
    loads = [*(load.Load(clients=n) for n in clients), *(load.Load(rate=rate) for rate in rates)]
    loads = loads or [load.Load(clients=n) for n in (1, 2, 4, 8, 16)]
    found = []
    with tqdm(total=requests * len(loads), unit="request", disable=None) as bar:
        for one in loads:
            bar.set_description(str(one))
            work = load.drive(
                url, one, load.bodies(drawn, seed), requests, key=os.environ.get("DNP_API_KEY"), deadline=deadline,
                timeout=timeout, tell=bar.update,
            )  # fmt: skip
            found.append(asyncio.run(work))
    if picture is not None:
        try:
            kinds = {
                "clients": [one for one in found if one.clients],
                "requests a second": [one for one in found if one.rate],
            }
            load.plot({f"over {kind}": some for kind, some in kinds.items() if some}, picture)
        except ModuleNotFoundError as error:
            raise _missing(error, "bench", "drawing") from error
    say(load.report(url, found, drawn, seed), as_json, load.table(found))
    return 0 if any(one.answered for one in found) else 1
