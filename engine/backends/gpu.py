"""One GPU: its stream, its scratch memory, and an account of its bytes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from dnp.engine.errors import BackendError
from dnp.engine.system.cuda import Cuda, GpuProperties, OutOfMemoryError


class Gpu:
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
        free = self.cuda.free_memory() * 7 // 8  # the rest is for captured graphs, and for what is opened later
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
        who ask from then on: no address that a captured graph holds ever changes. ``Pipeline.warm_up`` opens all
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
