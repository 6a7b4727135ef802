"""Reading the body of a request: JSON as its standard has it, of a bearable size, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine
from math import isfinite
from typing import Any, Final

import anyio
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from dnp.serving.errors import ApiError, client_gone

_DEPTH: Final = 16  # of lists and objects inside each other
_DIGITS: Final = 40  # of an integer: more than any setting can have
_FIELDS: Final = 1000  # of an object: more than any program sends
_COMMAS: Final = 100_000  # in a body, those in texts included: what bounds the values that are looked at one by one


class JsonRequest(Request):
    """A request whose body is JSON; ``app.state.settings`` holds the limits."""

    async def body(self) -> bytes:
        """The bytes. Raises ApiError when they are no JSON by their content type, too many, too slow, or missing."""
        if not hasattr(self, "_body"):
            media = self.headers.get("content-type", "").partition(";")[0].strip().lower()
            if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
                raise ApiError(
                    415,
                    "unsupported_media_type",
                    f"the body is sent as {media[:60] or 'nothing in particular'!r}; send JSON, with the header "
                    "Content-Type: application/json",
                )
            self._body = await read(self)
            if not self._body.strip():
                raise ApiError(400, "missing_body", "the body is empty; send a JSON object")
        return self._body

    async def json(self) -> Any:
        """What the body says. Raises ApiError for what is no JSON, or says the same thing twice."""
        return parse(await self.body())


class JsonRoute(APIRoute):
    """A route that gets a ``JsonRequest``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler, on another kind of request."""
        handle: Callable[[Request], Awaitable[Response]] = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


async def read(request: Request) -> bytes:
    """The whole body. Raises ApiError when it is too large, or does not arrive in time or at all."""
    settings = request.app.state.settings
    too_large = ApiError(
        413,
        "body_too_large",
        f"the body is larger than {settings.body_limit / 1e6:g} MB, the limit of this server; send less",
    )
    try:
        if int(request.headers.get("content-length", 0)) > settings.body_limit:
            raise too_large
    except ValueError:
        raise ApiError(
            400, "invalid_header", "the header Content-Length is no number; leave it to the client"
        ) from None
    parts, size = [], 0
    try:
        with anyio.fail_after(settings.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > settings.body_limit:
                    raise too_large
                parts.append(part)
    except ClientDisconnect:
        raise client_gone() from None
    except TimeoutError:
        raise ApiError(
            408, "body_too_slow", f"the body did not arrive within {settings.body_seconds:g} s; send it at once"
        ) from None
    return b"".join(parts)


def parse(data: bytes) -> Any:
    """JSON of RFC 8259 in UTF-8, of bearable size and depth, its numbers finite. Raises ApiError for anything else.

    The event loop stands still meanwhile, for everybody, so what would take long is refused before it is looked at.
    """
    if data.count(b",") > _COMMAS:
        raise ApiError(400, "invalid_json", f"the body has more than {_COMMAS} values; send what is asked for alone")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, "invalid_json", f"the body is no UTF-8 at byte {error.start}; send UTF-8") from None
    try:
        found = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse, parse_int=_integer, parse_float=_number
        )
    except json.JSONDecodeError as error:
        raise ApiError(
            400, "invalid_json", f"the body is no JSON at character {error.pos} (line {error.lineno}): {error.msg}"
        ) from None
    except RecursionError:
        raise _too_deep() from None
    _check(found, _DEPTH)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _FIELDS:
        raise ApiError(400, "invalid_json", f"an object of the body has more than {_FIELDS} fields; send fewer")
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError(400, "duplicate_field", f"the body says {twice[:60]!r} twice; say it once", None)
    return found


def _refuse(word: str) -> Any:
    raise ApiError(400, "invalid_json", f"the body holds {word}, which is no number of JSON; send a finite one")


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ApiError(400, "invalid_json", f"the body holds an integer of {len(digits)} digits; send a smaller one")
    return int(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if not isfinite(number):
        raise ApiError(400, "invalid_json", f"the body holds {digits[:20]}, which is beyond what a number can be")
    return number


def _too_deep() -> ApiError:
    return ApiError(400, "invalid_json", f"the body nests lists and objects more than {_DEPTH} deep; send it flat")


def _check(value: Any, depth: int) -> None:
    """Raises ApiError for nesting beyond ``depth`` and for text that is no Unicode."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ApiError(
                400,
                "invalid_unicode",
                f"the body holds half of a surrogate pair, \\u{ord(value[error.start]):04x}, so it is no text",
            ) from None
        if "\0" in value:
            raise ApiError(400, "invalid_unicode", "the body holds a NUL character in a text; leave it out")
    elif isinstance(value, dict | list):
        if depth == 0:
            raise _too_deep()
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            _check(inner, depth - 1)
