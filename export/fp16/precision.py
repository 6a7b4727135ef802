"""fp16 arithmetic with float32 regions, made in torch so that each change of type is a ``Cast`` in the graph.

TensorRT 11 and TensorRT-RTX build strongly typed networks: the precision is what the ONNX file says.
"""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

import torch
from torch import nn
from torch.nn import functional

from dnp.engine.errors import ExportError
from dnp.export.memory import give_back

Precision = Literal["fp32", "fp16"]
AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Float32GroupNorm(nn.GroupNorm):
    """GroupNorm computed in float32, whatever the dtype of ``x``, which is also the result's.

    The square of an fp16 activation overflows from 256 on, so the statistics cannot be fp16. The parameters
    keep the module's dtype: modules look at a parameter to learn which dtype they compute in.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, ...]`` to the same shape and dtype."""
        weight, bias = _float(self.weight), _float(self.bias)
        return functional.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


class Float32LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32; as ``Float32GroupNorm``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., *normalized_shape]`` to the same shape and dtype."""
        weight, bias = _float(self.weight), _float(self.bias)
        return functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def check_precision(precision: str) -> Precision:
    """``precision`` itself. Raises ExportError when it is unknown."""
    for known in get_args(Precision):
        if precision == known:
            return precision  # type: ignore[return-value]
    raise ExportError(f"unknown precision {precision!r}; use one of {', '.join(get_args(Precision))}")


def in_precision(module: AnyModule, precision: Precision) -> AnyModule:
    """``module`` itself, float32 until now: for ``fp16`` it is put in half precision with float32 normalisations.

    One weight after the other is replaced, so that the model takes no memory besides its own. Raises ExportError for a
    weight that fp16 cannot hold, and for a normalisation that is not known.
    """
    if precision == "fp32":
        return module
    half = module.half()
    give_back()
    for name, weight in half.named_parameters():
        if not torch.isfinite(weight).all():
            raise ExportError(f"the weight {name} goes beyond the 65,504 of fp16; use precision fp32")
    for child in half.modules():
        if type(child) is nn.GroupNorm:
            child.__class__ = Float32GroupNorm
        elif type(child) is nn.LayerNorm:
            child.__class__ = Float32LayerNorm
        elif "norm" in type(child).__name__.lower() and any(True for _ in child.parameters(recurse=False)):
            raise ExportError(
                f"{type(child).__name__} is a normalisation whose fp16 form is not known; use precision fp32"
            )
    return half


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype a module computes in: that of its parameters."""
    return next(module.parameters()).dtype


def _float(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.float()
