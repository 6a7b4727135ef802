"""Bundles, sessions and backends: everything between a graph on disk and a run of it. No torch.

The public names are loaded on first use; a backend's library only when a session is opened on it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnp.engine.build import build_plans
    from dnp.engine.bundle import Bundle, GraphSpec, TensorSpec, seal
    from dnp.engine.cpu import build_cpu_plans
    from dnp.engine.registry import BackendReport, backend_names, doctor, open_backend, open_graph, open_session
    from dnp.engine.session import Backend, BackendOptions, Buffer, Session

_HOMES = {
    "Backend": "session",
    "BackendOptions": "session",
    "BackendReport": "registry",
    "Buffer": "session",
    "Bundle": "bundle",
    "GraphSpec": "bundle",
    "Session": "session",
    "TensorSpec": "bundle",
    "backend_names": "registry",
    "build_cpu_plans": "cpu",
    "build_plans": "build",
    "doctor": "registry",
    "open_backend": "registry",
    "open_graph": "registry",
    "open_session": "registry",
    "seal": "bundle",
}

__all__ = [
    "Backend",
    "BackendOptions",
    "BackendReport",
    "Buffer",
    "Bundle",
    "GraphSpec",
    "Session",
    "TensorSpec",
    "backend_names",
    "build_cpu_plans",
    "build_plans",
    "doctor",
    "open_backend",
    "open_graph",
    "open_session",
    "seal",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dnp.engine' has no attribute {name!r}")
    return getattr(import_module(f"dnp.engine.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
