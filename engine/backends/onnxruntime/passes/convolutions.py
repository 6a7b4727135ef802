"""What is added to convolutions, and those of one place, which are products: all with the channels last."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from dnp.engine.backends.onnxruntime.passes.definitions import DOMAIN
from dnp.engine.backends.onnxruntime.passes.patterns import (
    BIAS_ADD_WIDTHS,
    HALF,
    TO_FIRST,
    TO_LAST,
    Writer,
    constant,
    is_biased_convolution,
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


def join_biases(model: ir.Model) -> int:
    """Where two convolutions with a bias are added up, as with a shortcut, give one of them both biases."""

    def rewrite(total: ir.Node) -> None:
        require(all(value is not None and is_biased_convolution(value) for value in total.inputs))
        sizes = shape(total.outputs[0], 4)
        require(all(shape(value, 4) == sizes for value in total.inputs))
        first, second = (maker(value, "Conv") for value in total.inputs)
        require(first is not second)
        both = constant(first.inputs[2]).astype(np.float32) + constant(second.inputs[2]).astype(np.float32)
        write = Writer(first)
        first.replace_input_with(2, write.weight(both.astype(np.float16), "biases"))
        total.replace_input_with(1, without_bias(second))

    return matches(model, "Add", rewrite)


def fuse_residual(model: ir.Model) -> int:
    """Make one ``BiasAdd`` of a convolution's bias and a residual of the same size, as over ``[B, h·w, C]``."""

    def rewrite(total: ir.Node) -> None:
        batch, channels, height, width = shape(total.outputs[0], 4)
        require(channels in BIAS_ADD_WIDTHS and isinstance(height, int) and isinstance(width, int))
        assert isinstance(height, int) and isinstance(width, int) and isinstance(channels, int)
        sizes = [batch, channels, height, width]
        value, skip = operands(total, lambda operand: is_biased_convolution(operand) and shape(operand, 4) == sizes)
        require(shape(skip, 4) == sizes and skip.dtype == HALF)
        convolution = maker(value, "Conv")
        write = Writer(total)
        flat = write.weight(np.array([0, height * width, channels]), "flat")
        parts = [write.transposed(part, TO_LAST) for part in (without_bias(convolution), skip)]
        one, other = (write("Reshape", [part, flat]) for part in parts)
        summed = write("BiasAdd", [one, convolution.inputs[2], other], domain=DOMAIN)
        back = write("Reshape", [summed, write.weight(np.array([0, height, width, channels]), "image")])
        replace(total.outputs[0], write("Transpose", [back], perm=TO_FIRST))

    return matches(model, "Add", rewrite)


def convolutions_to_products(model: ir.Model) -> int:
    """Make a product of a convolution of one place that stands between an image and tokens, ``[B, h·w, C]``.

    It is one with the channels last; the Transposes about it go. A bias becomes an Add behind it.
    """

    def rewrite(convolution: ir.Node) -> None:
        require(not convolution.domain and size_of(convolution.inputs[1])[2:] == (1, 1))
        numbers = [convolution.attributes.get_ints(name, default) for name, default in _PLAIN.items()]
        require([tuple(found) for found in numbers] == list(_PLAIN.values()))
        require(convolution.attributes.get_int("group", 1) == 1)
        require(convolution.attributes.get_string("auto_pad", "NOTSET") == "NOTSET")
        source, result = convolution.inputs[0], convolution.outputs[0]
        require(result.dtype == HALF)
        _, channels, height, width = shape(source, 4)
        require(all(isinstance(size, int) for size in (channels, height, width)))
        after = user(result, "Transpose")
        require(order(after) == TO_LAST)
        _, _, _, made = shape(after.outputs[0], 4)
        tokens = int(height) * int(width)
        write = Writer(convolution)
        if _is_from_tokens(source):
            value = maker(maker(source, "Transpose").inputs[0], "Reshape").inputs[0]
        else:
            require(len(convolution.inputs) == 3)  # it comes from an image, and goes to tokens
            flat = user(after.outputs[0], "Reshape")
            require(len(shape(flat.outputs[0], 3)) == 3)
            moved = write.transposed(source, TO_LAST)
            value = write("Reshape", [moved, write.weight(np.array([0, tokens, channels]), "flat")])
        weights = constant(convolution.inputs[1]).reshape(made, channels).T
        product = write("MatMul", [value, write.weight(weights, "weights")])
        product.type, product.shape = result.type, ir.Shape([shape(source, 4)[0], tokens, made])
        if len(convolution.inputs) == 3:
            product = write("Add", [product, convolution.inputs[2]], product)
        image = write("Reshape", [product, write.weight(np.array([0, height, width, made]), "image")])
        replace(after.outputs[0], image)

    return matches(model, "Conv", rewrite)


_PLAIN = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1)}


def _is_from_tokens(value: ir.Value | None) -> bool:
    """Whether an image ``[B, C, h, w]`` was made of ``[B, h·w, C]``."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Transpose" or order(node) != TO_FIRST:
        return False
    cut = None if node.inputs[0] is None else node.inputs[0].producer()
    if cut is None or cut.op_type != "Reshape":
        return False
    whole, image = cut.inputs[0], node.inputs[0]
    if whole is None or whole.shape is None or image is None or image.shape is None or len(whole.shape) != 3:
        return False
    batch, height, width, channels = image.shape
    area = math.prod([height, width]) if isinstance(height, int) and isinstance(width, int) else None
    return list(whole.shape) == [batch, area, channels]
