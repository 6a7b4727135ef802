"""Products with what is added to them, and several products of one input as one."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import onnx_ir as ir

from dnp.engine.backends.onnxruntime.passes.definitions import DOMAIN
from dnp.engine.backends.onnxruntime.passes.normalization import is_biased_product, product_and_bias
from dnp.engine.backends.onnxruntime.passes.patterns import (
    BIAS_ADD_WIDTHS,
    HALF,
    NoMatchError,
    Writer,
    constant,
    is_constant,
    matches,
    operands,
    replace,
    require,
    shape,
    size_of,
)

_FEW_ROWS = 128  # of one image: a single tile of a product's rows
_MOST_PARTS = 32  # of a Split: beyond, ONNX Runtime copies a list of them from the host, which cannot be captured


def fuse_bias_add(model: ir.Model) -> int:
    """Make one ``BiasAdd`` of a product's bias and the residual behind it: ``[B, tokens, C]``, C of the kernel's."""

    def rewrite(total: ir.Node) -> None:
        sizes = shape(total.outputs[0], 3)
        require(sizes[2] in BIAS_ADD_WIDTHS and total.outputs[0].dtype == HALF)
        biased, skip = operands(total, lambda operand: is_biased_product(operand))
        require(shape(biased, 3) == sizes == shape(skip, 3))
        replace(total.outputs[0], Writer(total)("BiasAdd", [*product_and_bias(biased), skip], domain=DOMAIN))

    return matches(model, "Add", rewrite)


def join_products(model: ir.Model) -> int:
    """Make one product of those of the same input with weights of the same size, where the input has few rows.

    What is joined has to be copied apart again. With few rows the launches are what products cost, and one takes the
    place of many: queries, keys and values of a text; keys and values of all layers that look at one text; what all
    layers make of the time. With thousands of rows the copies would cost more than was saved.

    Returns how many products went.
    """
    found: dict[tuple[ir.Value, tuple[int, ...], str], list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        try:
            found[_kind(node)].append(node)
        except NoMatchError:
            continue
    gone = 0
    for (_, _, form), nodes in found.items():
        for start in range(0, len(nodes), _MOST_PARTS):
            part = nodes[start : start + _MOST_PARTS]
            if len(part) > 1:
                _join(part, form)
                gone += len(part) - 1
    return gone


def _kind(node: ir.Node) -> tuple[ir.Value, tuple[int, ...], str]:
    """What products must have in common to be joined: the input, the weight's size, and the form."""
    require(node.op_type in ("MatMul", "Gemm") and not node.domain and len(node.inputs) >= 2)
    source, weight = node.inputs[:2]
    require(source is not None and source.dtype == HALF and source.shape is not None and is_constant(weight))
    assert source is not None and source.shape is not None
    size = size_of(weight)
    rows = shape(source, len(source.shape))[1:-1]
    known = [row for row in rows if isinstance(row, int)]
    require(len(size) == 2 and known == rows and math.prod(known) <= _FEW_ROWS)
    if node.op_type == "MatMul":
        return source, size, "MatMul"
    flags = [node.attributes.get_int(name, 0) for name in ("transA", "transB")]
    factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    require(flags == [0, 1] and factors == [1.0, 1.0] and len(node.inputs) == 3)
    require(size_of(node.inputs[2]) == size[:1])
    return source, size, "Gemm"


def _join(nodes: list[ir.Node], form: str) -> None:
    first = nodes[0]
    source, outputs = first.inputs[0], [node.outputs[0] for node in nodes]
    write = Writer(first)
    axis = 1 if form == "MatMul" else 0
    whole = write.weight(np.concatenate([constant(node.inputs[1]) for node in nodes], axis), "weights")
    if form == "MatMul":
        biases = _biases(outputs)
        product = write("MatMul", [source, whole])
        if biases:
            product = write("Add", [product, write.weight(np.concatenate([constant(b) for b in biases]), "biases")])
            outputs = [output.consumers()[0].outputs[0] for output in outputs]
    else:
        bias = write.weight(np.concatenate([constant(node.inputs[2]) for node in nodes]), "biases")
        product = write("Gemm", [source, whole, bias], transB=1)
    parts = write("Split", [product], *outputs, axis=-1, num_outputs=len(nodes))
    for old, new in zip(outputs, parts, strict=True):
        replace(old, new)


def _biases(outputs: list[ir.Value]) -> list[ir.Value]:
    """The biases of products, where all have one; none where one has not."""
    biases = []
    for output in outputs:
        if len(output.uses()) != 1 or output.consumers()[0].op_type != "Add":
            return []
        try:
            biases.append(product_and_bias(output.consumers()[0].outputs[0])[1])
        except NoMatchError:
            return []
    return biases
