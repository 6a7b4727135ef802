"""What the backends that compute in ordinary memory have in common: ``HostBuffer`` and ``HostSession``."""

from __future__ import annotations

import math
import operator
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dnp.engine.backends.session import Array, Buffer, StoredBuffer, StoredSession, window_name
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.schema import REMEDY
from dnp.engine.bundle.tensors import TensorSpec
from dnp.engine.errors import BackendError, BundleError, SettingsError

_ALIGNMENT: Final = 64  # bytes: a cache line, and the widest vector
# ONNX Runtime begins with a code, at times twice, and a place in its own source.
_ORT_PLACES: Final = re.compile(r".*\[ONNXRuntimeError\] : \d+ : \w+ : (?:\S+\.cc:\d+ \w+ )?")


class HostMemory(Buffer):
    """A buffer in ordinary memory: all of it is in ``view``."""

    location = "cpu"

    @property
    @abstractmethod
    def view(self) -> Array:
        """The contents, in place."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    def write(self, array: Array) -> None:
        self._check(array.shape, array.dtype, "was given")
        np.copyto(self.view, array)

    def read(self) -> Array:
        contents: Array = self.view.copy()
        return contents

    def copy(self, other: Buffer) -> None:
        self._check(other.shape, other.dtype, f"{other.name!r} holds")
        np.copyto(self.view, other.view if isinstance(other, HostMemory) else other.read())

    def at(self, *index: int) -> HostMemory:
        return _HostWindow(self, index)


class _HostWindow(HostMemory):
    """A part of a buffer, found anew at each use, since the buffer may move."""

    def __init__(self, whole: HostMemory, index: tuple[int, ...]) -> None:
        self.name, self.dtype = window_name(whole, index), whole.dtype
        self._whole, self._index = whole, tuple(map(operator.index, index))
        whole._part(self._index)

    @property
    def view(self) -> Array:
        self._whole._part(self._index)
        index: Any = (*self._index, ...)  # a view also where it is one number
        part: Array = self._whole.view[index]
        return part


class HostBuffer(HostMemory, StoredBuffer):
    """A buffer on a store that only ever grows, of which ``view`` is the front part.

    Its shape is ``(0,)`` before the first reshape.
    """

    def __init__(self, name: str, dtype: str) -> None:
        self.name, self.dtype = name, np.dtype(dtype)
        self._store: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._view: Array = np.zeros(0, self.dtype)

    @property
    def view(self) -> Array:
        return self._view

    def reserve(self, shape: tuple[int, ...]) -> None:
        """Make room for ``shape`` and leave ``view`` alone. Raises MemoryError or ValueError when impossible."""
        size = math.prod(shape) * self.dtype.itemsize
        if size > self._store.nbytes:
            whole = np.zeros(size + _ALIGNMENT, np.uint8)
            start = -whole.ctypes.data % _ALIGNMENT
            self._store = whole[start : start + size]

    def shape_to(self, shape: tuple[int, ...]) -> None:
        """Take on a shape that ``reserve`` made room for; the old ``view`` is no longer the buffer."""
        size = math.prod(shape) * self.dtype.itemsize
        self._view = self._store[:size].view(self.dtype).reshape(shape)

    def free(self) -> None:
        self._store, self._view = np.zeros(0, np.uint8), np.zeros(0, self.dtype)


class HostSession(StoredSession[HostBuffer]):
    """A session on a library that computes in ordinary memory, on the buffers it is told to use.

    A backend says how to bind one array to one name, and how to run; everything else is here. What is bound
    is compared with the buffers at every run, so an aliased buffer may grow or move without telling its readers.
    """

    def __init__(self, graph: GraphSpec, backend: str) -> None:
        super().__init__(graph, backend)
        self._bound: dict[str, Array] = {}

    def _buffer(self, name: str, dtype: str) -> HostBuffer:
        return HostBuffer(name, dtype)

    def _reach(self, buffer: Buffer) -> HostBuffer | None:
        return buffer if isinstance(buffer, HostBuffer) else None

    @abstractmethod
    def _bind(self, name: str, array: Array, is_input: bool) -> None:
        """Tell the library to read or write ``array``; it is kept alive until it is replaced."""

    @abstractmethod
    def _execute(self) -> None:
        """Run the graph on what is bound. Raises any exception, also for an output of another shape."""

    def reshape(self, **dims: int) -> None:
        self._require_open()
        dims = self._checked(dims)
        if dims == self._dims:
            return
        shapes = self._own(dims)
        try:
            for buffer, shape in shapes:
                buffer.reserve(shape)
        except (MemoryError, ValueError, OverflowError) as error:
            raise SettingsError(
                f"{self._where}: no memory for {buffer.name!r} of {list(shape)}; ask for less"
            ) from error
        for buffer, shape in shapes:
            buffer.shape_to(shape)
        self._dims = dims
        self._bound.clear()

    def run(self) -> None:
        dims = self._require_dims()
        self._bind_all(self._inputs, self.graph.inputs, dims, is_input=True)
        self._bind_all(self._outputs, self.graph.outputs, dims, is_input=False)
        try:
            self._execute()
        except Exception as error:
            raise BackendError(f"{self._where} failed on {self.backend} with {dims}: {first_line(error)}") from error
        for into, output in self._fed_back.items():
            np.copyto(self._inputs[into].view, self._outputs[output].view)

    def close(self) -> None:
        super().close()
        self._bound.clear()

    def _bind_all(
        self,
        buffers: Mapping[str, HostBuffer],
        specs: Mapping[str, TensorSpec],
        dims: Mapping[str, int],
        *,
        is_input: bool,
    ) -> None:
        for name, buffer in buffers.items():
            view = buffer.view
            if self._bound.get(name) is view:
                continue
            expected = specs[name].resolve(dims)
            if view.shape != expected:
                raise self._unlike(name, expected, buffer)
            self._bind(name, view, is_input)
            self._bound[name] = view


def check_signature(graph: GraphSpec, found: Mapping[str, Mapping[str, tuple[str, tuple[Any, ...]]]]) -> None:
    """Hold the inputs and outputs that a library found in the file against the manifest's.

    ``found["inputs"][name]`` is a numpy dtype name and a shape, in which only the integers are compared.

    Raises BundleError when a name, a dtype, a rank or a fixed size differs.
    """
    for side, specs in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        for name in {**specs, **found[side]}:
            spec, tensor = specs.get(name), found[side].get(name)
            if spec is None or tensor is None or spec.dtype != tensor[0] or not _fits(spec.shape, tensor[1]):
                declared = f"{spec.dtype} {list(spec.shape)}" if spec else "absent"
                actual = f"{tensor[0]} {list(tensor[1])}" if tensor else "absent"
                raise BundleError(
                    f"{graph.path}: {side}.{name} is {actual} in the file, {declared} in the manifest; {REMEDY}"
                )


def _fits(declared: tuple[int | str, ...], actual: tuple[Any, ...]) -> bool:
    return len(declared) == len(actual) and all(
        a == d for d, a in zip(declared, actual, strict=True) if isinstance(a, int)
    )


def first_line(error: BaseException) -> str:
    """The line of a library's error that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OpenVINO begins with places in its own source; what happened comes after them.
    told = [line for line in lines if not line.startswith("Exception from ")] or lines
    return _ORT_PLACES.sub("", told[0]) if told else type(error).__name__
