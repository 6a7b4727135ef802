"""dnp-engine: a deployment engine for diffusion-negative prompting (arXiv 2411.05473).

The public names are loaded on first use, so that ``import dnp`` costs nothing and drags nothing in.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout the rooms lie beside this folder; a Python that is started there finds this folder first.
if not Path(__file__).with_name("engine").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    __version__: str

    from dnp.engine.errors import (
        BackendError,
        BundleError,
        Cancelled,
        DnpError,
        ExportError,
        OutputError,
        SettingsError,
    )
    from dnp.runtime.pipeline.pipeline import Pipeline
    from dnp.runtime.request import Request, Result

_HOMES = {
    "Pipeline": "dnp.runtime.pipeline.pipeline",
    "Request": "dnp.runtime.request",
    "Result": "dnp.runtime.request",
    "DnpError": "dnp.engine.errors",
    "SettingsError": "dnp.engine.errors",
    "BundleError": "dnp.engine.errors",
    "BackendError": "dnp.engine.errors",
    "ExportError": "dnp.engine.errors",
    "OutputError": "dnp.engine.errors",
    "Cancelled": "dnp.engine.errors",
}

__all__ = [
    "BackendError",
    "BundleError",
    "Cancelled",
    "DnpError",
    "ExportError",
    "OutputError",
    "Pipeline",
    "Request",
    "Result",
    "SettingsError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dnp-engine")
    if name not in _HOMES:
        raise AttributeError(f"module 'dnp' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
