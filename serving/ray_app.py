"""Several engines behind one address, on Ray Serve: ``app`` for ``serve run``, ``build`` for configuration files.

Front replicas hold the HTTP API, and with it whatever is decided once: the seed, admission, the deadline. Engine
replicas hold a model each, and stream what they make.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final

import ray
from fastapi import FastAPI
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.config import AutoscalingContext
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dnp.engine.backends.session import BackendOptions
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.errors import BackendError, DnpError, SettingsError
from dnp.runtime.batching import BatchOptions, Event, NegativeCache, Status
from dnp.runtime.pipeline.pipeline import Pipeline
from dnp.runtime.request import Request
from dnp.runtime.result import Result
from dnp.serving import logs
from dnp.serving.app import create_app
from dnp.serving.engines import LocalEngine, Order
from dnp.serving.ray_engine import RayEngine
from dnp.serving.server import SIGNALS, TWICE
from dnp.serving.service import Service
from dnp.serving.settings import ServerSettings, read_keys

_NAME: Final = "dnp"  # of the application in the cluster
_MARGIN: Final = 30.0  # seconds that a replica which is to end has beyond the longest request

_QUIET: Final = {"enable_access_log": False, "log_level": "WARNING"}  # the fronts write a line for each request


class Args(BaseModel):
    """What ``build`` is told: the ``args`` of a configuration file of Ray Serve.

    Attributes:
        bundles: folders by the names of their models, the first the default one; the shipped bundle when empty.
        backend, options: as of ``Pipeline.open``; a replica computes with ``cpus`` threads when none are named.
        cpus, gpus: what an engine replica takes of its machine, as Ray counts them.
        replicas: the fewest and the most engine replicas of each model.
        samples, sizes, windows, steps: as of ``BatchOptions``; sizes are (height, width).
        cache: whether engines keep the n* of prompts that were asked for before, and ``cache_folder`` where, besides
            their memory.
        ongoing: requests that an engine replica has at once, running or next to run.
        fronts: front replicas; with two or more the API stays while one of them is replaced.
        front_cpus: what each of them takes of its machine.
        queue: requests that wait in a front replica, beyond which it answers 429.
        server: as of ``create_app``; keys in ``DNP_API_KEYS`` of the environment are added.
        log: ``text`` or ``json``.
    """

    model_config = ConfigDict(extra="forbid")

    bundles: dict[str, Path] = {}
    backend: str = "cpu"
    options: BackendOptions = BackendOptions()
    cpus: float = 1.0
    gpus: float = 0.0
    replicas: tuple[int, int] = (1, 4)
    samples: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    windows: tuple[int, ...] = (1,)
    steps: int = BatchOptions.steps
    cache: bool = True
    cache_folder: Path | None = None
    ongoing: int = 16
    fronts: int = 2
    front_cpus: float = 0.1
    queue: int = 64
    server: ServerSettings = ServerSettings()
    log: str = "text"


class Replica:
    """An engine replica: one model, its thread, and what a front may ask of it."""

    def __init__(self, name: str, bundle: Path, args: Args) -> None:
        logs.configure(args.log, prompts=args.server.log_prompts)
        options = args.options
        if options.threads is None:
            options = replace(options, threads=max(1, round(args.cpus)))
        batching = BatchOptions(
            samples=args.samples,
            queue=args.ongoing,  # Ray lets no more through; what waits, waits in the fronts
            sizes=args.sizes,
            windows=args.windows,
            steps=args.steps,
            negatives=NegativeCache(folder=args.cache_folder) if args.cache else None,
        )
        self._stall = args.server.stall_seconds
        self._engine = LocalEngine(name, Pipeline.open(bundle, args.backend, **asdict(options)), batching)
        self._engine.warm_up()

    async def run(self, request: Request, order: Order) -> AsyncIterator[Event | Result | DnpError]:
        """The request's events and at last its result, or the error that ended it.

        An error that is raised would be in Ray's log, and reach the front with a traceback in its message.
        """
        try:
            async with aclosing(await self._engine.submit(self._engine.resolve(request), order)) as work:
                async for event in work:  # Ray ends this generator when the front wants no more of it
                    yield event
                    if isinstance(event, Result):
                        return
        except DnpError as error:
            yield error

    async def caption(self, images: Sequence[Image], order: Order, settings: Mapping[str, Any]) -> list[str] | DnpError:
        """Each image in words, or the error that ended it."""
        try:
            return await self._engine.caption(images, order, **settings)
        except DnpError as error:
            return error

    async def status(self) -> Status:
        """How the engine is."""
        return self._engine.status

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        status = self._engine.status
        if not status.alive or status.idle > self._stall:
            raise DnpError(f"the engine has not moved for {status.idle:.0f} s")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What ``replicas_wanted`` goes by."""
        status = self._engine.status
        return {"rows": sum(status.running.values()) + status.queued, "cap": max(status.cap.values())}


def replicas_wanted(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """As many engines as have their batches filled by the images that run and wait. Ray's delays come on top."""
    measured = context.aggregated_metrics or {}
    caps = measured.get("cap")
    if not caps:  # nobody has said anything yet
        return context.target_num_replicas, {}
    rows = sum(measured["rows"].values()) + (context.total_queued_requests or 0)
    return rows / max(caps.values()), {}


class Front:
    """A front replica: the HTTP API and the page."""

    async def __init__(  # type: ignore[misc]  # awaited by Ray, which sends no requests before it is done
        self, bundles: Mapping[str, Path], args: Args, *handles: DeploymentHandle[Any]
    ) -> None:
        logs.configure(args.log, prompts=args.server.log_prompts)
        engines = [
            RayEngine(name, Bundle.open(path), handle, args.queue)
            for (name, path), handle in zip(bundles.items(), handles, strict=True)
        ]
        await asyncio.gather(*(engine.warm_up() for engine in engines))
        self._watching = [asyncio.create_task(engine.watch()) for engine in engines]
        self._app = create_app(engines, args.server)
        self._app.add_middleware(_WithoutId)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def drain(self) -> int:
        """Take no new work. Returns how many requests are still to be answered."""
        service: Service = self._app.state.service
        service.draining = True
        return service.active


class _WithoutId:
    """Takes the id off the answers, which Ray's proxy writes there itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._app(scope, receive, answer)


def build(args: Mapping[str, Any] | Args) -> serve.Application:
    """The application, from ``Args`` or their dict; every machine of the cluster needs the bundles where this one has
    them.

    Raises BundleError for a bundle that cannot be opened, SettingsError for AUTOMATIC1111's API, and pydantic's
    ValidationError for other arguments.
    """
    args = args if isinstance(args, Args) else Args.model_validate(args)
    if args.server.sdapi:  # what its callers chose and what they run is known to one process alone
        raise SettingsError("AUTOMATIC1111's API is not to be had on Ray; leave sdapi out")
    keys = dict.fromkeys((*args.server.keys, *read_keys(None)))
    args = args.model_copy(update={"server": replace(args.server, keys=tuple(keys))})
    shipped = Bundle.default()
    bundles = {name: Bundle.open(path).path for name, path in args.bundles.items()} or {shipped.name: shipped.path}
    longest = args.server.deadline + _MARGIN
    fewest, most = args.replicas
    engine = serve.deployment(
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        max_ongoing_requests=args.ongoing,
        autoscaling_config={
            "min_replicas": fewest,
            "max_replicas": most,
            "policy": {"policy_function": replicas_wanted},
        },
        graceful_shutdown_timeout_s=longest,
        max_constructor_retry_count=1,
        logging_config=_QUIET,
    )(Replica)
    front = serve.deployment(
        name="front",
        num_replicas=args.fronts,
        ray_actor_options={"num_cpus": args.front_cpus},
        max_ongoing_requests=10_000,  # it admits by itself, and says so in OpenAI's words
        graceful_shutdown_timeout_s=longest,
        max_constructor_retry_count=1,
        logging_config=_QUIET,
    )(serve.ingress()(Front))
    engines = [
        engine.options(name=f"engine-{number}").bind(name, path, args)
        for number, (name, path) in enumerate(bundles.items())
    ]
    return front.bind(bundles, args, *engines)


app = build({})


def run(args: Args, host: str, port: int, ready: Callable[[], None]) -> bool:
    """Serve until SIGTERM or Ctrl-C, on the cluster that ``RAY_ADDRESS`` names or this machine is part of, or else on
    one of its own. Calls ``ready`` once it answers.

    On the signal new work is refused, and what there is finished, for at most ``drain_seconds`` or until a second
    signal. Returns whether all of it was. Raises BundleError, and BackendError when Ray cannot start it, or Serve runs
    there already.
    """
    app, patience = build(args), args.server.drain_seconds
    stop = threading.Semaphore(0)

    def handle(number: int, frame: FrameType | None) -> None:
        stop.release()

    try:
        with _told("start it"):
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            ray.init(include_dashboard=False, logging_level=logging.WARNING)
            running = serve.status().proxies
        if running:
            raise BackendError(
                "Ray Serve runs on this cluster already, and its address cannot be changed; have it serve this, too, "
                "with `serve run dnp.serving.ray_app:app`, or end it with `serve shutdown`"
            )
        with _told("start it"):
            http = {"host": host, "port": port, "request_timeout_s": args.server.deadline + _MARGIN}
            serve.start(http_options=http, logging_config=_QUIET)
            front = serve.run(app, name=_NAME)
        before = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            ready()
            stop.acquire()
            since = time.monotonic()
            with _told("end it"):
                while left := _drained(front, patience):
                    again, late = stop.acquire(timeout=0.2), time.monotonic() - since
                    if late > patience or (again and late > TWICE):
                        break
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        with _told("end it"):
            serve.delete(_NAME, _blocking=not left)  # what is cut off is not waited for
            if not left:
                serve.shutdown()  # type: ignore[no-untyped-call]  # or its proxy would stay on a cluster that goes on
        return not left
    finally:
        ray.shutdown()


def _drained(front: DeploymentHandle[Any], seconds: float) -> int:
    """Have every front replica take no new work. Returns how many requests they still have to answer."""
    told = front.broadcast("drain").results(timeout_s=seconds, return_exceptions=True)
    return sum(count for count in told if isinstance(count, int))  # one that has died is replaced, and told next time


@contextmanager
def _told(what: str) -> Generator[None]:
    """Ray's errors, some of them plain ones, as ours. Raises BackendError."""
    try:
        yield
    except Exception as error:
        raise BackendError(f"Ray could not {what}: {error}") from error
