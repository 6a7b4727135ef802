"""dnp-engine: a deployment engine for diffusion-negative prompting (arXiv 2411.05473).

The public names are loaded on first use, so that ``import dnp`` costs nothing and drags nothing in.
"""

from __future__ import annotations

import os.path

# Typing and pathlib take longer to load than all the rest, and a Ctrl-C meanwhile is a traceback.
TYPE_CHECKING = False

# In a checkout the rooms lie beside this folder; a Python that is started there finds this folder first.
_folder = os.path.dirname(__file__)  # noqa: PTH120
if not os.path.isdir(os.path.join(_folder, "engine")):  # noqa: PTH112, PTH118
    __path__.append(os.path.dirname(_folder))  # noqa: PTH120

if TYPE_CHECKING:
    from typing import Any

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
    from dnp.runtime.request import Request
    from dnp.runtime.result import Result

# What libraries tell their makers, switched off before any of them is loaded, and for this process alone: ONNX Runtime
# keeps an identifier and events below ~/.cache and sends them. Some are loaded by others, diffusers among them.
os.environ.update(ORT_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_TELEMETRY="1", RAY_USAGE_STATS_ENABLED="0")

_HOMES = {
    "Pipeline": "dnp.runtime.pipeline.pipeline",
    "Request": "dnp.runtime.request",
    "Result": "dnp.runtime.result",
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
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        return version("dnp-engine")
    if name not in _HOMES:
        raise AttributeError(f"module 'dnp' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
