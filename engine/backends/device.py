"""One GPU and what is in its memory: ``Device``, buffers, and what the sessions on it have in common."""

from __future__ import annotations

import ctypes
import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from dnp.engine.backends.session import Array, Backend, BackendOptions, Buffer, StoredBuffer, StoredSession
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.errors import BackendError
from dnp.engine.plans.profile import BATCH
from dnp.engine.system import cuda
from dnp.engine.system.cuda import Cuda, GpuProperties, OutOfMemoryError

_log = logging.getLogger("dnp.engine")


class Device:
    """A GPU for the sessions of one backend: one stream, one piece of scratch memory, one account of the bytes.

    ``memory_limit`` is in bytes; ``remedy`` is what a user can do who has too few of them. Raises BackendError for a
    GPU that is too old.

    Attributes:
        cuda: the calls.
        stream: where everything happens, in the order it was started.
        name: ``cuda:0``.
    """

    def __init__(self, cuda: Cuda, number: int = 0, memory_limit: int | None = None, remedy: str = "") -> None:
        self.cuda, self.name = cuda, f"cuda:{number}"
        self.properties: GpuProperties = cuda.properties(number)
        self.properties.check_age()
        self._limit, self._remedy = memory_limit, remedy
        self._sizes: dict[int, int] = {}
        self._held = 0  # bytes of weights, which the libraries allocate themselves
        self._streamable = 0  # bytes of weights that may stay on the host, and have no share of the memory yet
        self._scratch = (0, 0)  # address, size
        self._wanted = 0  # bytes of scratch memory that the most demanding graph takes
        self.stream: Any = cuda.stream()

    @property
    def allocated(self) -> int:
        """Bytes of device memory in use by buffers, scratch and weights."""
        return sum(self._sizes.values()) + self._held

    @property
    def left(self) -> int | None:
        """Bytes of the memory limit that are left; ``None`` where there is none."""
        return None if self._limit is None else max(0, self._limit - self.allocated)

    def allocate(self, size: int, what: str) -> int:
        """Device memory filled with zeros. Raises BackendError, with what would fit, when there is not enough."""
        self._check_limit(size, what, self._remedy)
        try:
            address = self.cuda.malloc(max(size, 1))
        except OutOfMemoryError as error:
            free = self.cuda.free_memory()
            raise BackendError(
                self._too_much(what, size, free, f"is free on {self.properties.name}", self._remedy)
            ) from error
        self._sizes[address] = size
        if size:
            self.cuda.clear(address, size, self.stream)
        return address

    def pin(self, size: int, what: str) -> int:
        """Pinned host memory. Raises BackendError when there is not enough."""
        try:
            return self.cuda.malloc_host(size)
        except OutOfMemoryError as error:
            raise BackendError(f"no pinned memory on the host for {what}: {size / 1e6:.1f} MB are wanted") from error

    def free(self, address: int) -> None:
        """Give back what ``allocate`` gave."""
        del self._sizes[address]
        self.cuda.free(address)

    def hold(self, size: int, what: str, remedy: str) -> None:
        """Count memory that a library is about to allocate. Raises BackendError when the limit does not allow it."""
        self._check_limit(size, what, remedy)
        self._held += size

    def release(self, size: int) -> None:
        """Count no longer what ``hold`` or ``share`` counted."""
        self._held -= size

    def want_share(self, size: int) -> None:
        """Say that a graph has so many bytes of weights that may stay on the host: less than 0 takes it back."""
        self._streamable += size

    def share(self, size: int) -> int:
        """How many of ``size`` bytes that ``want_share`` was told of may lie on the device, counted from now on.

        All that were announced by now get the same part of what is left, once there is room for the activations.
        """
        free = self.cuda.free_memory() * 7 // 8  # the rest is for recorded graphs, and for what is opened later
        room = max(0, (free if self.left is None else min(free, self.left)) - max(0, self._wanted - self._scratch[1]))
        given = min(size, room * size // max(self._streamable, 1))
        self._streamable -= size
        self._held += given
        return given

    def want_scratch(self, size: int) -> None:
        """Say that a graph will take so much scratch memory; the first that runs allocates it for all."""
        self._wanted = max(self._wanted, size)

    def scratch(self) -> int:
        """Memory for the activations of a graph while it runs, shared by all that run on the stream.

        It holds what was wanted so far. When a more demanding graph comes later, a larger piece is added for those
        who ask from then on: no address that a recorded graph holds ever changes. ``Pipeline.warm_up`` opens all
        graphs before the first one runs, so that there is one piece.
        """
        address, there = self._scratch
        if self._wanted > there:
            address = self.allocate(self._wanted, "the activations")
            self._scratch = (address, self._wanted)
        return address

    def close(self) -> None:
        """Free everything."""
        with suppress(BackendError):  # after an error that lasts, every call fails; what can be freed is
            self.cuda.activate()
            self.cuda.synchronize(self.stream)
        for address in [*self._sizes]:
            with suppress(BackendError):
                self.free(address)
        self._scratch = (0, 0)
        with suppress(BackendError):
            self.cuda.free_stream(self.stream)

    def _check_limit(self, size: int, what: str, remedy: str) -> None:
        if self.left is not None and size > self.left:
            raise BackendError(self._too_much(what, size, self.left, "of the memory limit is left", remedy))

    def _too_much(self, what: str, size: int, left: int, where: str, remedy: str) -> str:
        wanted, there = f"{size / 1e6:.1f} MB are wanted", f"{left / 1e6:.1f} MB {where}"
        return f"no memory on {self.name} for {what}: {wanted}, {there}; {remedy}"


class DeviceBuffer(StoredBuffer):
    """A buffer in a device's memory. Its address changes only when ``reserve`` makes it larger.

    What crosses to or from the host goes through pinned memory of its own. Only ``read`` waits.
    """

    def __init__(self, name: str, dtype: str, device: Device, graph: str) -> None:
        self.name, self.dtype, self.device = name, np.dtype(dtype), device.name
        self._device, self._graph = device, graph
        self._shape: tuple[int, ...] = (0,)
        self._capacity, self.address = 0, 0
        self._pinned = 0
        self._copied: Any = None  # happens when the device has read the pinned memory

    @property
    def shape(self) -> tuple[int, ...]:
        """The present shape; ``(0,)`` before the first reshape."""
        return self._shape

    def reserve(self, shape: tuple[int, ...]) -> None:
        """Make room for ``shape``, which loses the contents when there was too little; takes old and new for a moment.

        Raises BackendError, with the buffer as it was.
        """
        size = math.prod(shape) * self.dtype.itemsize
        if size > self._capacity:
            address = self._device.allocate(size, f"{self.name!r} {list(shape)} of {self._graph!r}")
            present = self._shape
            self.free()
            self.address, self._capacity, self._shape = address, size, present

    def shape_to(self, shape: tuple[int, ...]) -> None:
        """Take on a shape that ``reserve`` made room for."""
        assert math.prod(shape) * self.dtype.itemsize <= self._capacity
        self._shape = shape

    def on(self, device: Device) -> bool:
        """Whether it is this very device's: another one's, of the same number, has another stream."""
        return self._device is device

    @property
    def nbytes(self) -> int:
        """Bytes of the present shape."""
        return math.prod(self._shape) * self.dtype.itemsize

    def write(self, array: Array) -> None:
        """See ``Buffer.write``. Starts the copy and does not wait for it."""
        self._check(array.shape, array.dtype, "was given")
        self._device.cuda.activate()
        if self._copied is None:
            self._copied = self._device.cuda.event()
        else:
            self._device.cuda.wait(self._copied)  # it has long happened, unless the last write was just now
        np.copyto(self._host(), array)
        self._device.cuda.to_device(self.address, self._pinned, self.nbytes, self._device.stream)
        self._device.cuda.record(self._copied, self._device.stream)

    def read(self) -> Array:
        """See ``Buffer.read``."""
        if not self.address:  # never sized, or closed
            return np.empty(self._shape, self.dtype)
        self._device.cuda.activate()
        host = self._host()
        self._device.cuda.to_host(self._pinned, self.address, self.nbytes, self._device.stream)
        self._device.cuda.synchronize(self._device.stream)
        contents: Array = host.copy()
        return contents

    def copy(self, other: Buffer) -> None:
        """See ``Buffer.copy``."""
        self._check(other.shape, other.dtype, f"{other.name!r} holds")
        self._device.cuda.activate()
        if isinstance(other, DeviceBuffer) and other.on(self._device):
            self._device.cuda.on_device(self.address, other.address, self.nbytes, self._device.stream)
        else:
            self.write(other.read())

    def free(self) -> None:
        """Give the memory back."""
        if self.address:
            self._device.free(self.address)
            self._capacity, self.address, self._shape = 0, 0, (0,)
        if self._pinned:
            self._device.cuda.free_host(self._pinned)
            self._pinned = 0
        if self._copied is not None:
            self._device.cuda.free_event(self._copied)
            self._copied = None

    def _host(self) -> Array:
        if not self._pinned:
            self._pinned = self._device.pin(max(self._capacity, 1), f"{self.name!r} of {self._graph!r}")
        memory = (ctypes.c_uint8 * self.nbytes).from_address(self._pinned)
        array: Array = np.ctypeslib.as_array(memory).view(self.dtype).reshape(self._shape)
        return array


class DeviceSession(StoredSession[DeviceBuffer]):
    """A session whose buffers are in a device's memory. A backend says how a run is started."""

    def __init__(self, graph: GraphSpec, backend: DeviceBackend, software: str) -> None:
        self._backend, self._device, self._cuda = backend, backend.device, backend.device.cuda
        self._cuda.activate()
        gpu = backend.device.properties
        super().__init__(graph, f"{backend.name} ({software}, {gpu.name}, SM {gpu.sm}, {backend.device.name})")
        self._eager = backend.options.eager

    def _buffer(self, name: str, dtype: str) -> DeviceBuffer:
        return DeviceBuffer(name, dtype, self._device, self.graph.name)

    def _reach(self, buffer: Buffer) -> DeviceBuffer | None:
        return buffer if isinstance(buffer, DeviceBuffer) and buffer.on(self._device) else None

    @abstractmethod
    def _forget(self) -> None:
        """Drop what was recorded: addresses or copies in it are no longer right."""

    def reshape(self, **dims: int) -> None:
        """See ``Session.reshape``."""
        self._require_open()
        dims = self._checked(dims)
        self.validate(**dims)
        self._cuda.activate()
        shapes = self._own(dims)
        for buffer, shape in shapes:
            buffer.reserve(shape)
        for buffer, shape in shapes:
            buffer.shape_to(shape)
        self._dims = dims

    def alias(self, name: str, buffer: Buffer) -> None:
        """See ``Session.alias``."""
        super().alias(name, buffer)
        self._drop()

    def feed_back(self, into: str, output: str) -> None:
        """See ``Session.feed_back``."""
        before = dict(self._fed_back)
        super().feed_back(into, output)
        if self._fed_back != before:
            self._drop()

    def close(self) -> None:
        """See ``Session.close``."""
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
            self._cuda.synchronize(self._device.stream)
        finally:
            self._forget()

    def _run_eagerly(self, reason: object) -> None:
        """Record nothing in this session from now on; its backend says so once."""
        self._eager = True
        self._backend.warn_about("recording", f"{self._where}: runs without CUDA graphs from now on: {reason}")

    def _check_inputs(self, dims: Mapping[str, int]) -> None:
        """Raises SettingsError when an aliased buffer has another shape than this session is about to read."""
        for name in self._aliased:
            expected = self.graph.inputs[name].resolve(dims)
            if self._inputs[name].shape != expected:
                raise self._unlike(name, expected, self._inputs[name])

    def _start_feedback(self) -> None:
        for into, output in self._fed_back.items():
            target, source = self._inputs[into], self._outputs[output]
            self._cuda.on_device(target.address, source.address, source.nbytes, self._device.stream)


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
        self.device = Device(cuda.open_cuda(number), number, self.options.memory_limit, self.remedy)
        self._warned: set[str] = set()

    @abstractmethod
    def _load(self) -> Any:
        """The library. Raises BackendError when it is not there."""

    @property
    def batches(self) -> Sequence[int]:
        """See ``Backend.batches``. From the largest, so that what grows has grown before anything is recorded."""
        return () if self.options.eager else range(BATCH, 0, -1)

    def warn_about(self, topic: str, message: str) -> None:
        """Log it unless something was about the same."""
        if topic not in self._warned:
            self._warned.add(topic)
            _log.warning("%s", message)

    def close(self) -> None:
        """See ``Backend.close``."""
        if not self.forked:
            self.device.close()
