"""What goes wrong, as the API says it: a status and OpenAI's object, ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from math import ceil
from typing import Any, Final

from fastapi.exceptions import HTTPException
from pydantic import BaseModel, Field

from dnp.engine.bundle.schema import shown
from dnp.engine.errors import Busy, Cancelled, DeadlineExceeded, DnpError, Draining, SettingsError

_TYPES: Final = {401: "authentication_error", 429: "rate_limit_error"}
_NO_RETRY: Final = {"x-should-retry": "false"}  # the official clients repeat 408, 409, 429 and 5xx by themselves
AGAIN: Final = 5.0  # seconds until a server that is starting or stopping may be asked again


class ErrorBody(BaseModel):
    """What is inside ``error``."""

    message: str = Field(description="What was wrong, with which value, and what to do.")
    type: str = Field(description="The kind of error.")
    param: str | None = Field(description="The field of the request that it is about.")
    code: str = Field(description="A name for programs.")


class ErrorAnswer(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorBody


class ApiError(HTTPException):
    """An error with all that its answer says."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.param = code, param

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


def starting() -> ApiError:
    """The answer to work that comes before the models are warm."""
    return ApiError(
        503, "starting", "the server is warming up; ask again soon, or wait for /readyz", headers=_after(AGAIN)
    )


def client_gone() -> ApiError:
    """What the log says of a request whose client went away; nobody hears it."""
    return ApiError(499, "client_closed_request", "the client went away, and its request was cancelled")


def api_error(error: Exception, param: str | None = None) -> ApiError:
    """What an exception of the engine's is to a client; one that is not meant for users says nothing of itself."""
    match error:
        case ApiError():
            return error
        case SettingsError():
            return ApiError(400, "invalid_value", str(error), param)
        case Draining():
            return ApiError(503, "draining", str(error), headers=_after(error.retry_after))
        case Busy():
            return ApiError(429, "queue_full", str(error), headers=_after(error.retry_after))
        case DeadlineExceeded():
            return ApiError(408, "deadline_exceeded", str(error), headers=_NO_RETRY)
        case Cancelled():
            return ApiError(409, "cancelled", str(error), headers=_NO_RETRY)
        case DnpError():
            return ApiError(422, "cannot_be_made", str(error), headers=_NO_RETRY)
    return ApiError(500, "internal_error", "the server failed at this request; its log says how, by the x-request-id")


def _after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, ceil(seconds)))}


_NUMBERS: Final = {"greater_than_equal": "ge", "less_than_equal": "le", "greater_than": "gt", "less_than": "lt"}
_LIMITS: Final = {*_NUMBERS, "too_long", "too_short", "string_too_long", "finite_number"}
_SIDES: Final = {"ge": "at least", "le": "at most", "gt": "more than", "lt": "less than"}
_KINDS: Final = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "float_type": "a number",
    "string_type": "text",
    "string_pattern_mismatch": "WIDTHxHEIGHT in pixels, or auto",  # of all texts the size alone has a pattern
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "finite_number": "a finite number",
}


def invalid(errors: Sequence[Mapping[str, Any]], known: Sequence[str]) -> ApiError:
    """The first of pydantic's ``errors`` as a sentence; ``known`` are the fields that there are."""
    first = max(errors, key=lambda error: error["type"] in _LIMITS)  # of a union, the one of the kind that was meant
    kind, value = first["type"], first.get("input")
    words = [part for part in first["loc"][1:] if part in known]
    if kind == "extra_forbidden":
        name = str(first["loc"][-1])
        near = get_close_matches(name[:64], known, 1)  # which takes seconds for megabytes
        hint = f"did you mean {near[0]!r}?" if near else "leave it out; /openapi.json lists the fields"
        return ApiError(400, "unknown_field", f"there is no field {shown(name)}; {hint}", name[:64])
    param = words[0] if words else None
    subject = param or "the body"
    if kind == "missing":
        missing = str(first["loc"][-1])
        return ApiError(400, "missing_field", f"{missing} is missing; say it", missing)
    context = first.get("ctx", {})
    if kind == "value_error":
        return ApiError(400, "invalid_value", str(context["error"]), param)
    if kind in _NUMBERS:
        side = _NUMBERS[kind]
        wanted = f"{_SIDES[side]} {context[side]}"
    elif kind in ("string_too_long", "too_long"):
        what = "characters" if kind == "string_too_long" else "entries"
        return ApiError(
            400, "invalid_value", f"{subject} has more than {context['max_length']} {what}; shorten it", param
        )
    elif kind in ("string_too_short", "too_short"):
        return ApiError(400, "invalid_value", f"{subject} is empty; say something, or leave it out", param)
    elif kind == "literal_error":
        wanted = f"one of {context['expected']}"
    else:
        others = sorted({_KINDS.get(e["type"], "") for e in errors if tuple(e["loc"][:2]) == tuple(first["loc"][:2])})
        wanted = " or ".join(filter(None, others)) or first["msg"].removeprefix("String should ")
    return ApiError(400, "invalid_value", f"{subject} must be {wanted}, not {shown(value)}", param)
