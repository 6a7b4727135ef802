"""How a server behaves, apart from the models that it serves."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dnp.engine.errors import SettingsError

KEYS_VARIABLE: Final = "DNP_API_KEYS"
ALIASES: Final = ("gpt-image-1", "dall-e-2", "dall-e-3")  # names that clients have built in
_LEAST_KEY: Final = 8  # characters


@dataclass(frozen=True)
class ServerSettings:
    """What ``create_app`` is told.

    Attributes:
        keys: whoever knows one may ask; nobody is asked for one when there are none.
        origins: web origins whose pages may call; ``*`` is every one.
        aliases: names that mean the default model.
        most_images: of one request.
        most_active: requests for work that are read or answered at once, those that wait in an engine's queue included.
        body_limit: bytes of a request.
        body_seconds: by then a request has to be there.
        deadline: seconds after which a request is given up, if it names no shorter time.
        drain_seconds: what work in flight is given when the server is told to stop.
        stall_seconds: an engine that has not moved for so long is not healthy.
        keep_alive: seconds between two comments in a stream that has nothing to say.
        writer_seconds: a client that takes nothing for so long is given up.
        sdapi: whether the paths of AUTOMATIC1111's API are served, too.
        log_prompts: whether the log may hold what was asked for.
    """

    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ALIASES
    most_images: int = 10
    most_active: int = 256
    body_limit: int = 16_000_000
    body_seconds: float = 30.0
    deadline: float = 600.0
    drain_seconds: float = 120.0
    stall_seconds: float = 300.0
    keep_alive: float = 15.0
    writer_seconds: float = 60.0
    sdapi: bool = False
    log_prompts: bool = False


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The API keys in ``file`` and in the environment variable ``DNP_API_KEYS``, apart by white space or lines.

    Raises SettingsError for a file that cannot be read or holds none, and for a key that is no plain word of 8
    characters or more.
    """
    words = os.environ.get(KEYS_VARIABLE, "").split()
    if file is not None:
        try:
            found = file.read_text(encoding="utf-8").split()
        except (OSError, ValueError) as error:
            raise SettingsError(f"the keys in {str(file)!r} cannot be read: {error}; name a text file") from error
        if not found:
            raise SettingsError(f"{str(file)!r} holds no API key; write one a line, or leave the option out")
        words += found
    for word in words:
        if len(word) < _LEAST_KEY or not word.isascii() or not word.isprintable():
            raise SettingsError(
                f"an API key of {len(word)} characters, beginning with {word[:2]!r}, cannot be used; take {_LEAST_KEY} "
                "or more letters, digits and signs of ASCII"
            )
    return tuple(dict.fromkeys(words))
