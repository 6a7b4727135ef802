"""How ``scaled_dot_product_attention`` is written in ONNX: a few plain nodes, the form that TensorRT fuses.

torch's own translation at this opset transposes the keys by way of runtime shapes, three times as many nodes. The
``Attention`` operator of opset 23 has no kernel for float32 on TensorRT-RTX, and is slower on CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript
import torch

op: Any = onnxscript.opset20


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` for ``torch.onnx.export``."""
    return {torch.ops.aten.scaled_dot_product_attention.default: _attention}


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(q kᵀ / √d + mask) v, all ``[B, heads, tokens, d]``; the signature is the operator's."""
    if dropout_p or enable_gqa or len(query.shape) != 4:
        raise NotImplementedError("attention with dropout, with grouped queries, or not of four dimensions")
    dtype, (tokens, width) = query.dtype, query.shape[2:]
    factor = 1 / math.sqrt(width) if scale is None else scale
    query = op.Mul(query, op.Constant(value=ir.tensor(np.array(factor, dtype.numpy()))))
    scores = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
    if dtype != ir.DataType.FLOAT:
        scores = op.Cast(scores, to=ir.DataType.FLOAT)  # the softmax alone in float32 does not hinder fusion
    if is_causal:
        attn_mask = op.Constant(value=ir.tensor(np.tri(tokens, key.shape[2], dtype=np.bool_)))
    if attn_mask is not None:
        if is_causal or attn_mask.dtype == ir.DataType.BOOL:
            hidden = op.Constant(value_float=float(np.finfo(np.float32).min))
            scores = op.Where(attn_mask, scores, hidden)
        else:
            scores = op.Add(scores, op.Cast(attn_mask, to=ir.DataType.FLOAT))
    weights = op.Softmax(scores, axis=-1)
    if dtype != ir.DataType.FLOAT:
        weights = op.Cast(weights, to=dtype)
    return op.MatMul(weights, value)
