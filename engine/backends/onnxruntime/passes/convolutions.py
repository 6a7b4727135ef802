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
    image_shape,
    is_biased_convolution,
    is_constant,
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
        sizes = shape(total.outputs[0], 4)
        require(sizes[1] in BIAS_ADD_WIDTHS)
        value, skip = operands(total, lambda operand: is_biased_convolution(operand) and shape(operand, 4) == sizes)
        require(shape(skip, 4) == sizes and skip.dtype == HALF)
        convolution = maker(value, "Conv")
        write = Writer(total)
        one, other = (as_tokens(write, part) for part in (without_bias(convolution), skip))
        summed = write("BiasAdd", [one, convolution.inputs[2], other], domain=DOMAIN)
        replace(total.outputs[0], as_image(write, summed, total.outputs[0]))

    return matches(model, "Add", rewrite)


def add_biases_last(model: ir.Model) -> int:
    """Add what biases convolutions still have with the channels last: the kernel for it is faster than cuDNN's.

    It is done over ``[B, h·w, C]``, where ONNX Runtime does not put the bias back into the convolution.
    """

    def rewrite(convolution: ir.Node) -> None:
        value = convolution.outputs[0]
        require(not convolution.domain and len(convolution.inputs) == 3 and is_constant(convolution.inputs[2]))
        require(value.dtype == HALF and not value.is_graph_output())
        bare = without_bias(convolution)
        write = Writer(convolution)
        summed = write("Add", [as_tokens(write, bare), convolution.inputs[2]])
        replace(value, as_image(write, summed, value))

    return matches(model, "Conv", rewrite)


def repeat_channels_last(model: ir.Model) -> int:
    """Make an image larger by a whole number, each place repeated, as copies of rows with the channels last.

    ONNX Runtime resizes with the channels first alone, and would turn the image for it and back.
    """

    def rewrite(resize: ir.Node) -> None:
        require(resize.attributes.get_string("mode", "nearest") == "nearest")
        source, result = resize.inputs[0], resize.outputs[0]
        _, channels, height, width = image_shape(source)
        _, same, tall, wide = image_shape(result)
        assert source is not None
        require(source.dtype == HALF and channels == same)
        require(tall % height == 0 and wide % width == 0)
        how = [resize.attributes.get_string(name, usual) for name, usual in _REPEATS.items()]
        require(tuple(how) in (("asymmetric", "floor"), ("half_pixel", "round_prefer_floor")))
        write = Writer(resize)
        image = write.transposed(source, TO_LAST)
        columns = write("Concat", [image] * (wide // width), axis=3)
        flat = write("Reshape", [columns, write.weight(np.array([0, height, wide * channels]), "rows")])
        rows = write("Concat", [flat] * (tall // height), axis=2)
        whole = write("Reshape", [rows, write.weight(np.array([0, tall, wide, channels]), "image")])
        replace(result, write("Transpose", [whole], perm=TO_FIRST))

    return matches(model, "Resize", rewrite)


_REPEATS = {"coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_floor"}


def as_tokens(write: Writer, image: ir.Value | None) -> ir.Value:
    """``[B, C, h, w]`` as ``[B, h·w, C]``."""
    batch, channels, height, width = image_shape(image)
    assert image is not None
    moved = write.transposed(image, TO_LAST)
    tokens: ir.Value = write("Reshape", [moved, write.weight(np.array([0, height * width, channels]), "tokens")])
    tokens.type, tokens.shape = image.type, ir.Shape([batch, height * width, channels])
    return tokens


def as_image(write: Writer, tokens: ir.Value, like: ir.Value) -> ir.Value:
    """``[B, h·w, C]`` as the image ``like``, ``[B, C, h, w]``."""
    _, channels, height, width = shape(like, 4)
    image = write("Reshape", [tokens, write.weight(np.array([0, height, width, channels]), "image")])
    whole: ir.Value = write("Transpose", [image], perm=TO_FIRST)
    return whole


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
        source = convolution.inputs[0]
        require(convolution.outputs[0].dtype == HALF)
        _, channels, height, width = image_shape(source)
        after = user(convolution.outputs[0], "Transpose")
        require(order(after) == TO_LAST)
        result = after.outputs[0]
        _, _, _, made = shape(after.outputs[0], 4)
        tokens = height * width
        write = Writer(convolution)
        if _is_from_tokens(source):
            value = maker(maker(source, "Transpose").inputs[0], "Reshape").inputs[0]
        else:
            require(len(convolution.inputs) == 3)  # it comes from an image, and goes to tokens
            flat = user(after.outputs[0], "Reshape")
            require(shape(flat.outputs[0], 3)[1:] == [tokens, made])
            result = flat.outputs[0]
            value = as_tokens(write, source)
        weights = constant(convolution.inputs[1]).reshape(-1, channels).T
        product = write("MatMul", [value, write.weight(weights, "weights")])
        product.type, product.shape = result.type, ir.Shape([shape(source, 4)[0], tokens, made])
        if len(convolution.inputs) == 3:
            product = write("Add", [product, convolution.inputs[2]], product)
        if len(shape(result, len(result.shape or []))) == 4:
            product = write("Reshape", [product, write.weight(np.array([0, height, width, made]), "image")])
        replace(result, product)

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
