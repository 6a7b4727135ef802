"""Sessions: one graph opened on one backend, with named buffers that stay where the backend wants them.

This is what the runtime sees, whatever runs below.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.schema import nearest
from dnp.engine.errors import BackendError, SettingsError
from dnp.engine.plans.limits import Limits
from dnp.engine.system.forks import OfOneProcess

if TYPE_CHECKING:
    from dnp.engine.bundle.bundle import Bundle

Array = npt.NDArray[Any]
MAX_THREADS = 1024


@dataclass(frozen=True)
class BackendOptions:
    """How a backend should run. What is left ``None`` is the backend's own choice.

    Attributes:
        threads: threads to compute with; every physical core this process may use when ``None``.
        precision: the arithmetic, where a backend has a choice: ``f32`` or ``bf16`` on ``openvino``.
        device: the number of the GPU, where a backend runs on one.
        eager: run without captured CUDA graphs, the same code otherwise.
        memory_limit: bytes of device memory for buffers, activations and weights; on ``cuda`` the activations are
            counted for each graph by itself.
        plans: where compiled plans are kept; the bundle's own ``plans/`` when ``None``.
    """

    threads: int | None = None
    precision: str | None = None
    device: int = 0
    eager: bool = False
    memory_limit: int | None = None
    plans: Path | None = None

    def __post_init__(self) -> None:
        threads = self.threads
        whole = isinstance(threads, int) and not isinstance(threads, bool)
        if threads is not None and not (whole and 1 <= threads <= MAX_THREADS):
            raise SettingsError(
                f"threads must be an integer from 1 to {MAX_THREADS}, not {threads!r}; leave it out for all cores"
            )
        for name, value, low in (("device", self.device, 0), ("memory_limit", self.memory_limit, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise SettingsError(f"{name} must be a whole number from {low}, not {value!r}")


class Buffer(ABC):
    """A named tensor of a session, in the backend's own memory.

    The object stays the same while its session lives; ``shape`` follows ``Session.reshape``. A buffer
    that keeps its shape keeps its contents; those of the others are unspecified until written or computed.
    """

    name: str
    dtype: np.dtype[Any]
    location: str
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

    @abstractmethod
    def at(self, *index: int) -> Buffer:
        """The part at these leading indices, as a buffer: ``state.at(3)`` is place 3 of ``[places, 4, C, h, w]``.

        It is a window on the same memory, so its neighbours stay as they are. It follows the buffer that it is of, and
        cannot be aliased.

        Raises SettingsError for an index that the present shape lacks, now or when the window is used.
        """

    def _part(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is at these leading indices. Raises SettingsError when there is nothing."""
        shape = self.shape
        if len(index) > len(shape) or not all(0 <= i < size for i, size in zip(index, shape, strict=False)):
            raise SettingsError(
                f"{self.name!r} {list(shape)} has nothing at {list(index)}; indices count from 0, in each dimension"
            )
        return shape[len(index) :]

    def _check(self, shape: tuple[int, ...], dtype: np.dtype[Any], source: str) -> None:
        if shape != self.shape or dtype != self.dtype:
            raise SettingsError(
                f"{self.name!r} holds {self.dtype} {list(self.shape)}, but {source} {dtype} {list(shape)}"
            )


def window_name(whole: Buffer, index: tuple[int, ...]) -> str:
    """What a window is called in messages: ``state[3]``."""
    return f"{whole.name}[{', '.join(map(str, index))}]"


class Session(OfOneProcess, ABC):
    """One graph opened on one backend. Not for several threads at once, nor for a forked child.

    Attributes:
        graph: the graph, with the shapes its symbols appear in.
        backend: what really runs, asked of the library after opening: ``name (library version, details)``.
        inputs, outputs: the buffers by name.
        limits: the sizes that it runs at, and those to fill up to.
        asynchronous: whether ``run`` returns before the work is done, so that reading an output waits for a device.
        owned: the backend that is closed with this session, where nobody else holds it.
    """

    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]
    limits: Limits = Limits()
    asynchronous: bool = False
    owned: Backend | None = None

    def __init__(self, graph: GraphSpec, backend: str) -> None:
        super().__init__()
        self.graph, self.backend = graph, backend
        self._aliased: set[str] = set()
        self._fed_back: dict[str, str] = {}  # output by input
        self._dims: dict[str, int] | None = None
        self._closed = False

    @abstractmethod
    def reshape(self, **dims: int) -> None:
        """Give every symbol of the graph a size. Memory is allocated only for what has never been as large.

        Raises SettingsError for unknown, missing or impossible sizes, and for memory that is not there, on a device
        BackendError; all shapes are then as they were.
        """

    @abstractmethod
    def run(self) -> None:
        """Compute the outputs from the inputs. On a device this may return before the work is done.

        Raises BackendError when the graph cannot be run.
        """

    @abstractmethod
    def alias(self, name: str, buffer: Buffer) -> None:
        """Read another session's ``buffer`` in place: ``inputs[name]`` is that buffer from now on.

        Its shape is the other session's affair, and must be the one this session expects whenever it runs.

        Raises SettingsError when name or dtype do not fit, BackendError when this backend cannot read memory
        that lies where the buffer's does.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the graph and the buffers, in a forked child nothing. Only ``close`` may be called afterwards."""

    def feed_back(self, into: str, output: str) -> None:
        """From now on each run ends with ``inputs[into]`` taking over ``outputs[output]``, where they lie.

        What a loop carries from run to run is part of the run, so a device needs nothing from the host in between.

        Raises SettingsError when the names, shapes or dtypes do not fit, or when the input is aliased.
        """
        self._require_open()
        for name, side, specs in ((into, "input", self.graph.inputs), (output, "output", self.graph.outputs)):
            if name not in specs:
                raise SettingsError(f"{self._where}: no {side} {name!r} to feed back, {nearest(name, specs)}")
        to, source = self.graph.inputs[into], self.graph.outputs[output]
        if to != source:
            raise SettingsError(
                f"{self._where}: {output!r} is {source.to_dict()}, and cannot be fed back into {into!r}, {to.to_dict()}"
            )
        if into in self._aliased:
            raise SettingsError(f"{self._where}: input {into!r} is aliased, nothing can be fed back into it")
        self._fed_back[into] = output

    @property
    def captured(self) -> Sequence[Mapping[str, int]]:
        """The sets of sizes at which a run is one launch: those of ``capture``, where it could be done."""
        return ()

    def capture(self, **dims: int) -> None:
        """Take on these sizes and run once, so that later runs at them are one launch; in ordinary memory none is.

        For warm-up, never while serving: it may take long. What the buffers hold is unspecified afterwards. A buffer
        that moves later undoes it, so the largest sizes come first.

        Raises what ``reshape`` and ``run`` raise.
        """
        self.reshape(**dims)

    def check_refit(self) -> None:
        """Raises BackendError when the weights cannot be exchanged."""
        raise BackendError(
            f"{self._where}: {self.backend} cannot exchange weights; open a pipeline on the bundle with the other ones"
        )

    def refit(self, path: Path) -> None:
        """Take all weights of another ONNX file of the same structure, and keep nothing of the present ones.

        Raises BackendError as ``check_refit``, and when the file does not fit, which ends the session.
        """
        self.check_refit()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _where(self) -> str:
        return f"graph {self.graph.name!r}"

    def _checked(self, dims: Mapping[str, Any]) -> dict[str, int]:
        """Sizes of every symbol, as plain integers. Raises SettingsError for unknown, missing or impossible ones."""
        for name, size in dims.items():
            if name not in self.graph.symbols:
                raise SettingsError(f"{self._where}: unknown size {name!r}, {nearest(name, self.graph.symbols)}")
            if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
                raise SettingsError(f"{self._where}: {name} must be an integer from 1, not {size!r}")
        if missing := [name for name in self.graph.symbols if name not in dims]:
            raise SettingsError(f"{self._where}: no size given for {', '.join(missing)}")
        return {name: int(dims[name]) for name in self.graph.symbols}

    def _check_alias(self, name: str, buffer: Buffer, *, reachable: bool) -> None:
        """Raises what ``alias`` raises."""
        if name not in self.graph.inputs:
            raise SettingsError(f"{self._where}: no input {name!r} to alias, {nearest(name, self.graph.inputs)}")
        if not reachable:
            raise BackendError(
                f"{self._where}: {buffer.name!r} lies on {buffer.location} and cannot be read in place here; "
                "copy it instead"
            )
        if any(buffer is output for output in self.outputs.values()):
            raise SettingsError(
                f"{self._where}: input {name!r} cannot be its own output {buffer.name!r}; copy it instead"
            )
        wanted = np.dtype(self.graph.inputs[name].dtype)
        if buffer.dtype != wanted:
            raise SettingsError(f"{self._where}: input {name!r} is {wanted}, {buffer.name!r} holds {buffer.dtype}")
        if name in self._fed_back:
            raise SettingsError(
                f"{self._where}: input {name!r} takes over {self._fed_back[name]!r}, and cannot be aliased"
            )

    def _unlike(self, name: str, expected: tuple[int, ...], buffer: Buffer) -> SettingsError:
        return SettingsError(
            f"{self._where}: input {name!r} must be {list(expected)} for {self._dims}, but "
            f"the aliased {buffer.name!r} is {list(buffer.shape)}; give both sessions the same sizes"
        )

    def _require_open(self) -> None:
        if self._closed:
            raise BackendError(f"the session of {self._where} is closed; open another")
        self.require_own_process(f"the session of {self._where}")

    def _require_dims(self) -> dict[str, int]:
        self._require_open()
        if self._dims is None:
            raise SettingsError(f"{self._where} has no sizes yet; call reshape first")
        return self._dims


class StoredBuffer(Buffer):
    """A buffer on a store of its own, which only ever grows: what ``StoredSession`` asks of it."""

    @abstractmethod
    def reserve(self, shape: tuple[int, ...]) -> None:
        """Make room for ``shape``. Raises an error of the backend's when there is none."""

    @abstractmethod
    def shape_to(self, shape: tuple[int, ...]) -> None:
        """Take on a shape that ``reserve`` made room for."""

    @abstractmethod
    def free(self) -> None:
        """Give the memory back."""


B = TypeVar("B", bound=StoredBuffer)


class StoredSession(Session, Generic[B]):
    """A session with a buffer of its own for every input and output, but for the inputs that are aliased."""

    def __init__(self, graph: GraphSpec, backend: str) -> None:
        super().__init__(graph, backend)
        self._inputs = {name: self._buffer(name, spec.dtype) for name, spec in graph.inputs.items()}
        self._outputs = {name: self._buffer(name, spec.dtype) for name, spec in graph.outputs.items()}
        self.inputs = MappingProxyType(self._inputs)
        self.outputs = MappingProxyType(self._outputs)

    @abstractmethod
    def _buffer(self, name: str, dtype: str) -> B:
        """A new buffer, without memory."""

    @abstractmethod
    def _reach(self, buffer: Buffer) -> B | None:
        """Another session's buffer as one that can be read in place; ``None`` when it lies out of reach."""

    @abstractmethod
    def _release(self) -> None:
        """Drop what the library holds."""

    def alias(self, name: str, buffer: Buffer) -> None:
        self._require_open()
        reached = self._reach(buffer)
        self._check_alias(name, buffer, reachable=reached is not None)
        assert reached is not None
        if name not in self._aliased:
            self._inputs[name].free()
            self._aliased.add(name)
        self._inputs[name] = reached

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self.forked:
            return
        with ExitStack() as ending:  # whatever fails, the rest is done too
            if self.owned is not None:
                ending.callback(self.owned.close)
            ending.callback(self._free_buffers)
            ending.callback(self._release)

    def _own(self, dims: Mapping[str, int]) -> list[tuple[B, tuple[int, ...]]]:
        """The buffers that are not another session's, and their shapes at these sizes."""
        inputs = [(self._inputs[n], spec) for n, spec in self.graph.inputs.items() if n not in self._aliased]
        outputs = [(self._outputs[n], spec) for n, spec in self.graph.outputs.items()]
        return [(buffer, spec.resolve(dims)) for buffer, spec in [*inputs, *outputs]]

    def _free_buffers(self) -> None:
        for name, buffer in [*self._inputs.items(), *self._outputs.items()]:
            if name not in self._aliased:
                with suppress(BackendError):  # after a device's error that lasts; what can be freed is
                    buffer.free()


class Backend(OfOneProcess, ABC):
    """Where graphs run, and what the sessions opened there share: a device, its memory, its compiled plans.

    Attributes:
        name: as the user calls it.
        options: how it was told to run.
    """

    name: str

    def __init__(self, options: BackendOptions | None = None) -> None:
        super().__init__()
        self.options = options or BackendOptions()

    @property
    def batches(self) -> Sequence[int]:
        """The batch sizes to capture sessions at when warming up; none where nothing is captured."""
        return ()

    @abstractmethod
    def session(self, graph: GraphSpec, bundle: Bundle | None = None) -> Session:
        """Open ``graph``; ``bundle`` is the one it belongs to, which backends with plans of their own need.

        Raises BackendError when it cannot run here, BundleError when its file is no graph that can be loaded.
        """

    def close(self) -> None:  # most have nothing to free
        """Free what the sessions shared. They are closed before."""
