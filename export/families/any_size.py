"""A UNet that takes latents of any size, as one graph.

diffusers asks whether a size can be halved often enough, and tells the upsamplers which size to give if it cannot. A
graph is traced for all sizes at once, so they are always told. The numbers are the same.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from diffusers.models.upsampling import Upsample2D
from torch.nn import functional

from dnp.engine.errors import ExportError

_NEVER_WHOLE: Final = 30  # no size is a multiple of 2³⁰


class SizedUpsample2D(Upsample2D):
    """``Upsample2D`` to the size asked for: the nearest pixel, and a convolution."""

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None, *_: Any, **__: Any) -> torch.Tensor:
        """``[B, C, h, w]`` to ``[B, C, H, W]``; twice the size where none is asked for."""
        size = [2 * side for side in hidden_states.shape[2:]] if output_size is None else output_size
        convolve: Any = self.conv
        result: torch.Tensor = convolve(functional.interpolate(hidden_states, size=size, mode="nearest"))
        return result


def take_any_size(unet: Any) -> Any:
    """``unet`` itself, changed so that nothing in it depends on whether a size is even.

    Raises ExportError for an upsampler of another kind.
    """
    for name, child in unet.named_modules():
        if not isinstance(child, Upsample2D):
            continue
        plain = child.interpolate and child.use_conv and child.norm is None and not child.use_conv_transpose
        if type(child) is not Upsample2D or not plain:
            raise ExportError(f"the UNet's {name} enlarges in a way that is not known: {child}")
        child.__class__ = SizedUpsample2D
    unet.num_upsamplers = _NEVER_WHOLE
    return unet
