"""Activations as one node each, with the bias before them where there is one."""

from __future__ import annotations

import onnx_ir as ir

from dnp.engine.backends.onnxruntime.passes.definitions import DOMAIN
from dnp.engine.backends.onnxruntime.passes.normalization import product_and_bias
from dnp.engine.backends.onnxruntime.passes.patterns import (
    HALF,
    Writer,
    is_constant,
    is_last_axis,
    maker,
    matches,
    number,
    operands,
    replace,
    require,
    shape,
    user,
)

_GATED = (2560, 5120, 10240)  # the widths that ONNX Runtime's kernel is made for: those of Stable Diffusion 1, 2 and XL


def fuse_geglu(model: ir.Model) -> int:
    """Make one ``BiasSplitGelu`` of a bias, the cut into halves, and the left times Gelu of the right."""

    def rewrite(split: ir.Node) -> None:
        require(is_last_axis(split, 3, default=0) and len(split.outputs) == 2)
        left, right = split.outputs
        images, tokens, half = shape(left, 3)
        require(shape(right, 3) == [images, tokens, half] and isinstance(half, int) and 2 * half in _GATED)
        gate = user(right, "Gelu")
        require(_is_exact(gate))
        product = user(left, "Mul")
        require(user(gate.outputs[0], "Mul") is product)
        source, bias = product_and_bias(_taken_once(split.inputs[0]))
        replace(product.outputs[0], Writer(product)("BiasSplitGelu", [source, bias], domain=DOMAIN))

    return matches(model, "Split", rewrite)


def fuse_bias_gelu(model: ir.Model) -> int:
    """Make one ``BiasGelu`` of Gelu and the bias before it."""

    def rewrite(gelu: ir.Node) -> None:
        require(not gelu.domain and _is_exact(gelu))
        product, bias = product_and_bias(_taken_once(gelu.inputs[0]))
        replace(gelu.outputs[0], Writer(gelu)("BiasGelu", [product, bias], domain=DOMAIN))

    return matches(model, "Gelu", rewrite)


def fuse_quick_gelu(model: ir.Model) -> int:
    """Make one ``QuickGelu`` of ``x · sigmoid(αx)``; with α = 1 it is SiLU."""

    def rewrite(gate: ir.Node) -> None:
        product = user(gate.outputs[0], "Mul")
        value, _ = operands(product, lambda operand: operand is not gate.outputs[0])
        require(value.dtype == HALF)
        alpha = 1.0
        if gate.inputs[0] is not value:
            factor, other = operands(maker(_taken_once(gate.inputs[0]), "Mul"), is_constant)
            require(other is value)
            alpha = number(factor)
        replace(product.outputs[0], Writer(product)("QuickGelu", [value], domain=DOMAIN, alpha=alpha))

    return matches(model, "Sigmoid", rewrite)


def _taken_once(value: ir.Value | None) -> ir.Value:
    require(value is not None and len(value.uses()) == 1 and not value.is_graph_output())
    assert value is not None
    return value


def _is_exact(gelu: ir.Node) -> bool:
    return gelu.attributes.get_string("approximate", "none") == "none"
