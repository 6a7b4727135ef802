"""The calls of the CUDA runtime that this package makes, through NVIDIA's own bindings (``cuda-python``).

Every call whose error code is not 0 is a ``BackendError`` that names the call. Pointers are plain integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from dnp.engine.errors import BackendError
from dnp.engine.system.imports import load

OLDEST: Final = 75  # SM 7.5, Turing: CUDA 13, TensorRT from 10.5 on and TensorRT for RTX have no code for older GPUs
LEAST_DRIVER: Final = 13_000  # CUDA 13.0, as the driver tells it: what the libraries of this package are made for


class OutOfMemoryError(BackendError):
    """A device has not the memory that was asked for."""


@dataclass(frozen=True)
class GpuProperties:
    """A GPU: its name, its compute capability as ``89`` for SM 8.9, and its memory in bytes."""

    name: str
    sm: int
    memory: int

    def check_age(self) -> None:
        """Raises BackendError for a GPU that is too old to run anything here."""
        if self.sm < OLDEST:
            raise BackendError(
                f"{self.name} (SM {self.sm}) is too old: CUDA 13 and TensorRT need SM {OLDEST} or newer; use the "
                "backend 'cpu' or 'openvino'"
            )


class Cuda:
    """One device of the CUDA runtime. Streams, graphs and events are handles of the bindings, addresses integers."""

    def __init__(self, device: int = 0) -> None:
        self._rt = load(
            "cuda.bindings.runtime", package="cuda-python>=13", purpose="running on a GPU", has="cudaMalloc"
        )
        if not 0 <= device < 1 << 16:
            raise BackendError(_no_such_gpu(device))
        self._device = device
        self.activate()

    def activate(self) -> None:
        """Make the device this thread's own, as each thread has to that works with it.

        Whether it still is, is not remembered: other libraries in the process choose devices too.
        """
        self._call(self._rt.cudaSetDevice, self._device)

    def properties(self, device: int = 0) -> GpuProperties:
        """What the device is."""
        found = self._call(self._rt.cudaGetDeviceProperties, device)
        name = bytes(found.name).split(b"\0")[0].decode()
        return GpuProperties(name, found.major * 10 + found.minor, found.totalGlobalMem)

    def free_memory(self) -> int:
        """Bytes that are free on the device."""
        free, _ = self._call(self._rt.cudaMemGetInfo)
        return int(free)

    def malloc(self, size: int) -> int:
        """Device memory, aligned to 256 bytes. Raises OutOfMemoryError."""
        return int(self._call(self._rt.cudaMalloc, size))

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call(self._rt.cudaFree, address)

    def malloc_host(self, size: int) -> int:
        """Pinned host memory, which copies to and from the device without a detour."""
        return int(self._call(self._rt.cudaMallocHost, size))

    def free_host(self, address: int) -> None:
        """Give pinned memory back."""
        self._call(self._rt.cudaFreeHost, address)

    def to_device(self, device: int, host: int, size: int, stream: Any) -> None:
        """Start a copy from pinned memory."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._rt.cudaMemcpyAsync, device, host, size, kind, stream)

    def to_host(self, host: int, device: int, size: int, stream: Any) -> None:
        """Start a copy to pinned memory."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._rt.cudaMemcpyAsync, host, device, size, kind, stream)

    def on_device(self, into: int, source: int, size: int, stream: Any) -> None:
        """Start a copy within the device."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(self._rt.cudaMemcpyAsync, into, source, size, kind, stream)

    def clear(self, address: int, size: int, stream: Any) -> None:
        """Start filling device memory with zeros."""
        self._call(self._rt.cudaMemsetAsync, address, 0, size, stream)

    def stream(self) -> Any:
        """A stream that does not wait for the default one."""
        return self._call(self._rt.cudaStreamCreateWithFlags, self._rt.cudaStreamNonBlocking)

    def free_stream(self, stream: Any) -> None:
        """Destroy a stream."""
        self._call(self._rt.cudaStreamDestroy, stream)

    def synchronize(self, stream: Any) -> None:
        """Wait for all that was started on a stream; errors of that work are raised here."""
        self._call(self._rt.cudaStreamSynchronize, stream)

    def begin_capture(self, stream: Any) -> None:
        """From now on, what is started on the stream by this thread is captured and not done."""
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._rt.cudaStreamBeginCapture, stream, mode)

    def end_capture(self, stream: Any) -> Any:
        """What was captured, ready to launch. Raises BackendError when something in it cannot be captured."""
        graph = self._call(self._rt.cudaStreamEndCapture, stream)
        try:
            return self._call(self._rt.cudaGraphInstantiate, graph, 0)
        finally:
            self._call(self._rt.cudaGraphDestroy, graph)

    def launch(self, graph: Any, stream: Any) -> None:
        """Start all of a captured graph."""
        self._call(self._rt.cudaGraphLaunch, graph, stream)

    def free_graph(self, graph: Any) -> None:
        """Destroy a captured graph."""
        self._call(self._rt.cudaGraphExecDestroy, graph)

    def event(self) -> Any:
        """An event, for timing and for waiting."""
        return self._call(self._rt.cudaEventCreate)

    def record(self, event: Any, stream: Any) -> None:
        """The event happens when all that was started on the stream before is done."""
        self._call(self._rt.cudaEventRecord, event, stream)

    def wait(self, event: Any) -> None:
        """Wait for an event."""
        self._call(self._rt.cudaEventSynchronize, event)

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two events that have happened."""
        return float(self._call(self._rt.cudaEventElapsedTime, start, end)) / 1000

    def free_event(self, event: Any) -> None:
        """Destroy an event."""
        self._call(self._rt.cudaEventDestroy, event)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        error, *values = function(*arguments)
        if error == self._rt.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfMemoryError(f"{function.__name__} found no memory")
        if error in (
            self._rt.cudaError_t.cudaErrorInsufficientDriver,
            self._rt.cudaError_t.cudaErrorNoDevice,
            self._rt.cudaError_t.cudaErrorInvalidDevice,
        ):
            raise BackendError(self._no_device(error, arguments))
        if error != self._rt.cudaError_t.cudaSuccess:
            _, text = self._rt.cudaGetErrorString(error)
            raise BackendError(f"{function.__name__} failed: {text.decode()} ({error.name})")
        return values[0] if len(values) == 1 else tuple(values)

    def _no_device(self, error: Any, arguments: tuple[Any, ...]) -> str:
        if error == self._rt.cudaError_t.cudaErrorInvalidDevice:
            return _no_such_gpu(arguments[0] if arguments else "?")
        if error == self._rt.cudaError_t.cudaErrorNoDevice:
            return "there is no NVIDIA GPU here; use the backend 'cpu' or 'openvino'"
        _, version = self._rt.cudaDriverGetVersion()  # 0 without a driver
        if not version:
            found = "there is no NVIDIA driver here"
        else:
            found = f"the NVIDIA driver here is for CUDA {_cuda(version)}, which is too old"
        return f"{found}: install one for CUDA {_cuda(LEAST_DRIVER)} or newer, then `dnp doctor`"


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _no_such_gpu(number: object) -> str:
    return f"there is no GPU number {number} here; `nvidia-smi` lists them"


def open_cuda(device: int = 0) -> Cuda:
    """The CUDA runtime on a device. Raises BackendError when there is no driver or no such device."""
    return Cuda(device)
