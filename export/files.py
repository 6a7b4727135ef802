"""What a file is that should hold weights or settings, told by its first bytes."""

from __future__ import annotations

from pathlib import Path

from dnp.engine.errors import ExportError

_POINTER = b"version https://git-lfs.github.com/spec/"


def check_content(path: Path) -> None:
    """Raises ExportError when ``path`` is the pointer that a clone without Git LFS leaves, or cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    if start == _POINTER:
        raise ExportError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in the clone that it is from"
        )
