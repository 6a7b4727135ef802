"""All passes in their order: the graph of a plan for ONNX Runtime's CUDA provider."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common as passes

from dnp.engine.backends.onnxruntime.passes.activations import fuse_bias_gelu, fuse_geglu, fuse_quick_gelu
from dnp.engine.backends.onnxruntime.passes.attention import fuse_attention, separate_packed_heads
from dnp.engine.backends.onnxruntime.passes.convolutions import (
    add_biases_last,
    convolutions_to_products,
    fuse_residual,
    join_biases,
    repeat_channels_last,
)
from dnp.engine.backends.onnxruntime.passes.definitions import define, inlined
from dnp.engine.backends.onnxruntime.passes.normalization import (
    fuse_biased_layer_norm,
    fuse_group_norm,
    fuse_skip_group_norm,
    fuse_skip_layer_norm,
    narrow_layer_norm,
)
from dnp.engine.backends.onnxruntime.passes.products import fuse_bias_add, join_products
from dnp.engine.backends.onnxruntime.passes.sizes import fix_sizes

PASSES: Final[dict[str, Callable[[ir.Model], int]]] = {
    "packed heads": separate_packed_heads,
    "attention": fuse_attention,
    "group norm": fuse_group_norm,
    "joined biases": join_biases,
    "skip group norm": fuse_skip_group_norm,
    "convolution and residual": fuse_residual,
    "products of places": convolutions_to_products,
    "biases of convolutions": add_biases_last,
    "larger images": repeat_channels_last,
    "layer norm": narrow_layer_norm,
    "skip layer norm": fuse_skip_layer_norm,
    "biased layer norm": fuse_biased_layer_norm,
    "GEGLU": fuse_geglu,
    "bias Gelu": fuse_bias_gelu,
    "QuickGelu": fuse_quick_gelu,
    "bias and residual": fuse_bias_add,
    "joined products": join_products,
}


def rewrite(
    model: ir.Model, sizes: Mapping[str, int], step: Callable[[int, str], None] = lambda done, name: None
) -> dict[str, int]:
    """Rewrite an fp16 graph for ONNX Runtime's CUDA kernels, with some of its sizes fixed; in place.

    ``step`` is told before each pass how many are done, from 1 on, and its name. Returns how often each found its
    pattern. Raises BundleError as ``fix_sizes``.
    """
    inlined(model)
    fix_sizes(model, sizes)
    found = {}
    for done, (name, run) in enumerate(PASSES.items(), start=1):
        step(done, name)
        found[name] = run(model)
        passes.RemoveUnusedNodesPass()(model)
    for value in [value for node in model.graph for value in node.outputs if not value.is_graph_output()]:
        value.shape = value.type = None  # readers infer them; names of free sizes are this package's own
    define(model)
    return found
