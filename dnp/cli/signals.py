"""Ctrl-C and SIGTERM as the ``dnp`` command hears them: each is a KeyboardInterrupt, and none is lost."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_ORDERS: Final = (signal.SIGINT, signal.SIGTERM)
_TIMER: Final = getattr(signal, "SIGALRM", None)  # Windows has none
_SOON: Final = 0.001  # seconds: by then a callback that lost a KeyboardInterrupt has returned
_came: list[int] = []


def listen() -> None:
    """Raise a KeyboardInterrupt on either signal from now on, unless whoever started this process ignores it.

    Python drops exceptions in callbacks of weak references, its import locks among them, and in ``__del__``: a
    KeyboardInterrupt that ended there is raised again by a timer.
    """
    for number in _ORDERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    if _TIMER is not None:
        signal.signal(_TIMER, _interrupt)
        sys.unraisablehook = _dropped


def came() -> bool:
    """Whether there was a signal since ``listen``: code of others may have dropped the KeyboardInterrupt silently."""
    return bool(_came)


def ignore() -> None:
    """Let no signal change what the outcome is from now on."""
    for number in filter(None, (_TIMER, *_ORDERS)):
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but while one is being answered: what cleans up then must not be cut off."""
    _came.append(number)
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return
        error = error.__context__
    if frame is not None and frame.f_code is _dropped.__code__:  # where it would be dropped again
        _again()
        return
    raise KeyboardInterrupt


def _dropped(unraisable: UnraisableHookArgs) -> None:
    """Told by Python of an exception that cannot be raised where it came up."""
    if unraisable.exc_type is KeyboardInterrupt:
        _again()
    else:
        sys.__unraisablehook__(unraisable)


def _again() -> None:
    signal.setitimer(signal.ITIMER_REAL, _SOON)
