"""Importing what an extra installs, and saying which line installs or repairs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from dnp.engine.errors import BackendError
from dnp.engine.system.interrupts import uninterrupted

_OPENVINO_TELEMETRY: Final = "openvino_telemetry"


def load(module: str, *others: str, package: str, purpose: str, extra: str = "", has: str = "") -> Any:
    """Import ``module``, which is returned, and ``others``; they come with ``package``, which ``extra`` installs
    if there is one.

    ``has`` is a name that the module has unless it is the empty shell that stays when one of two packages that share it
    is uninstalled. Raises BackendError with the line that installs it for ``purpose``, or that repairs it.
    """
    repair = f"repair it: pip install --force-reinstall '{package}'"
    parts = module.split(".")
    own = {".".join(parts[: n + 1]) for n in range(len(parts))}
    try:
        with uninterrupted(), _no_telemetry():
            found = import_module(module)
            for other in others:
                import_module(other)
    except ModuleNotFoundError as error:
        if error.name in own or str(error.name).startswith(f"{parts[0]}_"):  # tensorrt_libs is a part of tensorrt
            raise missing_extra(package, extra, purpose) from error
        raise BackendError(f"{package} is installed but lacks {error.name}; {repair}") from error
    except Exception as error:  # whatever a broken installation may raise, loaders of shared libraries among them
        raise BackendError(f"{package} is installed but does not load ({error}); {repair}") from error
    if has and not hasattr(found, has):
        raise BackendError(f"{package} is installed but empty; {repair}")
    return found


@contextmanager
def _no_telemetry() -> Iterator[None]:
    """Let no import inside the block find OpenVINO's telemetry: openvino then takes the stub that it has for that.

    It sends an event when openvino is imported, and its only switch is a file in the home folder. The other libraries
    are switched off when ``dnp`` is imported.
    """
    before: ModuleType | None = sys.modules.get(_OPENVINO_TELEMETRY)
    sys.modules[_OPENVINO_TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_OPENVINO_TELEMETRY]
        if before is not None:
            sys.modules[_OPENVINO_TELEMETRY] = before


def missing_extra(package: str, extra: str, purpose: str) -> BackendError:
    """The error for an optional dependency that is not installed, with the line that installs it."""
    line = install_line(extra) if extra else f"pip install '{package}'"
    return BackendError(f"{purpose} needs {package}, which is not installed: {line}")


def install_line(extra: str) -> str:
    """What installs an extra. The packages of `cpu` and `gpu` share their files, so the other one goes first."""
    other = {"gpu": "onnxruntime", "cpu": "onnxruntime-gpu"}.get(extra)
    line = f"pip install 'dnp-engine[{extra}]'"
    return f"pip uninstall --yes {other}; then {line}" if other and installed(other) else line


def installed(package: str) -> str:
    """The package and its version, as ``onnxruntime 1.32.0``; empty when it is not there."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def place(package: str) -> Path | None:
    """The folder on the path that a package is installed in; None when it is not there."""
    try:
        return Path(str(distribution(package).locate_file(""))).resolve()
    except PackageNotFoundError:
        return None
