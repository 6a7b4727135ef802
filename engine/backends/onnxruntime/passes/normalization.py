"""Normalisations as one node each, in fp16 with sums in float32; with the residual before them where there is one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dnp.engine.backends.onnxruntime.passes.definitions import DOMAIN
from dnp.engine.backends.onnxruntime.passes.patterns import (
    HALF,
    TO_FIRST,
    TO_LAST,
    Array,
    NoMatchError,
    Writer,
    constant,
    is_biased_convolution,
    is_last_axis,
    maker,
    matches,
    operands,
    order,
    replace,
    require,
    shape,
    size_of,
    user,
    without_bias,
)

_MOST_OF_A_GROUP = 512  # channels that ONNX Runtime's kernel takes in one block


def fuse_group_norm(model: ir.Model) -> int:
    """Make one ``GroupNorm`` of every group normalisation of fp16 values ``[B, C, h, w]``, and of SiLU behind it.

    torch writes it as InstanceNormalization in float32 between Casts. The node takes and gives channels last, so that
    it lies between two Transposes, which ``prefer_nhwc`` cancels against those of the convolutions. Flat values, ``[B,
    C, tokens]``, are taken as an image of one row.
    """

    def rewrite(instance: ir.Node) -> None:
        grouped = maker(instance.inputs[0], "Reshape")
        wide = maker(grouped.inputs[0], "Cast")
        source = wide.inputs[0]
        require(source is not None and source.dtype == HALF and source.shape is not None)
        assert source is not None and source.shape is not None
        sizes = shape(source, len(source.shape))
        require(len(sizes) in (3, 4))
        _, groups, _ = shape(instance.inputs[0], 3)
        channels = sizes[1]
        require(isinstance(groups, int) and isinstance(channels, int))
        assert isinstance(groups, int) and isinstance(channels, int)
        require(shape(instance.inputs[0], 3)[0] == sizes[0] and channels % groups == 0)
        # the kernel takes two channels at a time
        require(channels // groups % 2 == 0 and channels // groups <= _MOST_OF_A_GROUP)
        require(bool((constant(instance.inputs[1]) == 1).all()) and not constant(instance.inputs[2]).any())
        back = user(instance.outputs[0], "Reshape")
        require(shape(back.outputs[0], len(sizes)) == sizes)
        scaled = user(back.outputs[0], "Mul")
        shifted = user(scaled.outputs[0], "Add")
        gamma = _per_channel(scaled, back.outputs[0], channels, len(sizes))
        beta = _per_channel(shifted, scaled.outputs[0], channels, len(sizes))
        narrow = user(shifted.outputs[0], "Cast")
        require(narrow.outputs[0].dtype == HALF)
        last, result, silu = narrow, narrow.outputs[0], False
        if (product := _silu(result)) is not None:
            last, result, silu = product, product.outputs[0], True
        write = Writer(last)
        flat = len(sizes) == 3
        value = source
        if flat:
            value = write("Reshape", [source, write.weight(np.array([0, channels, 1, -1]), "image")])
            value.shape, value.type = ir.Shape([sizes[0], channels, 1, sizes[2]]), source.type
        moved = write.transposed(value, TO_LAST)
        weights = [write.weight(array, what) for array, what in ((gamma, "gamma"), (beta, "beta"))]
        normal = write(
            "GroupNorm",
            [moved, *weights],
            moved,
            domain=DOMAIN,
            activation=int(silu),
            channels_last=1,
            epsilon=instance.attributes.get_float("epsilon", 1e-5),
            groups=groups,
        )
        first = write.transposed(normal, TO_FIRST)
        if flat:
            first = write("Reshape", [first, write.weight(np.array([0, channels, -1]), "flat")])
        replace(result, first)

    return matches(model, "InstanceNormalization", rewrite)


def _per_channel(node: ir.Node, value: ir.Value, channels: int, rank: int) -> Array:
    """What ``node`` combines ``value`` with: a constant number for each channel, in float32."""
    _, other = operands(node, lambda operand: operand is value)
    found = constant(other)
    require(found.dtype == np.float32 and found.shape[-rank + 1 :] == (channels, *[1] * (rank - 2)))
    require(found.size == channels)
    return found.reshape(channels)


def _silu(value: ir.Value) -> ir.Node | None:
    """The node that makes ``value · sigmoid(value)``, where nobody takes the value for anything else."""
    users = value.consumers()
    if len(users) != 2 or value.is_graph_output() or {node.op_type for node in users} != {"Sigmoid", "Mul"}:
        return None
    gate, product = users if users[0].op_type == "Sigmoid" else users[::-1]
    return product if list(gate.outputs[0].consumers()) == [product] else None


def fuse_skip_group_norm(model: ir.Model) -> int:
    """Take the sum before a ``GroupNorm`` into it: a residual, or a number for each channel such as that of the time.

    The bias of a convolution before the sum goes with it. The sum itself is a second result, where somebody takes it.
    """

    def rewrite(norm: ir.Node) -> None:
        require(norm.domain == DOMAIN)
        before = maker(norm.inputs[0], "Transpose")
        total = maker(before.inputs[0], "Add")
        after = user(norm.outputs[0], "Transpose")
        require(order(before) == TO_LAST and order(after) == TO_FIRST)
        sizes = shape(total.outputs[0], 4)
        value, skip = operands(total, lambda operand: is_biased_convolution(operand) and shape(operand, 4) == sizes)
        write = Writer(total)
        if shape(skip, 4) == sizes:
            skip_last = None
        else:
            require(shape(skip, 4) == [*sizes[:2], 1, 1])
            skip_last = _flat(skip, sizes[:2])
        convolution = maker(value, "Conv")
        inputs = [
            write.transposed(without_bias(convolution), TO_LAST),
            norm.inputs[1],
            norm.inputs[2],
            write.transposed(skip, TO_LAST) if skip_last is None else skip_last,
            convolution.inputs[2],
        ]
        normal, summed = write("SkipGroupNorm", inputs, norm.outputs[0], norm.outputs[0], domain=DOMAIN)
        for name, attribute in norm.attributes.items():
            normal.producer().attributes[name] = attribute
        replace(after.outputs[0], write.transposed(normal, TO_FIRST))
        takers = [node for node in total.outputs[0].consumers() if node is not before]
        if takers or total.outputs[0].is_graph_output():
            replace(total.outputs[0], write.transposed(summed, TO_FIRST))
        else:
            summed.name = ""  # nobody asks for it

    return matches(model, "GroupNorm", rewrite)


def _flat(skip: ir.Value, sizes: list[int | str]) -> ir.Value:
    """``[B, C, 1, 1]`` as the ``[B, C]`` that it was made of."""
    value: ir.Value | None = skip
    while value is not None and (node := value.producer()) is not None and node.op_type == "Unsqueeze":
        value = node.inputs[0]
        if value is not None and value.shape is not None and len(value.shape) == 2:
            require(shape(value, 2) == sizes)
            return value
    raise NoMatchError


def narrow_layer_norm(model: ir.Model) -> int:
    """Have layer normalisation take and give fp16, where it is cast to float32 for it and back: its sums are anyway.

    Scale and bias must be numbers that fp16 holds exactly.
    """

    def rewrite(norm: ir.Node) -> None:
        require(len(norm.inputs) == 3 and norm.attributes.get_int("stash_type", 1) == 1)
        source = maker(norm.inputs[0], "Cast").inputs[0]
        narrow = user(norm.outputs[0], "Cast")
        require(source is not None and source.dtype == HALF and narrow.outputs[0].dtype == HALF)
        write = Writer(narrow)
        weights = []
        for value, what in zip(norm.inputs[1:], ("scale", "bias"), strict=True):
            exact = constant(value)
            with np.errstate(over="ignore"):
                half = exact.astype(np.float16)
            require(bool((half.astype(exact.dtype) == exact).all()))
            weights.append((half, what))
        inputs = [source, *(write.weight(half, what) for half, what in weights)]
        normal = write(
            "LayerNormalization",
            inputs,
            axis=norm.attributes.get_int("axis", -1),
            epsilon=norm.attributes.get_float("epsilon", 1e-5),
            stash_type=1,
        )
        replace(narrow.outputs[0], normal)

    return matches(model, "LayerNormalization", rewrite)


def fuse_skip_layer_norm(model: ir.Model) -> int:
    """Take the residual before a layer normalisation into it, and the bias of the product that is added to it.

    The sum is another result, where somebody takes it.
    """

    def rewrite(norm: ir.Node) -> None:
        require(len(norm.inputs) == 3 and is_last_axis(norm, 3) and len(norm.outputs) == 1)
        total = maker(norm.inputs[0], "Add")
        sizes = shape(total.outputs[0], 3)
        require(total.outputs[0].dtype == HALF)
        biased, skip = operands(total, lambda operand: is_biased_product(operand) and shape(operand, 3) == sizes)
        require(shape(skip, 3) == sizes and all(value is not None and value.dtype == HALF for value in norm.inputs))
        product, bias = product_and_bias(biased)
        width = sizes[2]
        require(all(size_of(value) == (width,) for value in norm.inputs[1:]))
        write = Writer(total)
        normal, _, _, summed = write(
            "SkipLayerNormalization",
            [product, skip, norm.inputs[1], norm.inputs[2], bias],
            *[total.outputs[0]] * 4,
            domain=DOMAIN,
            epsilon=norm.attributes.get_float("epsilon", 1e-5),
        )
        node = normal.producer()
        node.outputs[1].name = node.outputs[2].name = ""
        replace(norm.outputs[0], normal)
        if any(taker is not norm for taker in total.outputs[0].consumers()) or total.outputs[0].is_graph_output():
            replace(total.outputs[0], summed)
        else:
            summed.name = ""

    return matches(model, "LayerNormalization", rewrite)


def fuse_biased_layer_norm(model: ir.Model) -> int:
    """Take the bias of a product before a layer normalisation into it, with a residual of zeros: there is no kernel
    for the bias alone, and this one is faster besides.
    """
    zeros: dict[tuple[int, ...], ir.Value] = {}

    def rewrite(norm: ir.Node) -> None:
        require(len(norm.inputs) == 3 and is_last_axis(norm, 3) and len(norm.outputs) == 1)
        total = maker(norm.inputs[0], "Add")
        _, tokens, width = shape(total.outputs[0], 3)
        product, bias = product_and_bias(total.outputs[0])
        require(all(value is not None and value.dtype == HALF for value in norm.inputs))
        require(isinstance(tokens, int) and all(size_of(value) == (width,) for value in norm.inputs[1:]))
        write = Writer(total)
        size = (1, int(tokens), int(width))
        if size not in zeros:
            zeros[size] = write.weight(np.zeros(size, np.float16), "zeros")
        normal, _, _, summed = write(
            "SkipLayerNormalization",
            [product, zeros[size], norm.inputs[1], norm.inputs[2], bias],
            *[total.outputs[0]] * 4,
            domain=DOMAIN,
            epsilon=norm.attributes.get_float("epsilon", 1e-5),
        )
        node = normal.producer()
        node.outputs[1].name = node.outputs[2].name = ""
        replace(norm.outputs[0], normal)
        replace(total.outputs[0], summed)

    return matches(model, "LayerNormalization", rewrite)


def is_biased_product(value: ir.Value) -> bool:
    """Whether ``value`` is a product with a bias, and is taken once."""
    try:
        product_and_bias(value)
    except NoMatchError:
        return False
    return len(value.uses()) == 1 and not value.is_graph_output()


def product_and_bias(value: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """The product, which nobody else takes, and the bias of its last axis, that ``value`` is the sum of; in fp16."""
    total = maker(value, "Add")
    product, bias = operands(total, lambda operand: _made_by(operand, "MatMul"))
    require(product.dtype == HALF and len(product.uses()) == 1 and not product.is_graph_output())
    width = None if product.shape is None else product.shape[-1]
    require(isinstance(width, int) and size_of(bias) == (width,))
    return product, bias


def _made_by(value: ir.Value, operator: str) -> bool:
    node = value.producer()
    return node is not None and node.op_type == operator and not node.domain
