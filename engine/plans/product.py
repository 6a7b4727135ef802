"""TensorRT comes as two products with one API: what differs between them, as a value.

``tensorrt`` compiles on the GPU that it will run on, data-centre cards included. ``tensorrt-rtx`` compiles for any of
its architectures on any machine, a GPU or not, and finishes the kernels on the user's card.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from dnp.engine.bundle.schema import nearest
from dnp.engine.errors import BackendError
from dnp.engine.system.cuda import GpuProperties
from dnp.engine.system.imports import load


@dataclass(frozen=True)
class Product:
    """One of the two products.

    Attributes:
        name: of the backend, and of the extra that installs it.
        package: what it is installed from.
        module: what is imported.
        title: as people call it.
        portable: whether it compiles for other architectures than the present GPU's; then the driver finishes the
            kernels at first use and keeps them in a runtime cache. Otherwise a timing cache speeds up builds.
        architectures: those it compiles for, as ``89`` for SM 8.9; empty for whatever GPU is there.
    """

    name: str
    package: str
    module: str
    title: str
    portable: bool
    architectures: tuple[int, ...]

    def load(self) -> Any:
        """The module. Raises BackendError with the line that installs it, or that repairs it."""
        purpose = f"the backend {self.name!r}"
        return load(self.module, package=self.package, extra=self.name, purpose=purpose, has="Builder")

    def check_gpu(self, gpu: GpuProperties) -> None:
        """Raises BackendError for a GPU that is none of the architectures, wherever a plan was compiled."""
        if self.architectures and gpu.sm not in self.architectures:
            raise BackendError(
                f"{gpu.name} (SM {gpu.sm}) is none of those that {self.title} compiles for and runs on; it knows "
                f"{', '.join(map(str, self.architectures))}; use the backend 'cuda' or 'tensorrt' on this card"
            )


TENSORRT: Final = Product("tensorrt", "tensorrt", "tensorrt", "TensorRT", portable=False, architectures=())
TENSORRT_RTX: Final = Product(
    "tensorrt-rtx",
    "tensorrt-rtx-cu13",
    "tensorrt_rtx",
    "TensorRT for RTX",
    portable=True,
    architectures=(75, 80, 86, 89, 120, 121),
)
PRODUCTS: Final = {product.name: product for product in (TENSORRT, TENSORRT_RTX)}


def product_of(name: str) -> Product:
    """The product called ``name``. Raises BackendError when there is none."""
    if name == "cpu":
        raise BackendError("plans of the backend 'cpu' are made by dnp.engine.build_cpu_plans, which takes no sizes")
    if name not in PRODUCTS:
        raise BackendError(f"{name!r} compiles no plans, {nearest(name, ('cpu', *PRODUCTS))}")
    return PRODUCTS[name]


@cache
def logger(module: Any) -> Any:
    """The one logger of a TensorRT module: it keeps the first that it is given, and ignores any other."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.listeners: dict[int, list[tuple[int, str]]] = {}  # the lines that each thread collects
            self.lock = threading.RLock()  # what is freed meanwhile may log too

        def log(self, severity: Any, message: str) -> None:
            if severity == module.ILogger.Severity.VERBOSE:
                return
            with self.lock:
                mine = self.listeners.get(threading.get_ident())
                # Threads of TensorRT's own do not say for whom they work: everyone who listens is told.
                for lines in [mine] if mine is not None else self.listeners.values():
                    lines.append((int(severity), message))

    return Logger()


class Log:
    """What TensorRT says during a block: severities from 0 (internal error) by 1 (error), 2 (warning) to 3 (info)."""

    def __init__(self, lines: list[tuple[int, str]]) -> None:
        self._lines = lines

    def errors(self) -> str:
        """The errors, in one line; what to say when TensorRT returns None or False."""
        said = [
            message.strip().splitlines()[0] for severity, message in self._lines if severity <= 1 and message.strip()
        ]
        return "; ".join(said) or "it gave no reason"

    def messages(self) -> Iterator[str]:
        """Everything but the verbose messages."""
        return (message for _, message in self._lines)


@contextmanager
def listening(module: Any) -> Iterator[Log]:
    """Collect what TensorRT says inside the block: in this thread, and in threads that do not listen themselves."""
    into, thread = logger(module), threading.get_ident()
    lines: list[tuple[int, str]] = []
    with into.lock:
        before, into.listeners[thread] = into.listeners.get(thread), lines
    try:
        yield Log(lines)
    finally:
        with into.lock:
            if before is None:
                del into.listeners[thread]
            else:
                into.listeners[thread] = before
