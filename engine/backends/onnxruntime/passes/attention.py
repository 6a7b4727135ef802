"""Attention as one node, which makes no matrix of all tokens by all tokens: ``MultiHeadAttention``."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dnp.engine.backends.onnxruntime.passes.definitions import DOMAIN
from dnp.engine.backends.onnxruntime.passes.patterns import (
    HALF,
    SINGLE,
    Writer,
    constant,
    is_constant,
    is_last_axis,
    maker,
    matches,
    number,
    operands,
    order,
    replace,
    require,
    shape,
    user,
)

_TO_HEADS = (0, 2, 1, 3)  # [B, tokens, heads, d] to [B, heads, tokens, d], and back
_TO_COLUMNS = (0, 2, 3, 1)  # the keys, transposed besides
_LOWEST = -1e4  # what is added to or put for a score that is hidden is lower than that


def separate_packed_heads(model: ir.Model) -> int:
    """Cut queries, keys and values apart before the heads, where one product made all three: as other models do it.

    ``[B, tokens, 3·heads·d]`` is cut into ``[3, B, heads, tokens, d]`` and then taken apart. Returns how many were.
    """

    def rewrite(transpose: ir.Node) -> None:
        require(order(transpose) == (2, 0, 3, 1, 4))
        cut = maker(transpose.inputs[0], "Reshape")
        whole = cut.inputs[0]
        images, tokens, three, heads, width = shape(cut.outputs[0], 5)
        require(three == 3 and isinstance(heads, int) and isinstance(width, int))
        assert isinstance(heads, int) and isinstance(width, int)
        require(shape(whole, 3) == [images, tokens, 3 * heads * width])
        parts: dict[int, ir.Value] = {}
        for taker in transpose.outputs[0].consumers():
            index, result = _part(taker)
            require(index not in parts)
            parts[index] = result
        require(sorted(parts) == [0, 1, 2] and not transpose.outputs[0].is_graph_output())
        write = Writer(cut)
        one = ir.Value(shape=ir.Shape([images, tokens, heads * width]), type=cut.outputs[0].type)
        split = write("Split", [whole], one, one, one, axis=2, num_outputs=3)
        for index, result in parts.items():
            target = write.weight(np.array([0, 0, heads, width]), "heads")
            heads_apart = write("Reshape", [split[index], target])
            heads_apart.shape, heads_apart.type = ir.Shape([images, tokens, heads, width]), result.type
            replace(result, write.transposed(heads_apart, _TO_HEADS))

    return matches(model, "Transpose", rewrite)


def _part(taker: ir.Node) -> tuple[int, ir.Value]:
    """Which of the three is taken, by Slice and Squeeze or by Gather, and what it is afterwards."""
    if taker.op_type == "Gather":
        index = constant(taker.inputs[1])
        require(index.ndim == 0 and taker.attributes.get_int("axis", 0) == 0)
        return int(index), taker.outputs[0]
    require(taker.op_type == "Slice" and len(taker.inputs) >= 4)
    start, end, axis = (constant(value).tolist() for value in taker.inputs[1:4])
    require(len(start) == 1 and end == [start[0] + 1] and axis == [0])
    require(len(taker.inputs) == 4 or constant(taker.inputs[4]).tolist() == [1])
    squeeze = user(taker.outputs[0], "Squeeze")
    require(len(squeeze.inputs) == 2 and constant(squeeze.inputs[1]).tolist() == [0])
    return int(start[0]), squeeze.outputs[0]


def fuse_attention(model: ir.Model) -> int:
    """Make one node of every attention whose heads are cut out of ``[B, tokens, heads·d]``; without a mask, or with
    the one that hides all later tokens. Returns how many were found.
    """

    def rewrite(softmax: ir.Node) -> None:
        require(is_last_axis(softmax, 4))
        scores, causal = _without_mask(softmax.inputs[0])
        scale, cut_queries, cut_keys = _product(_as_computed(scores))
        queries, images, tokens, heads, width = _heads(cut_queries, _TO_HEADS)
        keys, images_k, seen, heads_k, width_k = _key_heads(cut_keys)
        weights = softmax.outputs[0]
        if weights.dtype != queries.dtype:
            weights = user(weights, "Cast").outputs[0]
        weighted = user(weights, "MatMul")
        require(weighted.inputs[0] is weights)
        values, images_v, seen_v, heads_v, width_v = _heads(weighted.inputs[1], _TO_HEADS)
        moved = user(weighted.outputs[0], "Transpose")
        last = user(moved.outputs[0], "Reshape")
        require(order(moved) == _TO_HEADS)
        require((images, heads, width) == (images_k, heads_k, width_k) == (images_v, heads_v, width_v))
        require(seen == seen_v and (not causal or seen == tokens))
        require(shape(last.outputs[0], 3) == [images, tokens, heads * width])
        require(queries.dtype in (HALF, SINGLE))
        require(all(value.dtype == queries.dtype for value in (keys, values, *last.outputs)))
        write = Writer(last)
        replace(
            last.outputs[0],
            write(
                "MultiHeadAttention",
                [queries, keys, values],
                domain=DOMAIN,
                num_heads=heads,
                scale=scale,
                unidirectional=int(causal),
            ),
        )

    return matches(model, "Softmax", rewrite)


def _product(scores: ir.Value | None) -> tuple[float, ir.Value | None, ir.Value | None]:
    """The scale, the queries and the keys that scores are made of; the queries are scaled, or their products."""
    node = maker(scores, "MatMul", "Mul")
    if node.op_type == "Mul":
        factor, value = operands(node, is_constant)
        queries, keys = maker(value, "MatMul").inputs
        return number(factor), queries, keys
    factor, value = operands(maker(node.inputs[0], "Mul"), is_constant)
    return number(factor), value, node.inputs[1]


def _heads(value: ir.Value | None, axes: tuple[int, ...]) -> tuple[ir.Value, int | str, int | str, int, int]:
    """What heads are cut out of, and images, tokens, heads, width."""
    moved = maker(value, "Transpose")
    require(order(moved) == axes)
    cut = maker(moved.inputs[0], "Reshape")
    images, tokens, heads, width = shape(cut.outputs[0], 4)
    whole = cut.inputs[0]
    require(isinstance(heads, int) and isinstance(width, int))
    assert isinstance(heads, int) and isinstance(width, int) and whole is not None
    require(shape(whole, 3) == [images, tokens, heads * width])
    return whole, images, tokens, heads, width


def _key_heads(value: ir.Value | None) -> tuple[ir.Value, int | str, int | str, int, int]:
    """The same for keys, which are transposed in one step or in two."""
    moved = maker(value, "Transpose")
    if order(moved) == (0, 1, 3, 2):
        return _heads(moved.inputs[0], _TO_HEADS)
    return _heads(value, _TO_COLUMNS)


def _as_computed(value: ir.Value | None) -> ir.Value | None:
    """Scores before they were widened to float32 for the softmax, if they were."""
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Cast" else value


def _without_mask(scores: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """Scores before the mask that hides all later tokens, and whether there is one. Other masks are no match."""
    node = None if scores is None else scores.producer()
    if node is None or node.op_type != "Where":
        return scores, False
    mask, shown, hidden = node.inputs
    if mask is not None and (repeated := mask.producer()) is not None and repeated.op_type == "Expand":
        mask = repeated.inputs[0]  # the same for every image
    require(is_constant(mask) and number(hidden) < _LOWEST)
    allowed = constant(mask)
    rows, columns = allowed.shape[-2:]
    require(allowed.size == rows * columns and rows == columns and shape(shown, 4)[2:] == [rows, columns])
    require(bool((allowed.reshape(rows, columns) == np.tri(rows, dtype=bool)).all()))
    return shown, True
