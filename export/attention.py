"""How attention is written in ONNX: first as plain nodes, which every pass over a graph can look into; then as one.

``scaled_dot_product_attention`` is translated to a few plain nodes (torch's own translation at this opset transposes
the keys by way of runtime shapes, three times as many). ``fuse_attention`` makes one ``MultiHeadAttention`` of them:
ONNX Runtime and OpenVINO have kernels for it that make no matrix of all tokens by all tokens, TensorRT has a layer. Its
definition in plain nodes goes with it, as a function in the file: who does not know the operator takes that.

The ``Attention`` operator of opset 23 would need no definition, but ONNX Runtime's kernel of it makes that matrix.
"""

from __future__ import annotations

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

from dnp.export.float32 import infer_types

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
    """ONNX Runtime's operator in plain nodes, for what is used of it: ``[B, tokens, heads·d]`` each, and the result."""
    split = op.Concat(
        op.Constant(value_ints=[0, 0]),
        op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1])),
        op.Constant(value_ints=[-1]),
        axis=0,
    )
    queries = op.Transpose(op.Reshape(query, split), perm=[0, 2, 1, 3])
    keys = op.Transpose(op.Reshape(key, split), perm=[0, 2, 3, 1])
    values = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])
    scores = op.MatMul(op.Mul(queries, op.CastLike(op.Constant(value_float=scale), query)), keys)
    weights = op.CastLike(op.Softmax(op.Cast(scores, to=1), axis=-1), query)
    result = op.Transpose(op.MatMul(weights, values), perm=[0, 2, 1, 3])
    return op.Reshape(result, op.Constant(value_ints=[0, 0, -1]))


def fuse_attention(model: ir.Model) -> int:
    """Make one node of every attention that has no mask and whose heads are cut out of ``[B, tokens, heads·d]``.

    What was put back to float32 in part stays as it is. The model is changed in place; returns how many were found.
    """
    found = [match for node in model.graph if node.op_type == "Softmax" and (match := _match(node)) is not None]
    if not found:
        return 0
    infer_types(model)
    found = [match for match in found if match.is_whole()]
    for match in found:
        attributes = {"num_heads": match.heads, "scale": match.scale}
        node = ir.node("MultiHeadAttention", match.operands, attributes, domain=_contrib.domain)
        model.graph.insert_before(match.last, node)
        (old,), (new,) = match.last.outputs, node.outputs
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        node.name, new.name, old.name = match.last.name, old.name, None
        new.type, new.shape = old.type, old.shape
    if found:
        function = ir.serde.deserialize_function(MultiHeadAttention.to_function_proto())
        model.functions[function.identifier()] = function
        model.opset_imports[_contrib.domain] = _contrib.version
        passes.RemoveUnusedNodesPass()(model)
    return len(found)


def read_model(path: Path) -> ir.Model:
    """The graph in ``path`` in plain nodes: those that carry their definition are replaced by it."""
    model = ir.load(path)
    passes.InlinePass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    return model


@dataclass(frozen=True)
class _Match:
    """Plain nodes that are one attention: query, key and value before heads were cut; the node that joins the heads."""

    operands: tuple[ir.Value, ir.Value, ir.Value]
    heads: int
    width: int
    scale: float
    last: ir.Node

    def is_whole(self) -> bool:
        """Whether it is ``[B, tokens, heads·d]`` and of one dtype from end to end; types and ranks are known."""
        shapes = [value.shape for value in self.operands]
        borders = [*self.operands, *self.last.outputs]
        return (
            all(shape is not None and shape[-1] == self.heads * self.width for shape in shapes)
            and all(value.shape is not None and len(value.shape) == 3 for value in borders)
            and len({value.dtype for value in borders}) == 1
        )


def _match(softmax: ir.Node) -> _Match | None:
    """The attention around ``softmax``, in the form that ``_attention`` and the reshaping around it leave."""
    try:
        product = _maker(_unwidened(softmax.inputs[0]), "MatMul")
        scaled = _maker(product.inputs[0], "Mul")
        cut, query = _cut(scaled.inputs[0], _TO_HEADS)
        cut_keys, key = _cut(product.inputs[1], _TO_COLUMNS)
        weighted = _user(_narrowed(softmax.outputs[0]), "MatMul")
        cut_values, value = _cut(weighted.inputs[1], _TO_HEADS)
        moved = _user(weighted.outputs[0], "Transpose")
        last = _user(moved.outputs[0], "Reshape")
        factor = _constant(scaled.inputs[1])
    except LookupError:
        return None
    if factor is None or factor.size != 1 or tuple(moved.attributes["perm"].as_ints()) != _TO_HEADS:
        return None
    return (
        _Match((query, key, value), *cut, float(factor.numpy().item()), last) if cut == cut_keys == cut_values else None
    )


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


def _unwidened(value: ir.Value | None) -> ir.Value | None:
    """What was cast to ``value`` for the softmax, if anything was."""
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Cast" else value


def _narrowed(value: ir.Value) -> ir.Value:
    """What the softmax was cast to, if it was."""
    users = value.consumers()
    return users[0].outputs[0] if len(users) == 1 and users[0].op_type == "Cast" else value


def _cut(value: ir.Value | None, order: tuple[int, ...]) -> tuple[tuple[int, int], ir.Value]:
    """The number of heads and their width, and what they were cut out of."""
    moved = _maker(value, "Transpose")
    whole, shape = _maker(moved.inputs[0], "Reshape").inputs
    match _entries(shape):
        case [_, _, int(heads), int(width)] if whole is not None and tuple(moved.attributes["perm"].as_ints()) == order:
            return (heads, width), whole
    raise LookupError("heads")


def _entries(shape: ir.Value | None) -> list[int | None]:
    """The entries of a shape that is a constant, or joined of single entries; None for those known at run time only."""
    parts = [shape] if _constant(shape) is not None else _maker(shape, "Concat").inputs
    known = [_constant(part) for part in parts]
    return [entry for part in known for entry in ([None] if part is None else map(int, part.numpy().reshape(-1)))]


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else ir.convenience.get_const_tensor(value)
