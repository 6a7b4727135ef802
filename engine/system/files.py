"""Writing to disk so that nothing is left half-done: files that belong together, and folders made for them."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from dnp.engine.errors import OutputError
from dnp.engine.system.interrupts import uninterrupted

_POINTER: Final = b"version https://git-lfs.github.com/spec/"
TEMPORARY: Final = ".dnp."  # how the names begin that files have until they are complete; then follows their own


def write_together(files: Mapping[Path, Any]) -> None:
    """Write every file, bytes or any buffer, or, whatever goes wrong and also on Ctrl-C, none of them.

    All are complete under temporary names before the first is renamed, in the order given. A Ctrl-C amid the renames is
    answered after them. Raises OutputError.
    """
    ready: dict[Path, Path] = {}
    path = Path()
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)  # another process may have tidied it away
            refuse_folder(path)
            prefix = f"{TEMPORARY}{path.name[:40]}."
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, delete=False) as file:
                temporary = Path(file.name)
                ready[temporary] = path
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
        with uninterrupted():
            for temporary, path in list(ready.items()):
                temporary.replace(path)
                del ready[temporary]
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; name another folder") from error
    finally:
        for temporary in ready:
            temporary.unlink(missing_ok=True)


def refuse_folder(path: Path) -> None:
    """Raises IsADirectoryError when a folder is where a file shall be, and OSError when nothing can be there."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Inside the block ``path`` is a folder; those made for a block that fails are taken away. Raises OSError."""
    made: list[Path] = []
    try:
        made += [folder for folder in (path, *path.parents) if not folder.exists()]  # innermost first
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what a clone without Git LFS leaves in the place of a large one. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
