"""Sessions: one graph opened on one backend, with named buffers that stay where the backend wants them.

This is what the runtime sees, whatever runs below.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dnp.engine.errors import SettingsError
from dnp.engine.manifest import GraphSpec

if TYPE_CHECKING:
    from dnp.engine.bundle import Bundle

Array = npt.NDArray[Any]
MAX_THREADS = 1024


@dataclass(frozen=True)
class BackendOptions:
    """How a backend should run. What is left ``None`` is the backend's own choice.

    Attributes:
        threads: threads to compute with; every physical core this process may use when ``None``.
        precision: the arithmetic, where a backend has a choice: ``f32`` or ``bf16`` on ``openvino``.
    """

    threads: int | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        threads = self.threads
        whole = isinstance(threads, int) and not isinstance(threads, bool)
        if threads is not None and not (whole and 1 <= threads <= MAX_THREADS):
            raise SettingsError(
                f"threads must be an integer from 1 to {MAX_THREADS}, not {threads!r}; leave it out for all cores"
            )


class Buffer(ABC):
    """A named tensor of a session, in the backend's own memory.

    The object stays the same while its session lives; ``shape`` follows ``Session.reshape``, after which the
    contents are unspecified until written or computed.
    """

    name: str
    dtype: np.dtype[Any]
    device: str
    """Where the memory is: ``cpu``, or a device with its number such as ``cuda:0``."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The present shape."""

    @abstractmethod
    def write(self, array: Array) -> None:
        """Copy an array of exactly this shape and dtype in; it may be changed or freed right afterwards.

        Raises SettingsError when shape or dtype differ.
        """

    @abstractmethod
    def read(self) -> Array:
        """A copy of the contents, the caller's own; waits for work that is still under way."""

    @abstractmethod
    def copy(self, other: Buffer) -> None:
        """Take over the contents of a buffer of the same shape and dtype, on the device where both are there.

        Raises SettingsError when shape or dtype differ.
        """

    def _check(self, shape: tuple[int, ...], dtype: np.dtype[Any], source: str) -> None:
        if shape != self.shape or dtype != self.dtype:
            raise SettingsError(
                f"{self.name!r} holds {self.dtype} {list(self.shape)}, but {source} {dtype} {list(shape)}"
            )


class Session(ABC):
    """One graph opened on one backend. Not for several threads at once.

    Attributes:
        graph: the graph, with the shapes its symbols appear in.
        backend: what really runs, asked of the library after opening: ``name (library version, details)``.
        inputs, outputs: the buffers by name.
    """

    graph: GraphSpec
    backend: str
    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]

    @abstractmethod
    def reshape(self, **dims: int) -> None:
        """Give every symbol of the graph a size. Memory is allocated only for what has never been as large.

        Raises SettingsError for unknown, missing or impossible sizes, and for memory that is not there; all
        buffers are then as they were.
        """

    @abstractmethod
    def run(self) -> None:
        """Compute the outputs from the inputs. On a device this may return before the work is done.

        Raises BackendError when the graph cannot be run.
        """

    @abstractmethod
    def link(self, name: str, buffer: Buffer) -> None:
        """Read another session's ``buffer`` in place: ``inputs[name]`` is that buffer from now on.

        Its shape is the other session's affair, and must be the one this session expects whenever it runs.

        Raises SettingsError when name or dtype do not fit, BackendError when this backend cannot read memory
        that lies where the buffer's does.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the graph and the buffers. Only ``close`` itself may be called afterwards."""

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Backend(ABC):
    """Where graphs run, and what the sessions opened there share: a device, its memory, its compiled plans.

    Attributes:
        name: as the user calls it.
        options: how it was told to run.
    """

    name: str
    options: BackendOptions

    @abstractmethod
    def session(self, graph: GraphSpec, bundle: Bundle | None = None) -> Session:
        """Open ``graph``; ``bundle`` is the one it belongs to, which backends with plans of their own need.

        Raises BackendError when it cannot run here, BundleError when its file is no graph that can be loaded.
        """

    def close(self) -> None:  # noqa: B027  most have nothing to free
        """Free what the sessions shared. They are closed before."""
