"""How an enlargement by the nearest pixel is written in ONNX: by its height and width alone.

torch's own translation asks for batch and channels besides, at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxscript
import torch

op: Any = onnxscript.opset20


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """An entry of the ``custom_translation_table`` for ``torch.onnx.export``."""
    return {torch.ops.aten.upsample_nearest2d.vec: _nearest}


def _nearest(x: Any, output_size: Any, scale_factors: Any = None) -> Any:
    """``[B, C, h, w]`` to height and width ``output_size``, or enlarged by ``scale_factors``; the names are torch's."""
    sizes = None if output_size is None else op.Cast(output_size, to=onnxscript.INT64.dtype)
    scales = None if scale_factors is None else op.Constant(value_floats=[float(scale) for scale in scale_factors])
    return op.Resize(
        x,
        None,
        scales,
        sizes,
        axes=[2, 3],
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
