"""How attention is written in ONNX: first as plain nodes, which every pass over a graph can look into; then as one.

``scaled_dot_product_attention`` is translated to a few plain nodes (torch's own translation at this opset transposes
the keys by way of runtime shapes, three times as many). Of those in float32, ``fuse_attention`` makes one node,
``MultiHeadAttention``, for which ONNX Runtime has a kernel that makes no matrix of all tokens by all tokens. OpenVINO
and TensorRT for RTX know it too; its definition in plain nodes, a function in the same file, is for those who do not.

In fp16 the plain nodes stay: TensorRT fuses them as they are, and would compute the softmax of the one node in fp16
where it has no fused kernel. The ``Attention`` operator of opset 23 would do no better: ONNX Runtime's kernel of it
makes the matrix.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.passes import common as passes

from dnp.export.fp16.float32 import infer_types

_log = logging.getLogger(__name__)
op: Any = onnxscript.opset20
_contrib: Final = onnxscript.values.Opset("com.microsoft", 1)
_TO_HEADS: Final = (0, 2, 1, 3)  # [B, tokens, heads, d] to [B, heads, tokens, d], and back
_TO_COLUMNS: Final = (0, 2, 3, 1)  # the keys, transposed besides


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
        expanded = attn_mask.producer()
        if expanded is not None and expanded.op_type == "Expand":
            attn_mask = expanded.inputs[0]  # to all images, which Where and Add do themselves
        if is_causal or attn_mask.dtype == ir.DataType.BOOL:
            hidden = op.Constant(value_float=float(np.finfo(np.float32).min))
            scores = op.Where(attn_mask, scores, hidden)
        else:
            scores = op.Add(scores, op.Cast(attn_mask, to=ir.DataType.FLOAT))
    weights = op.Softmax(scores, axis=-1)
    if dtype != ir.DataType.FLOAT:
        weights = op.Cast(weights, to=dtype)
    return op.MatMul(weights, value)


@onnxscript.script(_contrib, default_opset=op)
def MultiHeadAttention(query, key, value, num_heads: int, scale: float):  # type: ignore[no-untyped-def]  # noqa: N802
    """ONNX Runtime's operator in plain nodes, for what is used of it: float32 ``[B, tokens, heads·d]`` throughout."""
    split = op.Concat(
        op.Constant(value_ints=[0, 0]),
        op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1])),
        op.Constant(value_ints=[-1]),
        axis=0,
    )
    queries = op.Transpose(op.Reshape(query, split), perm=[0, 2, 1, 3])
    keys = op.Transpose(op.Reshape(key, split), perm=[0, 2, 3, 1])
    values = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])
    weights = op.Softmax(op.MatMul(op.Mul(queries, op.Constant(value_float=scale)), keys), axis=-1)
    result = op.Transpose(op.MatMul(weights, values), perm=[0, 2, 1, 3])
    return op.Reshape(result, op.Constant(value_ints=[0, 0, -1]))


def fuse_attention(model: ir.Model) -> int:
    """Make one node of every float32 attention without a mask, whose heads are cut out of ``[B, tokens, heads·d]``.

    The model is changed in place; returns how many were found.
    """
    found = [match for node in model.graph if node.op_type == "Softmax" and (match := _match(node)) is not None]
    if found:
        infer_types(model)
        found = [match for match in found if match.is_whole()]
    for match in found:
        node = match.node()
        model.graph.insert_before(match.last, node)
        (old,), (new,) = match.last.outputs, node.outputs
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name, old.name = old.name, None
        new.type, new.shape = old.type, old.shape
    if found:
        function = ir.serde.deserialize_function(MultiHeadAttention.to_function_proto())
        model.functions[function.identifier()] = function
        model.opset_imports[_contrib.domain] = _contrib.version
        passes.RemoveUnusedNodesPass()(model)
    _log.debug("%s: %d attentions fused", model.graph.name, len(found))
    return len(found)


def read_model(path: Path) -> ir.Model:
    """The graph in ``path`` in plain nodes: those that carry their definition are replaced by it."""
    model = ir.load(path)
    passes.InlinePass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    return model


@dataclass(frozen=True)
class _Heads:
    """What heads are cut out of, and the shape that they are cut with: images, tokens, heads, width."""

    whole: ir.Value
    shape: list[int | None]


@dataclass(frozen=True)
class _Match:
    """Plain nodes that are one attention; ``last`` joins its heads, with the shape ``joint``."""

    cuts: tuple[_Heads, _Heads, _Heads]
    scale: float
    joint: list[int | None]
    last: ir.Node

    def node(self) -> ir.Node:
        """The same as one node."""
        operands = [cut.whole for cut in self.cuts]
        attributes = {"num_heads": self.cuts[0].shape[2], "scale": self.scale}
        return ir.node("MultiHeadAttention", operands, attributes, domain=_contrib.domain, name=self.last.name)

    def is_whole(self) -> bool:
        """Whether it is float32 ``[B, tokens, heads·d]`` on all sides, and nothing moves from one image to another.

        Types and ranks are known.
        """
        heads, width = self.cuts[0].shape[2:]
        if heads is None or width is None or any(cut.shape[2:] != [heads, width] for cut in self.cuts):
            return False
        wholes = [cut.whole for cut in self.cuts]
        return (
            all(value.dtype == ir.DataType.FLOAT for value in [*wholes, *self.last.outputs])
            and all(_rank(value) == 3 for value in [*wholes, *self.last.outputs])
            and all(_keeps_images(cut.shape, cut.whole) for cut in self.cuts)
            and _keeps_images(self.joint, wholes[0])
            and self.joint[2] in (heads * width, -1)
        )


def _match(softmax: ir.Node) -> _Match | None:
    """The attention around ``softmax``, in the form that ``_attention`` and the reshaping around it leave."""
    try:
        product = _maker(softmax.inputs[0], "MatMul")
        scaled = _maker(product.inputs[0], "Mul")
        query = _cut(scaled.inputs[0], _TO_HEADS)
        key = _cut(product.inputs[1], _TO_COLUMNS)
        weighted = _user(softmax.outputs[0], "MatMul")
        value = _cut(weighted.inputs[1], _TO_HEADS)
        moved = _user(weighted.outputs[0], "Transpose")
        last = _user(moved.outputs[0], "Reshape")
        joint = _entries(last.inputs[1])
        factor = _constant(scaled.inputs[1])
    except LookupError:
        return None
    over_keys = softmax.attributes.get_int("axis", -1) in (-1, 3)
    if not over_keys or _order(moved) != _TO_HEADS or len(joint) != 3 or factor is None or factor.size != 1:
        return None
    return _Match((query, key, value), float(factor.numpy().item()), joint, last)


def _cut(value: ir.Value | None, order: tuple[int, ...]) -> _Heads:
    moved = _maker(value, "Transpose")
    whole, shape = _maker(moved.inputs[0], "Reshape").inputs
    entries = _entries(shape)
    if whole is None or len(entries) != 4 or _order(moved) != order:
        raise LookupError("heads")
    return _Heads(whole, entries)


def _keeps_images(shape: list[int | None], whole: ir.Value) -> bool:
    """Whether ``shape`` leaves the first two dimensions of ``whole`` as they are.

    A first entry that is known at run time only is the number of images: nothing else in these graphs is.
    """
    tokens = None if whole.shape is None else whole.shape[1]
    first, second = shape[:2]
    return (first in (0, None) and second in (0, -1, tokens)) or (first == -1 and second == tokens)


def _maker(value: ir.Value | None, operator: str) -> ir.Node:
    node = None if value is None else value.producer()
    if node is None or node.op_type != operator:
        raise LookupError(operator)
    return node


def _user(value: ir.Value, operator: str) -> ir.Node:
    """The only one who takes ``value``."""
    users = value.consumers()
    if len(users) != 1 or users[0].op_type != operator or value.is_graph_output():
        raise LookupError(operator)
    return users[0]


def _entries(shape: ir.Value | None) -> list[int | None]:
    """The entries of a shape that is a constant, or joined of single entries; None for those known at run time only."""
    parts = [shape] if _constant(shape) is not None else _maker(shape, "Concat").inputs
    known = [_constant(part) for part in parts]
    return [entry for part in known for entry in ([None] if part is None else map(int, part.numpy().reshape(-1)))]


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else ir.convenience.get_const_tensor(value)


def _order(transpose: ir.Node) -> tuple[int, ...]:
    return tuple(transpose.attributes["perm"].as_ints())


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)
