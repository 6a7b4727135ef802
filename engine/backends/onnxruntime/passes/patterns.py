"""What all passes match with: who makes a value, who takes it, what it holds; and how nodes are put in their place.

What does not match raises ``NoMatchError``, so that a pattern reads from top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # how the channels of an image [B, C, h, w] move
BIAS_ADD_WIDTHS = (320, 640, 1280)  # those that ONNX Runtime's kernel is made for


class NoMatchError(LookupError):
    """These nodes are not the pattern."""


def require(condition: bool) -> None:
    """Raises NoMatchError unless ``condition`` holds."""
    if not condition:
        raise NoMatchError


def maker(value: ir.Value | None, *operators: str) -> ir.Node:
    """The node that makes ``value``, which is one of ``operators``."""
    node = None if value is None else value.producer()
    if node is None or node.op_type not in operators:
        raise NoMatchError
    return node


def user(value: ir.Value, *operators: str) -> ir.Node:
    """The only node that takes ``value``, and takes it once."""
    uses = list(value.uses())
    require(len(uses) == 1 and not value.is_graph_output() and uses[0].node.op_type in operators)
    return uses[0].node


def constant(value: ir.Value | None) -> Array:
    """What a constant holds, in the dtype that it is used in: a weight may be stored in fp16 and cast to float32."""
    require(value is not None)
    assert value is not None
    found = ir.convenience.get_const_tensor(value)
    if found is not None:
        return found.numpy()
    cast = maker(value, "Cast")
    dtype = ir.DataType(cast.attributes["to"].as_int())
    return constant(cast.inputs[0]).astype(dtype.numpy())


def number(value: ir.Value | None) -> float:
    """What a constant of one element holds."""
    found = constant(value)
    require(found.size == 1)
    return float(found.item())


def is_constant(value: ir.Value | None) -> bool:
    """Whether ``constant`` gives something, without reading it."""
    while value is not None and ir.convenience.get_const_tensor(value) is None:
        node = value.producer()
        if node is None or node.op_type != "Cast":
            return False
        value = node.inputs[0]
    return value is not None


def size_of(value: ir.Value | None) -> tuple[int, ...]:
    """The shape of a constant, without reading it."""
    require(is_constant(value))
    assert value is not None
    found = ir.convenience.get_const_tensor(value)
    return size_of(maker(value, "Cast").inputs[0]) if found is None else tuple(found.shape.numpy())


def shape(value: ir.Value | None, rank: int) -> list[int | str]:
    """The shape of ``value``: every size is a number, or a name that stands for the same size wherever it appears."""
    require(value is not None and value.shape is not None and len(value.shape) == rank)
    assert value is not None and value.shape is not None
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    require(None not in sizes)
    return [size for size in sizes if size is not None]


def image_shape(value: ir.Value | None) -> tuple[int | str, int, int, int]:
    """The shape ``[B, C, h, w]`` of ``value``, in which all but B are numbers."""
    batch, channels, height, width = shape(value, 4)
    require(isinstance(channels, int) and isinstance(height, int) and isinstance(width, int))
    return batch, int(channels), int(height), int(width)


def operands(node: ir.Node, wanted: Callable[[ir.Value], bool]) -> tuple[ir.Value, ir.Value]:
    """The operand of a commutative node that is ``wanted``, and the other one; the first when both are."""
    require(len(node.inputs) == 2 and None not in node.inputs)
    for one, other in (node.inputs, node.inputs[::-1]):
        assert one is not None and other is not None
        if wanted(one):
            return one, other
    raise NoMatchError


def order(transpose: ir.Node) -> tuple[int, ...]:
    """The permutation of a Transpose."""
    require("perm" in transpose.attributes)
    return tuple(transpose.attributes["perm"].as_ints())


def is_last_axis(node: ir.Node, rank: int, default: int = -1) -> bool:
    """Whether the node works along the last of ``rank`` axes."""
    return node.attributes.get_int("axis", default) in (-1, rank - 1)


def is_biased_convolution(value: ir.Value) -> bool:
    """Whether ``value`` is what a convolution of fp16 values with a bias makes, and is taken once."""
    node = value.producer()
    if node is None or node.op_type != "Conv" or node.domain or len(node.inputs) != 3 or len(value.uses()) != 1:
        return False
    return value.dtype == HALF and is_constant(node.inputs[2]) and not value.is_graph_output()


def without_bias(convolution: ir.Node) -> ir.Value:
    """What a convolution makes before its bias."""
    bare: ir.Value = Writer(convolution)("Conv", convolution.inputs[:2], convolution.outputs[0])
    made = bare.producer()
    assert made is not None
    for name, attribute in convolution.attributes.items():
        made.attributes[name] = attribute
    return bare


def matches(model: ir.Model, operator: str, rewrite: Callable[[ir.Node], None]) -> int:
    """Offer ``rewrite`` every node of a kind, in the graph's order; returns how many it did not refuse."""
    found = 0
    for node in list(model.graph):
        if node.op_type == operator and node.graph is not None:
            try:
                rewrite(node)
            except NoMatchError:
                continue
            found += 1
    return found


class Writer:
    """Puts new nodes before one that is there, with names of their own, and shapes and dtypes where they are known."""

    def __init__(self, before: ir.Node) -> None:
        assert before.graph is not None
        self._graph, self._before = before.graph, before

    def __call__(
        self, operator: str, inputs: Iterable[ir.Value | None], *like: ir.Value, domain: str = "", **attributes: Any
    ) -> Any:
        """A new node: its output, or outputs, of the shapes and dtypes of ``like``."""
        node = ir.node(operator, list(inputs), attributes, domain=domain, num_outputs=max(1, len(like)))
        self._graph.insert_before(self._before, node)
        for output, known in zip(node.outputs, like, strict=False):
            output.shape, output.type = known.shape, known.type
        for output in node.outputs:
            output.name = self._name(f"{operator}.{output.index()}")
        return node.outputs[0] if len(node.outputs) == 1 else node.outputs

    def transposed(self, value: ir.Value, perm: tuple[int, ...]) -> ir.Value:
        """``value`` with its axes in another order, its shape known where the value's is."""
        result: ir.Value = self("Transpose", [value], perm=perm)
        result.type = value.type
        if value.shape is not None:
            result.shape = ir.Shape([value.shape[axis] for axis in perm])
        return result

    def weight(self, array: Array, what: str) -> ir.Value:
        """A new constant of the graph."""
        name = self._name(what)
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        assert isinstance(self._graph, ir.Graph)
        self._graph.register_initializer(value)
        return value

    def _name(self, what: str) -> str:
        assert isinstance(self._graph, ir.Graph)
        taken = self._graph.meta.setdefault("dnp.names", _numbers())
        return f"{what}.{next(taken)}"


def _numbers() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def replace(old: ir.Value, new: ir.Value) -> None:
    """Have everyone take ``new`` who took ``old``, which may be an output of the graph."""
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if new.is_graph_output():
        new.name, old.name = old.name, None
