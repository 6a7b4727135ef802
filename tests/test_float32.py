"""The passes over fp16 graphs: the float32 twin, values kept in float32, and fp16's rounding on a processor."""

import numpy as np
import onnx
import onnx.reference
import onnx_ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnp.engine import GraphSpec, TensorSpec, open_graph
from dnp.engine.errors import ExportError
from dnp.export.fp16.float32 import half_values, infer_types, keep_float32, widen
from dnp.export.fp16.simulation import simulated_graph


def names_of(model):
    nodes = [
        (node.op_type, [v and v.name for v in node.inputs], [v.name for v in node.outputs]) for node in model.graph
    ]
    signatures = [[v.name for v in values] for values in (model.graph.inputs, model.graph.outputs)]
    return nodes, signatures, sorted(model.graph.initializers)


def dtypes(model):
    infer_types(model)
    return {value.name: value.dtype for node in model.graph for value in node.outputs}


@pytest.fixture(scope="module")
def small_proto():
    """x float32 [n, 3] → fp16 → MatMul, Mul by k, Sigmoid, Mul, Mul, Add → h fp16 → Softmax in float32 → y."""
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    weights = {"w": np.linspace(-2, 2, 9, dtype=np.float16).reshape(3, 3), "e": np.float16(2**-6)}
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["c"], to=half),
        onnx.helper.make_node("MatMul", ["c", "w"], ["m"]),
        onnx.helper.make_node("Mul", ["m", "k"], ["p"]),
        onnx.helper.make_node("Sigmoid", ["p"], ["s"]),
        onnx.helper.make_node("Mul", ["p", "s"], ["g"]),
        onnx.helper.make_node("Mul", ["g", "e"], ["r"]),
        onnx.helper.make_node("Add", ["r", "c"], ["h"]),
        onnx.helper.make_node("Cast", ["h"], ["wide"], to=single),
        onnx.helper.make_node("Softmax", ["wide"], ["y"]),
    ]
    signatures = [
        [onnx.helper.make_tensor_value_info(name, kind, ["n", 3]) for name, kind in pairs]
        for pairs in ((("x", single), ("k", half)), (("y", single), ("h", half)))
    ]
    initializers = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = onnx.helper.make_graph(nodes, "small", *signatures, initializers)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def small(small_proto):
    return onnx_ir.from_proto(small_proto)


X = np.array([[1, 2, 3], [-40, 50, 60]], np.float32)


def evaluate(model):
    """The outputs by onnx's own reference, which rounds to fp16 and overflows where the graph says so."""
    proto = onnx_ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    (k,) = [value for value in proto.graph.input if value.name == "k"]
    kind = onnx.helper.tensor_dtype_to_np_dtype(k.type.tensor_type.elem_type)
    with np.errstate(over="ignore", invalid="ignore"):
        return onnx.reference.ReferenceEvaluator(proto).run(None, {"x": X, "k": np.full((2, 3), 700, kind)})


def test_a_twin_has_the_same_names_and_no_fp16(small):
    nodes, signatures, weights = names_of(small)
    assert half_values(small) == [*"cmpsgrh"]
    widen(small)
    wide = {name: f"{name}.widened" for name in weights}
    casts = [("Cast", [name], [wide[name]]) for name in weights]
    nodes = [(operator, [wide.get(name, name) for name in taken], made) for operator, taken, made in nodes]
    found, *others = names_of(small)
    assert (sorted(found), others) == (sorted([*casts, *nodes]), [signatures, weights])
    assert half_values(small) == []
    assert [np.isfinite(output).all() for output in evaluate(small)] == [True, True]


def test_keeping_nothing_changes_nothing(small):
    infer_types(small)
    before = onnx_ir.to_proto(small).SerializeToString()
    keep_float32(small, [])
    assert onnx_ir.to_proto(small).SerializeToString() == before


@given(st.sets(st.sampled_from("cmpsgr")))
def test_any_values_can_be_kept(small_proto, kept):
    model = onnx_ir.from_proto(small_proto)
    keep_float32(model, kept)
    kinds = dtypes(model)
    for name in "cmpsgr":
        if name in kept:
            assert kinds[name] == onnx_ir.DataType.FLOAT
        elif name in kinds:  # what nobody takes in fp16 any more is gone
            assert kinds[name] == onnx_ir.DataType.FLOAT16
    y, h = evaluate(model)
    assert (y.dtype, h.dtype) == (np.float32, np.float16)


def test_what_is_kept_overflows_no_more(small, small_proto):
    assert not np.isfinite(evaluate(small)[0]).all()  # 700 · 115 at p
    widen(small)
    expected, _ = evaluate(small)
    kept = onnx_ir.from_proto(small_proto)
    keep_float32(kept, ["p", "g"])
    np.testing.assert_allclose(evaluate(kept)[0], expected, atol=2e-2)


def test_what_is_kept_can_be_widened(small, small_proto):
    """The weights of kept values are cast by both, and each cast has a name of its own: ONNX Runtime refuses others."""
    keep_float32(small, ["m", "r"])
    widen(small)
    onnxruntime.InferenceSession(onnx_ir.to_proto(small).SerializeToString(), providers=["CPUExecutionProvider"])
    whole = onnx_ir.from_proto(small_proto)
    widen(whole)
    np.testing.assert_array_equal(evaluate(small)[0], evaluate(whole)[0])


def test_rounding_shows_what_the_processor_hides(small, tmp_path):
    """The reference and the rounded graph agree, infinities included; the ``cpu`` backend itself shows none."""
    graph = GraphSpec(
        "small",
        tmp_path / "small.onnx",
        {"x": TensorSpec(("n", 3)), "k": TensorSpec(("n", 3), "float16")},
        {"y": TensorSpec(("n", 3)), "h": TensorSpec(("n", 3), "float16")},
    )
    onnx_ir.save(small, graph.path)
    expected, _ = evaluate(small)
    found = {}
    for name, spec in (("hidden", graph), ("shown", simulated_graph(graph, tmp_path))):
        with open_graph(spec) as session:
            session.reshape(n=2)
            session.inputs["x"].write(X)
            session.inputs["k"].write(np.full((2, 3), 700, session.inputs["k"].dtype))
            session.run()
            found[name] = session.outputs["y"].read()
    np.testing.assert_allclose(found["shown"], expected, atol=1e-2)
    assert not np.isfinite(found["shown"]).all() and np.isfinite(found["hidden"]).all()


@pytest.mark.parametrize(("name", "message"), [("h", "leaves the graph in fp16"), ("y", "no fp16"), ("q", "no fp16")])
def test_what_cannot_be_kept_is_refused(small, name, message):
    with pytest.raises(ExportError, match=message):
        keep_float32(small, [name])
