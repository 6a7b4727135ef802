"""The application: ``/v1``, what orchestrators ask for, and the page."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from dnp.engine.errors import DnpError
from dnp.runtime.result import MADE_WITH
from dnp.serving import sdapi, v1
from dnp.serving.engines import Engine, Engines
from dnp.serving.errors import AGAIN, ApiError, api_error, invalid
from dnp.serving.gate import Gate
from dnp.serving.service import Service
from dnp.serving.settings import ServerSettings

_STATIC: Final = Path(__file__).parent / "static"
_PAGE_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_MEDIA: Final = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def create_app(engines: Sequence[Engine], settings: ServerSettings | None = None) -> FastAPI:
    """An ASGI application that serves ``engines``, the first by default; its ``state.service`` is the ``Service``."""
    settings = settings or ServerSettings()
    service = Service(Engines(engines, settings.aliases), settings, time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.encoder.close()

    app = FastAPI(
        title="dnp",
        summary="Images by diffusion-negative prompting",
        version=version("dnp-engine"),
        docs_url=None,  # FastAPI's pages load their scripts from a CDN
        redoc_url=None,
        lifespan=lifespan,
        **_no_telemetry(),
    )
    app.state.service, app.state.settings = service, settings
    app.include_router(v1.router(service))
    app.include_router(v1.edits(service))
    if settings.sdapi:
        app.include_router(sdapi.router(service))
    _add_health(app, service)
    _add_errors(app)

    _add_page(app)
    app.add_middleware(Gate, service=service)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _no_telemetry() -> dict[str, Any]:
    """Newer FastAPIs trace and send by themselves where the environment says so; older ones know no such thing."""
    try:
        import fastapi.telemetry  # noqa: F401
    except ImportError:
        return {}
    off = ("tracing", "metrics", "logs", "operation_spans", "auto_configure")
    return {"telemetry": dict.fromkeys(off, False)}


def _add_health(app: FastAPI, service: Service) -> None:
    engines, settings = service.engines, service.settings

    @app.get("/healthz", responses={503: {"description": "An engine no longer moves."}})
    async def healthz() -> JSONResponse:
        """Whether the engines move. 200 also while the server warms up or stops."""
        idle = {engine.name: round(engine.status.idle, 3) for engine in engines if engine.ready}
        stalled = [name for name, seconds in idle.items() if seconds > settings.stall_seconds]
        return JSONResponse(
            {"status": "stalled" if stalled else "ok", "stalled": stalled, "seconds_since_tick": idle},
            503 if stalled else 200,
        )

    @app.get("/readyz", responses={503: {"description": "The server is warming up, or stopping."}})
    async def readyz() -> JSONResponse:
        """Whether work is taken, and what will really do it."""
        status = "ready" if service.ready else "draining" if service.draining else "warming"
        models = {engine.name: {name: engine.card[name] for name in MADE_WITH} for engine in engines if engine.ready}
        headers = None if service.ready else {"Retry-After": f"{AGAIN:g}"}
        return JSONResponse({"status": status, "models": models}, 200 if service.ready else 503, headers)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    def answer(request: Request, error: ApiError) -> JSONResponse:
        request.state.log["cause"] = error.code
        return JSONResponse(error.body, error.status_code, error.headers)

    @app.exception_handler(DnpError)
    async def of_engine(request: Request, error: DnpError) -> JSONResponse:
        return answer(request, api_error(error))

    @app.exception_handler(RequestValidationError)
    async def of_body(request: Request, error: RequestValidationError) -> JSONResponse:
        body = request.scope["route"].body_field.field_info.annotation
        return answer(request, invalid(error.errors(), list(body.model_fields)))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, ApiError):
            error = _not_here(request, error)
        return answer(request, error)


def _not_here(request: Request, error: HTTPException) -> ApiError:
    """Starlette's own errors, as ours."""
    path = request.url.path[:100]
    if error.status_code == 404:
        return ApiError(404, "not_found", f"there is nothing at {path}; /openapi.json lists what there is")
    if error.status_code == 405:
        message = f"{path} does not take {request.method}; /openapi.json lists what it takes"
        return ApiError(405, "method_not_allowed", message, headers=error.headers)
    return ApiError(error.status_code, "bad_request", str(error.detail), headers=error.headers)


def _add_page(app: FastAPI) -> None:
    """The files of the page, all of them beside each other, with the headers that keep the page to them."""
    files = {file.name: file for file in sorted(_STATIC.glob("*")) if file.is_file()}

    @app.get("/", include_in_schema=False)
    @app.get("/{name}", include_in_schema=False)
    async def page(name: str = "index.html") -> FileResponse:
        if name not in files:
            raise HTTPException(404)
        kind = _MEDIA.get(files[name].suffix)  # the system's own table may say anything
        return FileResponse(files[name], media_type=kind, headers=_PAGE_HEADERS)
