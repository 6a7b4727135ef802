"""An fp16 graph's float32 reference, and an fp16 graph some of whose values stay float32: two passes over ONNX graphs.

Graphs are changed in place, and hold no subgraphs (``If``, ``Loop``), as torch exports ours.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import shape_inference

from dnp.engine.errors import ExportError

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_DTYPE_ATTRIBUTES = ("to", "dtype")  # of Cast, EyeLike and their like


def infer_types(model: ir.Model) -> None:
    """Give every value of the graph the dtype that it has by ONNX's rules; inputs and outputs keep their shapes.

    Raises ExportError when the rules are broken, as by an operator with fp16 and float32 operands.
    """
    ends = [(value, value.shape) for value in [*model.graph.inputs, *model.graph.outputs]]
    shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=False)
    for value, shape in ends:
        value.shape = shape
    unknown = [v.name for node in model.graph for v in node.outputs if v.name and v.dtype is None]
    if unknown:
        raise ExportError(f"the types of {len(unknown)} values cannot be inferred, {unknown[0]} among them")


def half_values(model: ir.Model) -> list[str]:
    """The names of the fp16 values that depend on an input, in the graph's order; weights do not."""
    infer_types(model)
    varying = set(model.graph.inputs)
    names = []
    for node in model.graph:
        if any(value in varying for value in node.inputs):
            varying.update(node.outputs)
            names += [value.name for value in node.outputs if value.name and value.dtype == HALF]
    return names


def widen(model: ir.Model) -> None:
    """Make an fp16 graph compute in float32 from end to end: every name, node and number stays, fp16 becomes float32.

    The weights are those of the fp16 graph, so what a reference computes differs from it by arithmetic alone. They stay
    where they are stored, in fp16, and are cast: a large model is not read for that.
    """
    first = model.graph[0]
    for value in model.graph.initializers.values():
        if value.dtype == HALF:
            users = list(value.uses())
            single = _cast(model.graph, value, SINGLE, f"{value.name}.widened", before=first)
            for user, index in users:
                user.replace_input_with(index, single)
    for node in model.graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.INT and name in _DTYPE_ATTRIBUTES and attribute.as_int() == HALF:
                node.attributes[name] = ir.AttrInt64(name, SINGLE)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == HALF:
                wide = attribute.as_tensor().numpy().astype(np.float32)
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(wide))
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.dtype == HALF:
            value.type = ir.TensorType(SINGLE)


def keep_float32(model: ir.Model, values: Collection[str]) -> None:
    """Keep the named fp16 values of an fp16 graph in float32, under their names.

    Every node that makes or takes one computes in float32: its other fp16 operands, weights included, get a Cast
    before it, its other fp16 results one behind it. A Cast that makes one casts to float32 instead.

    Raises ExportError for a value that the graph does not have, or that is one of its fp16 inputs or outputs.
    """
    infer_types(model)
    outputs = {value.name: value for node in model.graph for value in node.outputs if value.name}
    for name in values:
        value = outputs.get(name)
        if value is None or value.dtype != HALF:
            raise ExportError(f"{name!r} is no fp16 value of the graph, so it cannot be kept in float32")
        if value.is_graph_output():
            raise ExportError(f"{name!r} leaves the graph in fp16, so it cannot be kept in float32; export fp32")
    kept = {outputs[name] for name in values}
    wide: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if kept.isdisjoint(node.inputs) and kept.isdisjoint(node.outputs):
            continue
        if node.op_type == "Cast":
            if node.outputs[0] in kept:
                node.attributes["to"] = ir.AttrInt64("to", SINGLE)
            continue
        for index, operand in enumerate(node.inputs):
            if operand is not None and operand.dtype == HALF and operand not in kept:
                if operand not in wide:
                    wide[operand] = _cast(model.graph, operand, SINGLE, f"{operand.name}.float32", before=node)
                node.replace_input_with(index, wide[operand])
        for result in node.outputs:
            if result.dtype == HALF and result not in kept:
                wide[_narrow(model.graph, node, result)] = result  # who takes it in float32 takes it as it was made
    for value in kept:
        value.type = ir.TensorType(SINGLE)
    for value in wide:
        cast = value.producer()
        if cast is not None and not value.uses() and not value.is_graph_output():
            model.graph.remove(cast, safe=True)


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str, *, before: ir.Node) -> ir.Value:
    cast = ir.node("Cast", [value], {"to": dtype}, name=f"{name}.cast")
    graph.insert_before(before, cast)
    (result,) = cast.outputs
    result.name, result.type, result.shape = name, ir.TensorType(dtype), value.shape
    return result


def _narrow(graph: ir.Graph, node: ir.Node, result: ir.Value) -> ir.Value:
    """Have ``node`` give ``result`` in float32, and a Cast behind it the fp16 value returned, under the name it had."""
    cast = ir.node("Cast", [result], {"to": HALF}, name=f"{result.name}.cast")
    (narrow,) = cast.outputs
    narrow.type, narrow.shape = ir.TensorType(HALF), result.shape
    for user, index in list(result.uses()):
        if user is not cast:
            user.replace_input_with(index, narrow)
    for index, output in enumerate(graph.outputs):
        if output is result:
            graph.outputs[index] = narrow
    name, result.name = result.name, f"{result.name}.float32"
    narrow.name = name
    result.type = ir.TensorType(SINGLE)
    graph.insert_after(node, cast)
    return narrow
