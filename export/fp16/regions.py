"""Where an fp16 graph computes in float32, and why: the regions, stated per graph, and the search for others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from dnp.export.fp16.float32 import SINGLE, infer_types

_MOVES = frozenset({"Cast", "Concat", "Expand", "Gather", "GatherElements", "Reshape", "Shape", "Slice", "Split",
                    "Squeeze", "Transpose", "Unsqueeze"})  # fmt: skip


@dataclass(frozen=True)
class Float32Region:
    """A float32 region of an fp16 graph: nodes joined by float32 values that depend on the graph's inputs.

    Attributes:
        reason: why it is float32.
        marks: operators, or inputs and outputs of the graph, of which it holds at least one.
        operators: what else it may compute with, besides moving and casting.
    """

    reason: str
    marks: frozenset[str]
    operators: frozenset[str] = frozenset()


NORMALISATION = Float32Region(
    "the square of an activation overflows fp16 from 256 on, so statistics need float32",
    frozenset({"InstanceNormalization", "LayerNormalization"}),
    frozenset({"Add", "Mul"}),  # the scale and shift of a group normalisation
)
SOFTMAX = Float32Region(
    "the softmax alone, with its mask; Q Kᵀ and the product with V are fp16, or TensorRT loses its fused kernel",
    frozenset({"Softmax"}),
    frozenset({"Where"}),
)
SAMPLER = Float32Region(
    "state, table, guidance and update add up over the steps, and guidance methods sum squares over a whole output; "
    "the sine and cosine of a timestep, a size or a guidance scale need all its digits",
    frozenset({"state", "table", "noise", "next_state", "latents", "clean_latents", "sizes"}),
    frozenset({"Add", "Clip", "Cos", "Div", "Greater", "Max", "Min", "Mul", "Pad", "ReduceMean", "ReduceSum", "Sin",
               "Sqrt", "Sub", "Where"}),
)  # fmt: skip
SIGNATURE = Float32Region("what goes in and out is float32", frozenset({"embeddings", "pooled"}))
SCALING = Float32Region("the latents come in float32 and are scaled before they are cast", frozenset({"latents"}),
                 frozenset({"Div"}))  # fmt: skip
LEVELS = Float32Region(
    "fp16 cannot tell the grey levels of a bright pixel apart before they are rounded",
    frozenset({"image"}),
    frozenset({"Add", "Clip", "Div", "Mul", "Round"}),
)
RESIZE = Float32Region(
    "the resize is exact in whole numbers and 22 bits, and the normalisation of pixels follows it",
    frozenset({"image", "resize_columns", "resize_rows"}),
    frozenset({"Add", "Clip", "Div", "Floor", "MatMul", "Mul", "Round", "Sub"}),
)
LOGITS = Float32Region("fp16 has a step of 1/128 at 10, which would tie the best candidates", frozenset({"logits"}),
                frozenset({"ArgMax", "Gemm", "Where"}))  # fmt: skip

REGIONS: Mapping[str, tuple[Float32Region, ...]] = {
    "encode_text": (NORMALISATION, SOFTMAX, SIGNATURE),
    "denoise": (SAMPLER, SIGNATURE, NORMALISATION, SOFTMAX),
    "decode_latents": (SCALING, LEVELS, NORMALISATION, SOFTMAX),
    "encode_image": (RESIZE, NORMALISATION, SOFTMAX),
    "caption_step": (LOGITS, NORMALISATION, SOFTMAX),
}


def outside_regions(model: ir.Model, regions: Collection[Float32Region], kept: Collection[str] = ()) -> list[str]:
    """The nodes with float32 operands or results that lie in no stated region, as ``operator output``.

    ``kept`` are the values put back to float32 because they overflow: what is connected to one is stated by that.
    A Cast of float32 weights to fp16 lies outside too, for such weights should be stored as fp16.
    """
    infer_types(model)
    varying = set(model.graph.inputs)
    connected: list[tuple[set[ir.Value], list[ir.Node]]] = []
    stray = []
    for node in model.graph:
        operands = [value for value in node.inputs if value is not None]
        if not any(value in varying for value in operands):
            if node.op_type == "Cast" and operands[0].dtype == SINGLE:
                stray.append(node)
            continue
        varying.update(node.outputs)
        touched = {value for value in [*operands, *node.outputs] if value in varying and value.dtype == SINGLE}
        if not touched:
            continue
        nodes = [node]
        for earlier in [earlier for earlier in connected if not touched.isdisjoint(earlier[0])]:
            connected.remove(earlier)
            touched |= earlier[0]
            nodes = earlier[1] + nodes
        connected.append((touched, nodes))
    for values, nodes in connected:
        ends = {v.name for v in [*model.graph.inputs, *model.graph.outputs] if _touches(v, nodes)}
        put_back = any(value.name in kept for value in values)
        if not put_back and not any(_holds(region, nodes, ends) for region in regions):
            stray += nodes
    return [f"{node.op_type} {node.outputs[0].name}" for node in stray]


def _touches(end: ir.Value, nodes: list[ir.Node]) -> bool:
    return any(value is end for node in nodes for value in [*node.inputs, *node.outputs])


def _holds(region: Float32Region, nodes: list[ir.Node], ends: set[str | None]) -> bool:
    operators = {node.op_type for node in nodes}
    marked = not region.marks.isdisjoint(operators) or not region.marks.isdisjoint(ends)
    return marked and operators <= region.marks | region.operators | _MOVES
