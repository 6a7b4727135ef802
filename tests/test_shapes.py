"""That a graph whose sizes are fixed computes no shapes: what keeps CUDA graphs from being captured.

Counted in what ONNX Runtime itself leaves of each graph with the sizes of an image fixed, and the number of rows not.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from dnp.engine import Bundle
from dnp.engine.bundle.contract import symbols
from dnp.export.passes.shapes import settle_shapes

LOOK_UPS = {"Gather", "GatherElements"}  # and what brings their indices into form
OF_INDICES = {"Add", "Cast", "Expand", "Mul", "Reshape", "Split", "Squeeze", "Unsqueeze"}
INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


def optimised(graph, tmp_path, free):
    """The graph as ONNX Runtime would run it with every size fixed but ``free``."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # that an optimised file is for this processor alone
    sizes = {"tokens": 16, "height": 7, "width": 10, "image_height": 40, "image_width": 50}
    for symbol in graph.symbols:
        if symbol not in free:
            options.add_free_dimension_override_by_name(symbol, sizes.get(symbol, 2))
    onnxruntime.InferenceSession(graph.path, options, providers=["CPUExecutionProvider"])
    return ir.load(tmp_path / "optimised.onnx")


@pytest.mark.parametrize(
    ("name", "free"),
    [("denoise", {"rows"}), ("decode_latents", {"batch"}), ("encode_image", {"batch"}), ("caption_step", set()),
     ("encode_text", set())],
)  # fmt: skip
def test_no_shape_is_computed_once_sizes_are_fixed(tiny_export, tmp_path, name, free):
    bundle = Bundle.open(tiny_export.path)
    assert free <= set(symbols(bundle))
    operators = Counter(node.op_type for node in optimised(bundle.graph(name), tmp_path, free).graph)
    assert not {"Shape", "Range", "Size", "NonZero", "ConstantOfShape"} & set(operators), operators


def test_integers_of_a_step_are_its_look_ups(tiny_export, tmp_path):
    model = optimised(Bundle.open(tiny_export.path).graph("denoise"), tmp_path, {"rows"})
    ir.passes.common.ShapeInferencePass()(model)
    integers = {node.op_type for node in model.graph if any(value.dtype in INTEGERS for value in node.outputs)}
    assert integers <= OF_INDICES | LOOK_UPS
    assert Counter(node.op_type for node in model.graph)["GatherElements"] == 2  # of the table, and of the noise


def test_sequences_are_not_divided_by_images(tiny_export):
    """TensorRT would bound the quotient by the sequences, and plan for as many of each image as there can be of all."""
    model = ir.load(Bundle.open(tiny_export.path).graph("caption_step").path)
    ir.passes.common.ShapeInferencePass()(model)
    sizes = [node.op_type for node in model.graph if any(value.dtype in INTEGERS for value in node.outputs)]
    assert "Shape" in sizes and "Div" not in sizes


def reshaped(before, after, target):
    """A graph that reshapes ``x``, of sizes ``before``, to those of ``after``, by ``target`` at run time."""
    x = ir.Value(name="x", shape=ir.Shape(before), type=ir.TensorType(ir.DataType.FLOAT))
    parts = []
    nodes = []
    for number, entry in enumerate(target):
        if isinstance(entry, int):
            value = ir.Value(name=f"c{number}", const_value=ir.tensor(np.array([entry]), name=f"c{number}"))
        else:
            axis = before.index(entry)
            nodes.append(ir.node("Shape", [x], {"start": axis, "end": axis + 1}))
            value = nodes[-1].outputs[0]
            value.name = f"s{number}"
        parts.append(value)
    joined = ir.node("Concat", parts, {"axis": 0})
    result = ir.node("Reshape", [x, joined.outputs[0]], {"allowzero": 1})
    joined.outputs[0].name, (y,) = "target", result.outputs
    y.name, y.shape, y.type = "y", ir.Shape(after), ir.TensorType(ir.DataType.FLOAT)
    weights = [value for value in parts if value.const_value is not None]
    graph = ir.Graph([x], [y], nodes=[*nodes, joined, result], initializers=weights, opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [
        (["rows", 6, "h", "w"], ["rows", 6, "h*w"], [0, 6, -1]),
        (["rows", "h*w", 6], ["rows", "h*w", 2, 3], [0, 0, 2, 3]),
        (["rows", 6, "h", "w"], ["2*rows", 3, "h", "w"], [-1, 3, 0, 0]),
        (["rows", 6, "h", "w"], ["rows", "h", "w", 6], None),
    ],
)
def test_a_reshape_keeps_its_meaning(before, after, left):
    """Whatever can be said without sizes is; and what is left gives the same numbers, at sizes of every parity."""
    known = [entry for entry in after if isinstance(entry, int) or entry in before]
    target = after if len(known) == len(after) else [entry if entry in known else -1 for entry in after]
    model = reshaped(before, after, target)
    settle_shapes(model)
    (reshape,) = (node for node in model.graph if node.op_type == "Reshape")
    constant = ir.convenience.get_const_tensor(reshape.inputs[1])
    assert (None if constant is None else constant.numpy().tolist()) == left
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for sizes in ({"rows": 1, "h": 3, "w": 5}, {"rows": 4, "h": 2, "w": 2}):
        x = np.arange(np.prod(shape := [eval(str(e), {}, sizes) for e in before]), dtype=np.float32).reshape(shape)
        (y,) = session.run(None, {"x": x})
        np.testing.assert_array_equal(y, x.reshape([eval(str(e), {}, sizes) for e in after]))
