"""The shape and dtype of a graph's input or output, in integers and symbols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dnp.engine.bundle.schema import SHAPE_ENTRY, Shape
from dnp.engine.errors import SettingsError


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph. A shape entry is an integer, ``"batch"`` or ``"4*height"``."""

    shape: Shape
    dtype: Literal["float32", "float16", "int64", "uint8"] = "float32"

    def resolve(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in integers. Raises SettingsError when a symbol has no value in ``dims``."""
        return tuple(entry if isinstance(entry, int) else _evaluate(entry, dims) for entry in self.shape)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols of the shape, in order, each once."""
        return tuple(dict.fromkeys(_split(e)[1] for e in self.shape if isinstance(e, str)))

    def to_dict(self) -> dict[str, Any]:
        """The tensor as ``bundle.json`` holds it."""
        return {"shape": list(self.shape), "dtype": self.dtype}


def _split(entry: str) -> tuple[int, str]:
    match = SHAPE_ENTRY.fullmatch(entry)
    if match is None:
        raise SettingsError(f"{entry!r} is no shape entry; write an integer, 'symbol' or '4*symbol'")
    return int(match[1] or 1), match[2]


def _evaluate(entry: str, dims: Mapping[str, int]) -> int:
    factor, symbol = _split(entry)
    if symbol not in dims:
        raise SettingsError(f"the size {symbol!r} is not given, which the shape entry {entry!r} needs")
    return factor * dims[symbol]
