"""The errors a user can meet. Each message names the value that was wrong and the remedy.

    DnpError                 1   anything of ours that fits nowhere below
    ├── SettingsError        2   a setting or prompt that cannot be honoured
    ├── BundleError          3   a bundle that is missing, damaged, edited or too new
    ├── BackendError         4   a backend that cannot run here
    ├── ExportError          5   a model that cannot be exported, or whose export is not faithful
    ├── OutputError          6   a file or folder that cannot be written
    ├── Busy                 1   a queue that is full
    │   └── Draining         1   a queue that takes nothing more
    ├── DeadlineExceeded     1   a request that was not done in its time
    └── Cancelled          130   the user (Ctrl-C) or a callback stopped the work

The number is the exit code of the ``dnp`` command.
"""

from __future__ import annotations


class DnpError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class SettingsError(DnpError, ValueError):
    """A setting, prompt or image that cannot be honoured."""

    exit_code = 2


class BundleError(DnpError):
    """A bundle that is missing, truncated, edited, or of a newer schema."""

    exit_code = 3


class BackendError(DnpError):
    """A backend that is unknown, not installed, or cannot run on this machine."""

    exit_code = 4


class ExportError(DnpError):
    """A source model that cannot be exported, or an export that differs from PyTorch."""

    exit_code = 5


class OutputError(DnpError, OSError):
    """A place that results cannot be written to."""

    exit_code = 6


class Busy(DnpError):  # noqa: N818  an outcome, not a fault
    """The queue is full; what was asked for was not begun.

    Attributes:
        retry_after: seconds after which there is likely to be room.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[Busy], tuple[str, float]]:
        return type(self), (str(self), self.retry_after)


class Draining(Busy):
    """Nothing more is taken, since the engine is about to end; what was taken before is finished."""


class DeadlineExceeded(DnpError):  # noqa: N818  an outcome, not a fault
    """A request was not finished by its deadline; it was ended there."""


class Cancelled(DnpError):  # noqa: N818  an outcome, not a fault
    """The work was stopped by the user or by a callback; nothing is half-written."""

    exit_code = 130
