"""What schedules and samplers ask of a setting, whichever of them it is for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TypeGuard

from dnp.engine.errors import SettingsError


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """SettingsError unless ``value`` is one of ``known``; the message names the nearest and all of them."""
    if value in known:
        return
    near = get_close_matches(str(value).lower(), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise SettingsError(f"{name} {value!r} is unknown; {hint}known: {', '.join(known)}")


def check_train_timesteps(count: object) -> None:
    """SettingsError unless a model can have been trained with so many timesteps."""
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= 100_000:
        raise SettingsError(f"train_timesteps is {count!r}; give a whole number from 2 to 100000")


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
