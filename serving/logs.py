"""What the server writes to stderr: a line for each event, as JSON or for people. Prompts only where asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Final

LOGGER: Final = logging.getLogger("dnp.serving")


def configure(form: str, level: str = "INFO") -> None:
    """Log to stderr: ``form`` is ``json`` or ``text``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    for logger in (LOGGER, logging.getLogger("uvicorn.error")):
        logger.handlers, logger.propagate = [handler], False
    LOGGER.setLevel(level)
    logging.getLogger("uvicorn.error").setLevel("WARNING")  # it says on its own what we say


def say(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """One event with its fields; those that are None are left out."""
    found = {name: value for name, value in fields.items() if value is not None}
    LOGGER.log(level, event, extra={"fields": found}, exc_info=error)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={_plain(value)}" for name, value in getattr(record, "fields", {}).items())
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()} {fields}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _plain(value: Any) -> str:
    """A value on one line, whatever a client put into it."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if text.isascii() and text.isprintable() and " " not in text else json.dumps(text)
