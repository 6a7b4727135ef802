"""Sizes that are known before a graph runs: fixed ones are written in, and what is computed from them goes.

The shapes of all values are inferred by ONNX's own rules, node by node, with numbers for every symbol, twice, with
other numbers for the symbols that stay free. What is the same both times does not depend on the free symbols. Every
size in such a graph is a product of symbols and numbers, or a quotient, so that two sizes that are the same product
in both are the same in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common as passes

from dnp.engine.backends.onnxruntime.passes import BEAMS
from dnp.engine.backends.onnxruntime.passes.patterns import Array, Writer
from dnp.engine.errors import BundleError

_MOST: Final = 64  # elements of a value that is followed: shapes are short, weights are not
_PRIMES: Final = ((3, 5, 7, 11, 13, 17, 19, 23), (29, 31, 37, 41, 43, 47, 53, 59))


def fix_sizes(model: ir.Model, sizes: Mapping[str, int]) -> int:
    """Give the symbols in ``sizes`` these sizes, in the shapes of the inputs and wherever something is computed from
    them; all other symbols stay free. ``BEAMS`` is the number of sequences for each image.

    Afterwards every value has its shape: numbers, and names for what depends on a free symbol. Returns how many nodes
    went. Raises BundleError for a graph that does not hold together at these sizes.
    """
    before = len(model.graph)
    symbols = dict.fromkeys(
        str(size.value)
        for value in model.graph.inputs
        if value.shape is not None
        for size in value.shape
        if not isinstance(size, int)
    )
    free = [symbol for symbol in symbols if symbol not in sizes and not (symbol == "images" and BEAMS in sizes)]
    if len(free) > len(_PRIMES[0]):
        raise BundleError(f"the graph {model.graph.name!r} has {len(free)} free sizes, more than can be followed")
    trials = [_Trial(model, _with_images({**sizes, **_distinct(free, primes)})) for primes in _PRIMES]
    _write_shapes(model, trials, free)
    _fold(model, trials)
    _relate(model)
    passes.RemoveUnusedNodesPass()(model)
    return before - len(model.graph)


def _distinct(symbols: Sequence[str], primes: Sequence[int]) -> dict[str, int]:
    """A number for each symbol, every one a multiple of those behind it: rows of beams are a multiple of images."""
    found: dict[str, int] = {}
    product = 1
    for symbol, prime in zip(reversed(symbols), primes, strict=False):
        product *= prime
        found[symbol] = product
    return found


def _with_images(sizes: dict[str, int]) -> dict[str, int]:
    """The images of so many sequences, where it is fixed how many each has."""
    return {**sizes, "images": sizes["sequences"] // sizes[BEAMS]} if BEAMS in sizes else sizes


class _Trial:
    """All shapes, and the contents of what is computed from shapes alone, with a number for every symbol."""

    def __init__(self, model: ir.Model, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.shapes: dict[ir.Value, tuple[int, ...]] = {}
        self.types: dict[ir.Value, ir.DataType] = {}
        self.known: dict[ir.Value, Array] = {}
        self._opsets = [onnx.helper.make_opsetid(domain, number) for domain, number in model.opset_imports.items()]
        for value in model.graph.inputs:
            assert value.shape is not None and value.dtype is not None
            shape = [size if isinstance(size, int) else sizes[str(size.value)] for size in value.shape]
            self._note(value, shape, value.dtype)
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            self._note_tensor(value, value.const_value)
        for node in model.graph:
            try:
                self._infer(node)
            except Exception as error:
                told = str(error).strip().splitlines()
                raise BundleError(
                    f"the graph {model.graph.name!r} does not hold together at {dict(sizes)}: {node.op_type} "
                    f"{node.name!r}: {told[-1] if told else type(error).__name__}"
                ) from error

    def _note(self, value: ir.Value, shape: Sequence[int], dtype: ir.DataType) -> None:
        self.shapes[value], self.types[value] = tuple(shape), dtype

    def _note_tensor(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        shape = tuple(int(size) for size in tensor.shape.numpy())
        self._note(value, shape, tensor.dtype)
        if np.prod(shape) <= _MOST:
            self.known[value] = tensor.numpy()

    def _infer(self, node: ir.Node) -> None:
        if node.op_type == "Constant":
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            assert tensor is not None
            self._note_tensor(node.outputs[0], tensor)
            return
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type == "Shape":
            start, end = (node.attributes.get_int(name, default) for name, default in (("start", 0), ("end", None)))
            assert node.inputs[0] is not None
            self._learn(node.outputs[0], np.array(self.shapes[node.inputs[0]][start:end], np.int64))
            return
        proto = ir.serde.serialize_node(node)
        if inputs and all(value in self.known for value in inputs) and self._is_short(node):
            graph = onnx.helper.make_graph(
                [proto],
                "one",
                [onnx.helper.make_tensor_value_info(str(v.name), int(self.types[v]), self.shapes[v]) for v in inputs],
                [onnx.ValueInfoProto(name=str(value.name)) for value in node.outputs],
            )
            evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=self._opsets))
            results = evaluator.run(None, {str(value.name): self.known[value] for value in inputs})
            for value, result in zip(node.outputs, results, strict=True):
                self._learn(value, np.asarray(result))
            return
        self._infer_shapes(node, proto, inputs)

    def _is_short(self, node: ir.Node) -> bool:
        """Whether what the node makes is as short as a shape; what is repeated need not be."""
        return node.op_type not in ("Expand", "ConstantOfShape", "Tile", "Range", "Pad", "Resize")

    def _infer_shapes(self, node: ir.Node, proto: onnx.NodeProto, inputs: Sequence[ir.Value]) -> None:
        version = next(opset.version for opset in self._opsets if opset.domain == node.domain)
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        types = {str(v.name): onnx.helper.make_tensor_type_proto(int(self.types[v]), self.shapes[v]) for v in inputs}
        data = {str(v.name): onnx.numpy_helper.from_array(self.known[v]) for v in inputs if v in self.known}
        found = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=self._opsets)
        for value in node.outputs:
            if not value.name:
                continue
            tensor = found[value.name].tensor_type
            if not tensor.HasField("shape") or not all(size.HasField("dim_value") for size in tensor.shape.dim):
                raise ValueError(f"the shape of {value.name!r} is known at run time only")
            self._note(value, [size.dim_value for size in tensor.shape.dim], ir.DataType(tensor.elem_type))

    def _learn(self, value: ir.Value, contents: Array) -> None:
        self._note(value, contents.shape, ir.DataType.from_numpy(contents.dtype))
        if contents.size <= _MOST:
            self.known[value] = contents


def _write_shapes(model: ir.Model, trials: Sequence[_Trial], free: Sequence[str]) -> None:
    names: dict[tuple[int, ...], str] = {}
    for symbol in free:
        names[tuple(trial.sizes[symbol] for trial in trials)] = symbol

    def name(pair: tuple[int, ...]) -> int | str:
        if len(set(pair)) == 1:
            return pair[0]
        if pair not in names:
            for symbol in free:
                factors = {size / trial.sizes[symbol] for size, trial in zip(pair, trials, strict=True)}
                if len(factors) == 1 and (factor := factors.pop()) == int(factor):
                    names[pair] = f"{int(factor)}*{symbol}"
                    break
            else:
                names[pair] = f"size_{len(names)}"
        return names[pair]

    for value in trials[0].shapes:
        pairs = zip(*(trial.shapes[value] for trial in trials), strict=True)
        value.shape = ir.Shape([name(tuple(pair)) for pair in pairs])
        value.type = ir.TensorType(trials[0].types[value])


def _fold(model: ir.Model, trials: Sequence[_Trial]) -> None:
    """Make constants of what is computed from fixed sizes alone."""
    first, *others = trials
    for node in list(model.graph):
        for value in node.outputs:
            contents = first.known.get(value)
            if contents is None or ir.convenience.get_const_tensor(value) is not None or value.is_graph_output():
                continue
            if not all(value in trial.known and np.array_equal(contents, trial.known[value]) for trial in others):
                continue
            value.replace_all_uses_with(Writer(node).weight(contents, f"{value.name}.fixed"))


def _relate(model: ir.Model) -> None:
    """Let a Reshape or Expand to a size that stays free take it from its input, which is "0", "-1", or "1" there."""
    for node in list(model.graph):
        if node.op_type not in ("Reshape", "Expand") or len(node.inputs) != 2:
            continue
        source, wanted = node.inputs
        assert source is not None and wanted is not None
        if source.shape == node.outputs[0].shape and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(source)  # it changes nothing
            continue
        entries = _entries(source, node.outputs[0], node.op_type == "Expand")
        if entries is None:
            continue
        node.replace_input_with(1, Writer(node).weight(np.array(entries, np.int64), f"{node.outputs[0].name}.shape"))
        if node.op_type == "Reshape":
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _entries(source: ir.Value, result: ir.Value, expands: bool) -> list[int] | None:
    assert source.shape is not None and result.shape is not None
    given, wanted = _plain(source.shape), _plain(result.shape)
    if 0 in wanted:
        return None
    if expands:  # 1 leaves a size as it is; the last axes are those that correspond
        aligned = [1] * (len(wanted) - len(given)) + given
        entries: list[Any] = [
            1 if entry == size else entry for entry, size in zip(wanted, aligned[-len(wanted) :], strict=True)
        ]
        return entries if all(isinstance(entry, int) for entry in entries) else None
    entries = [
        0 if isinstance(entry, str) and axis < len(given) and given[axis] == entry else entry
        for axis, entry in enumerate(wanted)
    ]
    open_ = [axis for axis, entry in enumerate(entries) if isinstance(entry, str)]
    if len(open_) > 1:
        return None
    return [-1 if axis in open_ else entry for axis, entry in enumerate(entries)]


def _plain(shape: ir.Shape) -> list[int | str]:
    return [size if isinstance(size, int) else str(size.value) for size in shape]
