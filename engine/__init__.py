"""Bundles, sessions and backends: everything between a graph on disk and a run of it. No torch.

The public names are loaded on first use; a backend's library only when a session is opened on it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dnp.engine.backends.onnxruntime.cpu import build_cpu_plans
    from dnp.engine.backends.registry import (
        BackendReport,
        backend_names,
        doctor,
        open_backend,
        open_graph,
        open_session,
    )
    from dnp.engine.backends.session import Backend, BackendOptions, Buffer, Session
    from dnp.engine.bundle.bundle import Bundle, seal
    from dnp.engine.bundle.manifest import GraphSpec
    from dnp.engine.bundle.tensors import TensorSpec
    from dnp.engine.plans.build import build_plans

_HOMES = {
    "Backend": "backends.session",
    "BackendOptions": "backends.session",
    "BackendReport": "backends.registry",
    "Buffer": "backends.session",
    "Bundle": "bundle.bundle",
    "GraphSpec": "bundle.manifest",
    "Session": "backends.session",
    "TensorSpec": "bundle.contract",
    "backend_names": "backends.registry",
    "build_cpu_plans": "backends.onnxruntime.cpu",
    "build_plans": "plans.build",
    "doctor": "backends.registry",
    "open_backend": "backends.registry",
    "open_graph": "backends.registry",
    "open_session": "backends.registry",
    "seal": "bundle.bundle",
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
