"""ONNX Runtime's own operators in plain nodes, for what is used of them: what each pass is proved with.

They lie in the plan beside the nodes that they define. ONNX Runtime takes its kernels where it has them, which on CUDA
it has for all of these in fp16 and float32; ``inlined`` is the graph for everyone else. Sums are in float32 throughout,
as in the kernels.
"""

from __future__ import annotations

from typing import Final

import onnx.parser
import onnx_ir as ir
from onnx_ir.passes import common as passes

DOMAIN: Final = "com.microsoft"
_OPSET: Final = 20

_TEXTS: Final = {
    # [B, tokens, heads·d] throughout
    "MultiHeadAttention": """<num_heads, scale, unidirectional> (query, key, value) => (result) {
        zeros = Constant <value_ints: ints = [0, 0]> ()
        one = Constant <value_ints: ints = [1]> ()
        number = Constant <value_int: int = @num_heads> ()
        heads = Reshape (number, one)
        rest = Constant <value_ints: ints = [-1]> ()
        cut = Concat <axis = 0> (zeros, heads, rest)
        q4 = Reshape (query, cut)
        k4 = Reshape (key, cut)
        v4 = Reshape (value, cut)
        q = Transpose <perm = [0, 2, 1, 3]> (q4)
        k = Transpose <perm = [0, 2, 3, 1]> (k4)
        v = Transpose <perm = [0, 2, 1, 3]> (v4)
        factor = Constant <value_float: float = @scale> ()
        same_factor = CastLike (factor, q)
        scaled = Mul (q, same_factor)
        products = MatMul (scaled, k)
        scores = Cast <to = 1> (products)
        size = Shape <start = 2> (scores)
        truth = Constant <value = bool[1] {1}> ()
        all = Expand (truth, size)
        lower = Trilu <upper = 0> (all)
        causal = Constant <value_int: int = @unidirectional> ()
        is_causal = Cast <to = 9> (causal)
        everything = Not (is_causal)
        seen = Or (lower, everything)
        hidden = Constant <value_float: float = -3.4028234663852886e38> ()
        masked = Where (seen, scores, hidden)
        weights = Softmax <axis = -1> (masked)
        same_weights = CastLike (weights, v)
        sums = MatMul (same_weights, v)
        moved = Transpose <perm = [0, 2, 1, 3]> (sums)
        joint = Constant <value_ints: ints = [0, 0, -1]> ()
        result = Reshape (moved, joint)
    }""",
    # x [B, h, w, C], gamma and beta [C] in float32; activation 1 is SiLU
    "GroupNorm": """<groups, epsilon, activation, channels_last> (x, gamma, beta) => (y) {
        wide = Cast <to = 1> (x)
        first = Transpose <perm = [0, 3, 1, 2]> (wide)
        zero = Constant <value_ints: ints = [0]> ()
        one = Constant <value_ints: ints = [1]> ()
        number = Constant <value_int: int = @groups> ()
        number1 = Reshape (number, one)
        rest = Constant <value_ints: ints = [-1]> ()
        cut = Concat <axis = 0> (zero, number1, rest)
        grouped = Reshape (first, cut)
        axis = Constant <value_ints: ints = [2]> ()
        mean = ReduceMean <keepdims = 1> (grouped, axis)
        centred = Sub (grouped, mean)
        squares = Mul (centred, centred)
        variance = ReduceMean <keepdims = 1> (squares, axis)
        little = Constant <value_float: float = @epsilon> ()
        sum = Add (variance, little)
        deviation = Sqrt (sum)
        normal = Div (centred, deviation)
        whole = Shape (first)
        back = Reshape (normal, whole)
        last = Transpose <perm = [0, 2, 3, 1]> (back)
        scaled = Mul (last, gamma)
        shifted = Add (scaled, beta)
        gate = Sigmoid (shifted)
        silu = Mul (shifted, gate)
        chosen = Constant <value_int: int = @activation> ()
        is_silu = Cast <to = 9> (chosen)
        result = Where (is_silu, silu, shifted)
        y = CastLike (result, x)
    }""",
    # the same of s = x + skip + bias; skip is [B, h, w, C], or [B, C] for all places
    "SkipGroupNorm": """<groups, epsilon, activation, channels_last> (x, gamma, beta, skip, bias) => (y, s) {
        batch = Shape <start = 0, end = 1> (skip)
        channels = Shape <start = -1> (skip)
        rank = Shape (skip)
        dims = Shape (rank)
        four = Constant <value_ints: ints = [4]> ()
        missing = Sub (four, dims)
        ones1 = Constant <value = int64[1] {1}> ()
        ones = Expand (ones1, missing)
        end = Constant <value_ints: ints = [-1]> ()
        start = Constant <value_ints: ints = [1]> ()
        between = Slice (rank, start, end)
        wanted = Concat <axis = 0> (batch, ones, between, channels)
        skip4 = Reshape (skip, wanted)
        first = Add (x, bias)
        total = Add (first, skip4)
        s = Identity (total)
        y = com.microsoft.GroupNorm <groups: int = @groups, epsilon: float = @epsilon, activation: int = @activation,
            channels_last: int = @channels_last> (total, gamma, beta)
    }""",
    # [B, tokens, C]; the third output is input + skip + bias
    "SkipLayerNormalization": """<epsilon> (input, skip, gamma, beta, bias) => (y, mean, deviation, sum) {
        biased = Add (input, bias)
        total = Add (biased, skip)
        y, mean1, deviation1 = LayerNormalization <axis = -1, epsilon: float = @epsilon, stash_type = 1>
            (total, gamma, beta)
        mean = Identity (mean1)
        deviation = Identity (deviation1)
        sum = Identity (total)
    }""",
    "BiasAdd": """(x, bias, skip) => (y) {
        biased = Add (x, bias)
        y = Add (biased, skip)
    }""",
    # the left half, times Gelu of the right one
    "BiasSplitGelu": """(x, bias) => (y) {
        biased = Add (x, bias)
        left, right = Split <axis = -1, num_outputs = 2> (biased)
        gate = Gelu <approximate = "none"> (right)
        y = Mul (left, gate)
    }""",
    "BiasGelu": """(x, bias) => (y) {
        biased = Add (x, bias)
        y = Gelu <approximate = "none"> (biased)
    }""",
    "QuickGelu": """<alpha> (x) => (y) {
        factor = Constant <value_float: float = @alpha> ()
        same_factor = CastLike (factor, x)
        scaled = Mul (x, same_factor)
        gate = Sigmoid (scaled)
        y = Mul (x, gate)
    }""",
}


def define(model: ir.Model) -> None:
    """Put the definitions of the operators that the model uses beside them."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    if "SkipGroupNorm" in used:  # which is defined by the other
        used.add("GroupNorm")
    for name in sorted(used & set(_TEXTS)):
        opsets = f'opset_import: ["": {_OPSET}, "{DOMAIN}": 1], domain: "{DOMAIN}"'
        function = ir.serde.deserialize_function(onnx.parser.parse_function(f"<{opsets}> {name} {_TEXTS[name]}"))
        model.functions[function.identifier()] = function
    if used:
        model.opset_imports[DOMAIN] = 1


def inlined(model: ir.Model) -> ir.Model:
    """The model in plain nodes: every operator that carries its definition is replaced by it, in place."""
    for node in model.graph:
        function = model.functions.get(node.op_identifier())
        if function is not None and len(node.outputs) < len(function.outputs):
            node.resize_outputs(len(function.outputs))  # a result that nobody asks for may have been left out
    passes.InlinePass()(model)
    passes.RemoveUnusedNodesPass()(model)  # results that nobody asks for
    passes.RemoveUnusedOpsetsPass()(model)
    return model
