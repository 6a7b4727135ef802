"""What a compiler of plans is told, and what it compiles for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from dnp.engine.bundle.schema import shown
from dnp.engine.errors import SettingsError
from dnp.engine.plans.product import Product

_MOST_WORKSPACE: Final = 10**12  # bytes; TensorRT fails in ways of its own on more


@dataclass(frozen=True)
class BuildSettings:
    """What the compiler is told. Raises SettingsError for what it would refuse.

    Attributes:
        sm: the architectures to compile for, as 89 for SM 8.9; the present GPU's when empty.
        optimization_level: 0 (fast build) to 5 (fast plan); the compiler's own choice when ``None``.
        workspace: bytes of scratch memory that a kernel may use; no limit when ``None``.
        weight_streaming: let weights stay in host memory where the GPU's does not hold them all. TensorRT for RTX then
            allocates memory at run time, so its runs cannot be captured.
        refit: let weights be exchanged without a build. It costs fusions, and needs a GPU to build.
    """

    sm: tuple[int, ...] = ()
    optimization_level: int | None = None
    workspace: int | None = None
    weight_streaming: bool = False
    refit: bool = False

    def __post_init__(self) -> None:
        level, workspace = self.optimization_level, self.workspace
        if not isinstance(self.sm, tuple) or not all(type(number) is int for number in self.sm):
            raise SettingsError(f"architectures are a tuple of whole numbers such as (89, 120), not {shown(self.sm)}")
        for name in ("weight_streaming", "refit"):
            if not isinstance(getattr(self, name), bool):
                raise SettingsError(f"{name} must be True or False, not {shown(getattr(self, name))}")
        if level is not None and level not in range(6):
            raise SettingsError(f"the optimisation level must be a whole number from 0 to 5, not {shown(level)}")
        if workspace is not None and not (type(workspace) is int and 0 < workspace <= _MOST_WORKSPACE):
            raise SettingsError(
                f"the workspace limit must be a number of bytes from 1 to {_MOST_WORKSPACE}, not {shown(workspace)}"
            )
        if len(set(self.sm)) != len(self.sm):
            raise SettingsError(f"an architecture is named twice: {', '.join(map(str, self.sm))}")

    @property
    def flags(self) -> dict[str, Any]:
        """What changes a plan, apart from the architectures."""
        return {name: value for name, value in asdict(self).items() if name != "sm"}


@dataclass(frozen=True)
class Target:
    """What plans are compiled for: a product, its version, and the architectures."""

    product: Product
    version: str
    sm: tuple[int, ...]
    architecture: str
    device: int = 0
