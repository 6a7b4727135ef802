"""From JSON to frozen dataclasses, strictly: what is missing, unknown or of another kind is a ``BundleError``."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from dnp.engine.errors import BundleError

REMEDY: Final = "export the model again"
Shape: TypeAlias = tuple[int | str, ...]
SHAPE_ENTRY: Final = re.compile(r"(?:([1-9]\d{0,8})\*)?([a-z_][a-z0-9_]*)", re.ASCII)
LARGEST: Final = 2**31 - 1  # of any integer in a manifest that is no number of bytes

Id: TypeAlias = Annotated[int, 0]  # the numbers are the smallest value allowed, and the largest, if not LARGEST
Size: TypeAlias = Annotated[int, 1]
Bytes: TypeAlias = Annotated[int, 0, 2**63 - 1]
T = TypeVar("T")


def record(kind: type[T], data: Any, where: str, ready: Mapping[str, Any] | None = None) -> T:
    """A dataclass from a JSON object that has its fields as keys, and no others.

    Fields may be text, truth values, numbers, ``Id``, ``Size``, ``Bytes``, ``Shape``, choices (``Literal``),
    dataclasses, or dicts of these, lists of text, of integers or of dataclasses, or an optional dataclass.
    ``where`` opens each message; the values in ``ready`` are used as they are. Raises BundleError.
    """
    ready = ready or {}
    declared = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    optional = {n for n, f in declared.items() if f.default is not MISSING or f.default_factory is not MISSING}
    same_names(as_object(data, where), declared, where, optional)
    hints = get_type_hints(kind, include_extras=True)
    values = {name: _value(hints[name], data[name], f"{where}: {name}") for name in data if name not in ready}
    return kind(**values, **ready)


def mapping(kind: type[T], data: Any, where: str) -> dict[str, T]:
    """A dict of dataclasses from a JSON object of objects. Raises BundleError."""
    return {key: _value(kind, entry, f"{where}.{key}") for key, entry in as_object(data, where).items()}


def as_object(data: Any, where: str) -> dict[str, Any]:
    """``data`` itself. Raises BundleError when it is no JSON object."""
    if not isinstance(data, dict):
        raise BundleError(f"{where}: must be an object, not {shown(data)}; {REMEDY}")
    return data


def same_names(found: Iterable[str], known: Iterable[str], where: str, optional: Collection[str] = ()) -> None:
    """Raises BundleError for the first name that is unknown, and then for the first that is missing."""
    found, known = list(found), list(known)
    for name in found:
        if name not in known:
            raise BundleError(f"{where}: unknown key {shown(name)}, {nearest(name, known)}; {REMEDY}")
    for name in known:
        if name not in found and name not in optional:
            raise BundleError(f"{where}: {name!r} is missing; {REMEDY}")


def nearest(word: str, known: Iterable[str]) -> str:
    """A clause for an unknown ``word``: the nearest known one, or all of them."""
    known = list(known)
    near = get_close_matches(word, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def shown(value: Any) -> str:
    """A value of any kind, short enough for a message."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**20:
        return "a huge integer"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return record(kind, value, where)
    if origin is dict:
        entries = as_object(value, where).items()
        return value if arguments[1] is Any else {k: _value(arguments[1], v, f"{where}.{k}") for k, v in entries}
    if origin in (Union, UnionType):  # an optional record: left out, never null
        return _value(arguments[0], value, where)
    if origin is tuple and isinstance(value, list) and is_dataclass(arguments[0]):
        return tuple(_value(arguments[0], entry, f"{where}[{number}]") for number, entry in enumerate(value))
    if origin is tuple and isinstance(value, list):
        fits = _is_text if arguments[0] is str else _is_entry
        if all(fits(entry) for entry in value):
            return tuple(value)
    if origin is list and isinstance(value, list) and all(_is_integer(entry) for entry in value):
        return value
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if origin is Annotated and _is_integer(value) and _within(value, *arguments[1:]):
        return value
    if kind is float and _is_number(value):
        return float(value)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    raise BundleError(f"{where}: must be {_wanted(kind)}, not {shown(value)}; {REMEDY}")


def _wanted(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple and arguments[0] is str:
        return "a list of names"
    if origin is tuple and is_dataclass(arguments[0]):
        return "a list of objects"
    if origin is list:
        return "a list of integers"
    if origin is tuple:
        return 'a shape such as ["batch", 4, "4*height"]'
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is Annotated:
        return f"an integer from {arguments[1]}"
    return {str: "text", bool: "true or false"}.get(kind, "a finite number")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _within(value: int, low: int, high: int = LARGEST) -> bool:
    return low <= value <= high


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_entry(entry: Any) -> bool:
    if isinstance(entry, str):
        return SHAPE_ENTRY.fullmatch(entry) is not None
    return _is_integer(entry) and 1 <= entry <= LARGEST
