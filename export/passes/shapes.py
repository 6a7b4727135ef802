"""Shapes that a graph computes at run time, written so that little is left to compute, and nothing for a fixed image.

torch asks for every size that is not fixed when it traces: a chain of ``Shape``, arithmetic and ``Concat`` before a
``Reshape``. Its sizes are known as expressions, so most entries can be said without: 0 for a size that stays, -1 for
one that follows from the others. What is left depends on height, width and the length of the text alone, and compilers
fold it once those are fixed. A graph with shapes to compute is captured by no CUDA graph: ONNX Runtime puts them on the
processor.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

Dims = list[int | str | None]  # sizes, the expressions of those that are not fixed, None for what is not known


_OPERATORS: Mapping[type[ast.operator], str] = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.FloorDiv: "Div"}


def settle_shapes(model: ir.Model) -> None:
    """Rewrite the target of every ``Reshape`` of ``model``, in place, and drop what has no user any more.

    Values have the shapes that torch gave them.
    """
    writer = _Writer(model.graph)
    for node in list(model.graph):
        if node.op_type == "Reshape":
            writer.settle(node)
    passes.RemoveUnusedNodesPass()(model)


class _Writer:
    """Makes targets, each once: the same target, or size in one, is the same value throughout the graph.

    Sizes are read from the graph's inputs, whose shapes are the first to be fixed.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[int | str | None, ...], ir.Value] = {}
        self._places: dict[str, tuple[ir.Value, int]] = {}  # of sizes in the inputs: a value and its axis
        for value in graph.inputs:
            for axis, dim in enumerate(_dims(value)):
                if isinstance(dim, str):
                    self._places.setdefault(_plain(dim), (value, axis))

    def settle(self, reshape: ir.Node) -> None:
        """Give ``reshape`` a target with as few sizes as can be; leave it as it is when its sizes are not known."""
        data, target = reshape.inputs
        (result,) = reshape.outputs
        assert data is not None and target is not None
        before, after = _dims(data), _dims(result)
        if not after or None in after:
            after = _asked(target)
        if not after or None in after:
            return
        result.shape = ir.Shape(after)
        if len(before) == len(after) == 1:  # torch makes lists of lists for some operators
            result.replace_all_uses_with(data, replace_graph_outputs=True)
            return
        settled = [
            0 if isinstance(dim, str) and dim in before[axis : axis + 1] else dim for axis, dim in enumerate(after)
        ]
        open_ = [axis for axis, dim in enumerate(settled) if isinstance(dim, str)]
        if open_ == [0, 1] and all(self._counts(settled[axis]) for axis in open_):
            # The images, and how many rows each has. Said the other way round, TensorRT would plan for as many rows of
            # each image as there can be rows, and for as many images.
            settled[1] = -1
        elif 0 in open_:
            settled[0] = -1  # it counts images or rows, which are never fixed
        elif len(open_) == 1:
            settled[open_[0]] = -1  # of height and width both are said, or who infers shapes finds neither
        try:
            reshape.replace_input_with(1, self._target(settled, reshape))
        except LookupError:  # an expression of another kind: torch has written it, too
            return
        reshape.attributes.pop("allowzero", None)

    def _counts(self, dim: int | str | None) -> bool:
        """Whether a size counts images or rows, which the first axis of the graph's inputs does."""
        symbols = {node.id for node in ast.walk(ast.parse(str(dim))) if isinstance(node, ast.Name)}
        return symbols <= {symbol for symbol, (_, axis) in self._places.items() if axis == 0}

    def _target(self, dims: Dims, reshape: ir.Node) -> ir.Value:
        key = tuple(dims)
        if key not in self._made:
            numbers = [dim for dim in dims if isinstance(dim, int)]
            if len(numbers) == len(dims):
                self._made[key] = self._constant(numbers)
            else:
                parts = [self._size(d, reshape) if isinstance(d, str) else self._constant([d or 0]) for d in dims]
                self._made[key] = self._insert(reshape, "Concat", parts, {"axis": 0})
        return self._made[key]

    def _size(self, dim: str, reshape: ir.Node) -> ir.Value:
        """The size that the expression ``dim`` gives, one entry. Raises LookupError."""
        key = ("size", _plain(dim))
        if key not in self._made:
            if key[1] in self._places:
                value, axis = self._places[key[1]]
                self._made[key] = self._insert(reshape, "Shape", [value], {"start": axis, "end": axis + 1})
            else:
                tree = ast.parse(dim, mode="eval").body
                if isinstance(tree, ast.Constant):
                    return self._constant([int(str(tree.value))])
                if not isinstance(tree, ast.BinOp):
                    raise LookupError(dim)
                sides = [self._size(ast.unparse(side), reshape) for side in (tree.left, tree.right)]
                self._made[key] = self._insert(reshape, _OPERATORS[type(tree.op)], sides, {})
        return self._made[key]

    def _constant(self, numbers: list[int]) -> ir.Value:
        name = f"shape_{'_'.join(map(str, numbers))}"
        if name not in self._graph.initializers:
            value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, np.int64), name=name))
            self._graph.register_initializer(value)
        return self._graph.initializers[name]

    def _insert(
        self, before: ir.Node, operator: str, inputs: list[ir.Value], attributes: Mapping[str, int]
    ) -> ir.Value:
        node = ir.node(operator, inputs, dict(attributes))
        node.outputs[0].name, node.outputs[0].type = f"size_{len(self._made)}", ir.TensorType(ir.DataType.INT64)
        self._graph.insert_before(before, node)
        return node.outputs[0]


def _plain(dim: str) -> str:
    """An expression without needless brackets."""
    return ast.unparse(ast.parse(dim, mode="eval"))


def _dims(value: ir.Value) -> Dims:
    """The sizes of ``value``; none at all when its rank is not known."""
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]


def _asked(target: ir.Value) -> Dims:
    """The sizes in ``target`` where it is the shape of a value, as behind torch's group normalisation."""
    node = target.producer()
    if node is None or node.op_type != "Shape" or node.inputs[0] is None:
        return []
    whole = "end" not in node.attributes and not node.attributes.get_int("start", 0)
    return _dims(node.inputs[0]) if whole else []
