"""What the server writes to stderr: a line for each event, as JSON or for people. Prompts only where asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any, Final

LOGGER: Final = logging.getLogger("dnp.serving")


def configure(form: str, *, prompts: bool = False) -> None:
    """Log to stderr: ``form`` is ``json`` or ``text``. Messages of exceptions, which may hold what was asked for, only
    with ``prompts``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((Json if form == "json" else Text)(prompts))
    for logger in (LOGGER, logging.getLogger("dnp.runtime"), logging.getLogger("uvicorn.error")):
        logger.handlers, logger.propagate = [handler], False
    LOGGER.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of whatever anybody may send


def say(event: str, *, level: int = logging.INFO, failure: BaseException | None = None, **fields: Any) -> None:
    """One event with its fields, and what failed; those that are None are left out."""
    found = {name: value for name, value in fields.items() if value is not None}
    LOGGER.log(level, event, extra={"fields": found}, exc_info=failure)


class _Lines(logging.Formatter):
    """A line for each record, whatever is in it."""

    def __init__(self, prompts: bool = False) -> None:
        super().__init__()
        self._prompts = prompts

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """What the record tells besides its event."""
        found = dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            found["error"] = repr(error) if self._prompts else type(error).__name__
            found["at"] = "".join(traceback.format_tb(error.__traceback__))
        return found


class Json(_Lines):
    """For machines."""

    def format(self, record: logging.LogRecord) -> str:
        """One object."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **self.fields(record),
        }
        return json.dumps(line, ensure_ascii=True, default=str)


class Text(_Lines):
    """For people."""

    def format(self, record: logging.LogRecord) -> str:
        """The time, the event, its fields."""
        fields = " ".join(f"{name}={_plain(value)}" for name, value in self.fields(record).items())
        return f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()} {fields}".rstrip()


def _plain(value: Any) -> str:
    """A value on one line, whatever a client put into it."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if text.isascii() and text.isprintable() and " " not in text else json.dumps(text)
