"""Backends by name: ``open_session`` opens a graph on one, ``doctor`` tries each of them for real."""

from __future__ import annotations

import base64
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final

import numpy as np

from dnp.engine.backends.session import Backend, BackendOptions, Session
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.schema import nearest
from dnp.engine.bundle.tensors import TensorSpec
from dnp.engine.errors import BackendError, SettingsError
from dnp.engine.system.imports import install_line, installed, place
from dnp.engine.system.processor import core_count, processor_name


@dataclass(frozen=True)
class _Kind:
    home: str  # the module with the class, imported when it is opened
    backend: str
    package: str
    extra: str
    precisions: tuple[str, ...] = ()  # to choose from; the first is the one in use when none is asked for
    on_gpu: bool = False


_BACKENDS: Final = {
    "cpu": _Kind("onnxruntime.cpu", "CpuBackend", "onnxruntime", "cpu", ("f32",)),
    "openvino": _Kind("openvino", "OpenVinoBackend", "openvino", "openvino", ("f32", "bf16")),
    "cuda": _Kind("onnxruntime.cuda", "CudaBackend", "onnxruntime-gpu", "gpu", on_gpu=True),
    "tensorrt": _Kind("tensorrt", "TensorRtBackend", "tensorrt", "tensorrt", on_gpu=True),
    "tensorrt-rtx": _Kind("tensorrt", "TensorRtRtxBackend", "tensorrt-rtx-cu13", "tensorrt-rtx", on_gpu=True),
}


_RUNTIMES: Final = ("onnxruntime", "onnxruntime-gpu")  # which share a name to import


def backend_names() -> tuple[str, ...]:
    """The backends of this version, installed or not."""
    return tuple(_BACKENDS)


def open_backend(name: str = "cpu", options: BackendOptions | None = None) -> Backend:
    """The backend called ``name``.

    Raises BackendError when it is unknown, not installed, or cannot run here, SettingsError for options of a GPU where
    it runs on none.
    """
    if not isinstance(name, str) or name not in _BACKENDS:
        of_extra = [backend for backend, kind in _BACKENDS.items() if kind.extra == name]
        hint = f"did you mean {of_extra[0]!r}?" if of_extra else nearest(str(name), _BACKENDS)
        raise BackendError(f"unknown backend {name!r}, {hint}")
    kind = _BACKENDS[name]
    options = options or BackendOptions()
    if not kind.on_gpu:
        for option in ("device", "eager", "memory_limit"):
            if getattr(options, option):
                raise SettingsError(
                    f"{option} is for a backend on a GPU, and {name!r} runs on the processor; leave it out"
                )
    backend: Backend = getattr(import_module(f"dnp.engine.backends.{kind.home}"), kind.backend)(options)
    return backend


def compiles_here(device: int = 0) -> str:
    """The backend to compile plans for on this machine: TensorRT that is installed and takes the GPU, else ``cpu``."""
    from dnp.engine.plans.product import PRODUCTS
    from dnp.engine.system.cuda import open_cuda

    there = [product for product in PRODUCTS.values() if installed(product.package)]
    if there:
        try:
            sm = open_cuda(device).properties().sm
        except BackendError:  # no GPU, or no driver
            return "cpu"
        for product in there:
            if not product.architectures or sm in product.architectures:
                return product.name
    return "cpu"


def open_session(bundle: Bundle, graph: str, backend: str = "cpu", options: BackendOptions | None = None) -> Session:
    """Open one of the bundle's graphs on a backend, and on no other one.

    Raises BackendError when the backend is unknown, not installed, or cannot run here; BundleError when the
    bundle has no such graph, or when its file is no graph that the backend can load.
    """
    return _alone(open_backend(backend, options), bundle.graph(graph), bundle)


def open_graph(graph: GraphSpec, backend: str = "cpu", options: BackendOptions | None = None) -> Session:
    """``open_session`` for a graph that is in no bundle. Raises what it raises."""
    return _alone(open_backend(backend, options), graph, None)


def _alone(backend: Backend, graph: GraphSpec, bundle: Bundle | None) -> Session:
    """A session that takes its backend with it when it is closed."""
    try:
        session = backend.session(graph, bundle)
    except BaseException:
        backend.close()
        raise
    session.owned = backend
    return session


@dataclass(frozen=True)
class BackendReport:
    """What ``doctor`` found out about one backend.

    Attributes:
        works: whether a small graph, run on it just now, gave the right numbers.
        version: the installed package, as ``onnxruntime 1.32.0``; empty when there is none.
        hardware: what it runs on, and with how many threads.
        precisions: those that it computed the small graph in, the usual one first.
        why_not: what is wrong; may be set although it works. Empty when all is well.
        remedy: what to do about it, empty when all is well.
    """

    name: str
    works: bool
    version: str
    hardware: str
    precisions: tuple[str, ...]
    why_not: str
    remedy: str


def doctor() -> list[BackendReport]:
    """Run a small graph on every backend of this version and tell how it went. Raises nothing."""
    with tempfile.TemporaryDirectory(prefix="dnp-doctor-") as folder:
        graph = GraphSpec("doctor", Path(folder) / "tiny.onnx", {"x": _TINY_SPEC}, {"y": _TINY_SPEC})
        graph.path.write_bytes(base64.b64decode(_TINY))
        return [_examine(name, kind, graph) for name, kind in _BACKENDS.items()]


def _examine(name: str, kind: _Kind, graph: GraphSpec) -> BackendReport:
    failures = {precision: _try(name, graph, precision) for precision in kind.precisions or (None,)}
    why_not, remedy = next(iter(failures.values())), ""  # that of the usual precision
    works = not why_not
    found = installed(kind.package)
    if why_not and not found:
        why_not, remedy = f"{kind.package} is not installed", install_line(kind.extra)
    elif why_not and not kind.on_gpu:
        remedy = f"pip install --force-reinstall {kind.package}"
    if kind.package in _RUNTIMES:
        cpu, gpu = (installed(name) for name in _RUNTIMES)
        if cpu and gpu and len({place(name) for name in _RUNTIMES}) == 1:
            why_not = f"{cpu} and {gpu} are both installed, and have overwritten each other's files"
            remedy = "pip uninstall --yes onnxruntime onnxruntime-gpu; then pip install 'dnp-engine[cpu]' or [gpu]"
        if not kind.on_gpu:  # it runs on the processor with either
            found = _imported_runtime()
    return BackendReport(
        name=name,
        works=works,
        version=found,
        hardware=_gpu() if kind.on_gpu else f"{processor_name()}, {core_count()} threads",
        precisions=tuple(precision for precision, failure in failures.items() if precision and not failure),
        why_not=why_not,
        remedy=remedy,
    )


def _imported_runtime() -> str:
    """The package that ``onnxruntime`` is imported from, and its version: of two, the one first on Python's path."""
    there = {place(package): installed(package) for package in _RUNTIMES if installed(package)}
    first = next((there[folder] for folder in (Path(entry).resolve() for entry in sys.path) if folder in there), "")
    return first or next(iter(there.values()), "")


def _gpu() -> str:
    """What the first GPU is, or that there is none."""
    from dnp.engine.system.cuda import open_cuda

    try:
        gpu = open_cuda().properties()
    except Exception:  # whatever a broken installation may raise
        return "no GPU"
    return f"{gpu.name}, SM {gpu.sm}, {gpu.memory / 1e9:.0f} GB"


def _try(name: str, graph: GraphSpec, precision: str | None) -> str:
    """Run the small graph; returns what went wrong, nothing when it did not."""
    x = np.array([-1.5, 0.0, 3.25], np.float32)  # exact in bf16 too
    try:
        with open_graph(graph, name, BackendOptions(precision=precision)) as session:
            session.reshape(n=3)
            session.inputs["x"].write(x)
            session.run()
            y = session.outputs["y"].read()
    except Exception as error:  # whatever a broken installation may raise
        return str(error) if isinstance(error, BackendError) else f"{type(error).__name__}: {error}"
    return "" if np.array_equal(y, x + x) else f"{name} computes wrong numbers: {x} + {x} = {y}"


# y = x + x, float32 [n], opset 20: made with onnx.helper (make_node, make_graph, make_model with ir_version=10),
# serialised and encoded in base64.
_TINY: Final = "CAoSADo3Cg4KAXgKAXgSAXkiA0FkZBIBZ1oQCgF4EgsKCQgBEgUKAxIBbmIQCgF5EgsKCQgBEgUKAxIBbkIECgAQFA=="
_TINY_SPEC: Final = TensorSpec(("n",))
