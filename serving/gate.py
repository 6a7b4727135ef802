"""What every request passes: its id, the key, the count, the log line, and an answer whatever happens.

Pure ASGI: Starlette's function middleware would hide from the handlers that a client has gone.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import secrets
import time
from typing import Any, Final

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dnp.engine.errors import Draining
from dnp.serving.errors import AGAIN, ApiError, api_error
from dnp.serving.logs import say
from dnp.serving.service import Service

_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_LOCKED: Final = ("/v1/", "/sdapi/")  # paths that need a key, where keys are asked for


class Gate:
    """Middleware around the whole application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._keys = [key.encode() for key in service.settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of the application's."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, service = time.perf_counter(), self._service
        if scope["method"] == "HEAD":  # what GET says, of which the server sends the head alone
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        number = headers.get("x-request-id", "")
        state = scope.setdefault("state", {})
        state["id"] = number if _ID.fullmatch(number) else secrets.token_hex(12)
        state["log"] = {}
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = state["id"]
            await send(message)

        work = scope["method"] == "POST"
        service.active += work
        service.metrics.in_flight.inc()
        failure: Exception | None = None
        try:
            if scope["method"] == "OPTIONS":  # of clients that ask whether anybody is there
                await Response(status_code=204)(scope, receive, answer)
            else:
                state["caller"] = self._caller(scope, headers)
                if work and service.active > service.settings.most_active:  # before their bodies fill the memory
                    message = f"{service.active - 1} requests are being read or answered, and no more may; try again"
                    raise ApiError(429, "too_many_requests", message, headers={"Retry-After": "1"})
                await self._app(scope, receive, answer)
        except asyncio.CancelledError:  # the client is gone, or the server ends
            state["log"].setdefault("cause", "stopped" if service.draining else "client_closed_request")
            if service.draining and not status:
                stopped = api_error(Draining("the server was stopped before this was done; ask another one", AGAIN))
                await JSONResponse(stopped.body, stopped.status_code, stopped.headers)(scope, receive, answer)
            raise
        except Exception as error:
            answered = api_error(error)
            if answered.status_code >= 500:
                failure = error
            state["log"]["cause"] = answered.code
            if not status:  # what was begun cannot be mended: uvicorn closes the connection
                await JSONResponse(answered.body, answered.status_code, answered.headers)(scope, receive, answer)
        finally:
            service.active -= work
            service.metrics.in_flight.dec()
            self._tell(scope, status, time.perf_counter() - started, failure)

    def _caller(self, scope: Scope, headers: Headers) -> str:
        """Who asks: by the key, or by the address where no keys are asked for. Raises ApiError without a right key."""
        host = scope["client"][0] if scope.get("client") else ""
        if not self._keys or not scope["path"].startswith(_LOCKED):
            return f"host {host}"
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":  # of which the password is the key
            try:
                given = base64.b64decode(given).decode().rpartition(":")[2]
            except ValueError:
                given = ""
        found = [key for key in self._keys if hmac.compare_digest(key, given.strip().encode())]  # looks at all of them
        if found:
            return f"key {hashlib.sha256(found[0]).hexdigest()}"
        raise ApiError(
            401,
            "invalid_api_key",
            "this server asks for an API key, and the request has none that it knows; send Authorization: Bearer KEY",
            headers={"WWW-Authenticate": "Bearer" if scope["path"].startswith("/v1/") else 'Basic realm="dnp"'},
        )

    def _tell(self, scope: Scope, status: int, seconds: float, failure: Exception | None) -> None:
        service, state = self._service, scope["state"]
        endpoint = getattr(scope.get("route"), "path", "") or "other"
        service.metrics.requests.labels(endpoint, str(status)).inc()
        service.metrics.http_seconds.labels(endpoint).observe(seconds)
        fields: dict[str, Any] = {
            "id": state["id"],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
            **state["log"],
        }
        if cause := fields.get("cause"):
            service.metrics.failures.labels(cause).inc()
        quiet = scope["path"] in ("/healthz", "/readyz", "/metrics") and status < 400
        level = logging.DEBUG if quiet else logging.ERROR if failure else logging.INFO
        say("request", level=level, failure=failure, **fields)
