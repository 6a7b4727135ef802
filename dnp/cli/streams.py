"""Stdout and stderr that may be closed, full, or read by nobody any more."""

from __future__ import annotations

import os
import sys


def make_usable() -> None:
    """Closed streams swallow what they are told; a name that the terminal's encoding lacks is shown escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123  for the life of the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def swallow(name: str) -> None:
    """Let nothing be written to the broken stream ``name`` at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), getattr(sys, name).fileno())


def complain(text: str) -> None:
    """Say it on stderr, where that is possible: what cannot be said does not change the exit code."""
    try:
        print(f"dnp: {text}", file=sys.stderr, flush=True)
    except OSError:
        swallow("stderr")
