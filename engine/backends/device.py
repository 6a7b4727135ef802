"""What is in a GPU's memory: buffers, windows on them, and what the sessions there have in common."""

from __future__ import annotations

import ctypes
import logging
import math
import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from dnp.engine.backends.gpu import Gpu
from dnp.engine.backends.session import (
    Array,
    Backend,
    BackendOptions,
    Buffer,
    StoredBuffer,
    StoredSession,
    window_name,
)
from dnp.engine.bundle.contract import BATCH
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.errors import BackendError
from dnp.engine.system import cuda

_log = logging.getLogger("dnp.engine")


class DeviceMemory(Buffer):
    """A buffer in a device's memory. What crosses to or from the host goes through pinned memory.

    Only ``read`` waits.
    """

    gpu: Gpu

    @abstractmethod
    def _place(self) -> tuple[DeviceBuffer, int]:
        """The buffer that it lies in, and the byte of it where it begins."""

    @property
    def address(self) -> int:
        """Where it begins on the device; 0 for a buffer without memory: not reshaped yet, or closed."""
        buffer, start = self._place()
        return buffer.start + start

    @property
    def nbytes(self) -> int:
        """Bytes of the present shape."""
        return math.prod(self.shape) * self.dtype.itemsize

    def write(self, array: Array) -> None:
        """Start the copy and do not wait for it."""
        self._check(array.shape, array.dtype, "was given")
        self.gpu.cuda.activate()
        buffer, start = self._place()
        pinned = buffer.pinned(start, start + self.nbytes)
        np.copyto(self._on_host(pinned), array)
        self.gpu.cuda.to_device(self.address, pinned, self.nbytes, self.gpu.stream)
        buffer.sent(start, start + self.nbytes)

    def read(self) -> Array:
        if not self.address:
            return np.empty(self.shape, self.dtype)
        self.gpu.cuda.activate()
        buffer, start = self._place()
        pinned = buffer.pinned(start)
        self.gpu.cuda.to_host(pinned, self.address, self.nbytes, self.gpu.stream)
        self.gpu.cuda.synchronize(self.gpu.stream)
        contents: Array = self._on_host(pinned).copy()
        return contents

    def _on_host(self, pinned: int) -> Array:
        memory = (ctypes.c_uint8 * self.nbytes).from_address(pinned)
        array: Array = np.ctypeslib.as_array(memory).view(self.dtype).reshape(self.shape)
        return array

    def copy(self, other: Buffer) -> None:
        self._check(other.shape, other.dtype, f"{other.name!r} holds")
        self.gpu.cuda.activate()
        if isinstance(other, DeviceMemory) and other.gpu is self.gpu:  # another one of the same number has its stream
            self.gpu.cuda.on_device(self.address, other.address, self.nbytes, self.gpu.stream)
        else:
            self.write(other.read())

    def at(self, *index: int) -> DeviceMemory:
        return _DeviceWindow(self, index)


class DeviceBuffer(DeviceMemory, StoredBuffer):
    """A buffer on memory of its own, which ``start`` is the address of: it changes only when it grows.

    The pinned memory mirrors it byte by byte, so that parts of it can be on their way at the same time.
    """

    def __init__(self, name: str, dtype: str, gpu: Gpu, graph: str) -> None:
        self.name, self.dtype, self.location = name, np.dtype(dtype), gpu.name
        self.gpu, self._graph = gpu, graph
        self._shape: tuple[int, ...] = (0,)
        self._capacity, self.start = 0, 0
        self._pinned = 0
        self._copied: Any = None  # happens when the device has read all of `_unread`
        self._unread: list[tuple[int, int]] = []  # bytes of the pinned memory, first and end

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def _place(self) -> tuple[DeviceBuffer, int]:
        return self, 0

    def reserve(self, shape: tuple[int, ...]) -> None:
        """Make room for ``shape``, which loses the contents when there was too little; takes old and new for a moment.

        Raises BackendError, with the buffer as it was.
        """
        size = math.prod(shape) * self.dtype.itemsize
        if size > self._capacity:
            address = self.gpu.allocate(size, f"{self.name!r} {list(shape)} of {self._graph!r}")
            present = self._shape
            self.free()
            self.start, self._capacity, self._shape = address, size, present

    def shape_to(self, shape: tuple[int, ...]) -> None:
        assert math.prod(shape) * self.dtype.itemsize <= self._capacity
        self._shape = shape

    def clear(self) -> None:
        """Start filling it with zeros."""
        self.gpu.cuda.clear(self.start, self.nbytes, self.gpu.stream)

    def free(self) -> None:
        if self.start:
            self.gpu.free(self.start)
            self._capacity, self.start, self._shape = 0, 0, (0,)
        if self._pinned:
            self.gpu.cuda.free_host(self._pinned)
            self._pinned = 0
        if self._copied is not None:
            self.gpu.cuda.free_event(self._copied)
            self._copied = None
        self._unread.clear()

    def pinned(self, begin: int, end: int | None = None) -> int:
        """The address of the pinned memory for the bytes from ``begin`` on; those up to ``end`` may be written.

        Waits until the device has read what was written there before. What lies beside it is not waited for.
        """
        if not self._pinned:
            self._pinned = self.gpu.pin(max(self._capacity, 1), f"{self.name!r} of {self._graph!r}")
        if end is not None and any(max(begin, first) < min(end, last) for first, last in self._unread):
            self.gpu.cuda.wait(self._copied)
            self._unread.clear()
        return self._pinned + begin

    def sent(self, begin: int, end: int) -> None:
        """Note that the device was told to read these bytes of the pinned memory."""
        if self._copied is None:
            self._copied = self.gpu.cuda.event()
        self.gpu.cuda.record(self._copied, self.gpu.stream)
        self._unread.append((begin, end))


class _DeviceWindow(DeviceMemory):
    """A part of a buffer, found anew at each use, since the buffer may move."""

    def __init__(self, whole: DeviceMemory, index: tuple[int, ...]) -> None:
        self.name, self.dtype, self.location = window_name(whole, index), whole.dtype, whole.location
        self.gpu, self._whole, self._index = whole.gpu, whole, tuple(map(operator.index, index))
        whole._part(self._index)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._whole._part(self._index)

    def _place(self) -> tuple[DeviceBuffer, int]:
        buffer, start = self._whole._place()
        before = 0  # parts of this shape that lie before it
        for size, i in zip(self._whole.shape, self._index, strict=False):
            before = before * size + i
        return buffer, start + before * self.nbytes


class DeviceSession(StoredSession[DeviceBuffer]):
    """A session whose buffers are in a device's memory. A backend says how a run is started."""

    asynchronous = True

    def __init__(self, graph: GraphSpec, backend: DeviceBackend, software: str) -> None:
        self._backend, self._gpu, self._cuda = backend, backend.gpu, backend.gpu.cuda
        self._cuda.activate()
        found = backend.gpu.properties
        super().__init__(graph, f"{backend.name} ({software}, {found.name}, SM {found.sm}, {backend.gpu.name})")
        self._eager = backend.options.eager

    def _buffer(self, name: str, dtype: str) -> DeviceBuffer:
        return DeviceBuffer(name, dtype, self._gpu, self.graph.name)

    def _reach(self, buffer: Buffer) -> DeviceBuffer | None:
        return buffer if isinstance(buffer, DeviceBuffer) and buffer.gpu is self._gpu else None

    @abstractmethod
    def _capture(self) -> None:
        """Have the run at the present sizes captured, unless it is."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop what was captured: addresses or copies in it are no longer right."""

    def capture(self, **dims: int) -> None:
        super().capture(**dims)
        if self._eager:
            return
        self._cuda.activate()
        for buffer, _ in self._own(self._require_dims()):  # left from other sizes, it might be indices out of range
            buffer.clear()
        self._capture()

    def reshape(self, **dims: int) -> None:
        self._require_open()
        dims = self._checked(dims)
        self.limits.check(**dims)
        self._cuda.activate()
        shapes = self._own(dims)
        for buffer, shape in shapes:
            buffer.reserve(shape)
        for buffer, shape in shapes:
            buffer.shape_to(shape)
        self._dims = dims

    def alias(self, name: str, buffer: Buffer) -> None:
        super().alias(name, buffer)
        self._drop()

    def feed_back(self, into: str, output: str) -> None:
        before = dict(self._fed_back)
        super().feed_back(into, output)
        if self._fed_back != before:
            self._drop()

    def close(self) -> None:
        if self._closed:
            return
        if not self.forked:
            with suppress(BackendError):  # after an error that lasts, every call fails; what can be freed is
                self._drop()
        super().close()

    def _drop(self) -> None:
        """``_forget`` when the device is done with it."""
        self._cuda.activate()
        try:
            self._cuda.synchronize(self._gpu.stream)
        finally:
            self._forget()

    def _run_eagerly(self, reason: object) -> None:
        """Capture nothing in this session from now on; its backend says so once."""
        self._eager = True
        self._backend.warn_about("capture", f"{self._where}: runs without CUDA graphs from now on: {reason}")

    def _check_inputs(self, dims: Mapping[str, int]) -> None:
        """Raises SettingsError when an aliased buffer has another shape than this session is about to read."""
        for name in self._aliased:
            expected = self.graph.inputs[name].resolve(dims)
            if self._inputs[name].shape != expected:
                raise self._unlike(name, expected, self._inputs[name])

    def _start_feedback(self) -> None:
        for into, output in self._fed_back.items():
            target, source = self._inputs[into], self._outputs[output]
            self._cuda.on_device(target.address, source.address, source.nbytes, self._gpu.stream)


class DeviceBackend(Backend):
    """Sessions on one GPU, on one stream. Computes in what the graphs say: a precision cannot be chosen here.

    Attributes:
        remedy: what a user can do when the memory does not hold the buffers or the activations.
    """

    remedy: str

    def __init__(self, options: BackendOptions | None = None) -> None:
        super().__init__(options)
        if self.options.precision is not None:
            raise BackendError(
                f"the backend {self.name!r} computes in what the graph says, not in {self.options.precision!r}; export "
                "the model in the precision you want: dnp export --precision fp16"
            )
        self.module = self._load()
        number = self.options.device
        self.gpu = Gpu(cuda.open_cuda(number), number, self.options.memory_limit, self.remedy)
        self._warned: set[str] = set()

    @abstractmethod
    def _load(self) -> Any:
        """The library. Raises BackendError when it is not there."""

    @property
    def batches(self) -> Sequence[int]:
        """From the largest, so that what grows has grown before anything is captured."""
        return () if self.options.eager else range(BATCH, 0, -1)

    def warn_about(self, topic: str, message: str) -> None:
        """Log it unless something was about the same."""
        if topic not in self._warned:
            self._warned.add(topic)
            _log.warning("%s", message)

    def close(self) -> None:
        if not self.forked:
            self.gpu.close()
