"""Attention as one node: found in a graph, equal to torch's, with a definition that says the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dnp.engine import Bundle, GraphSpec, TensorSpec
from dnp.engine.plans.build import target_for
from dnp.engine.plans.compiler import compile_plan
from dnp.engine.plans.product import TENSORRT_RTX
from dnp.engine.plans.profile import Range
from dnp.engine.plans.settings import BuildSettings
from dnp.export.fp16.float32 import infer_types, keep_float32
from dnp.export.passes.attention import fuse_attention, read_model

# tokens of the queries, tokens of keys and values, heads, channels of a head
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.integers(1, 24))


def plain(heads: int, width: int, scale: float, dtype=np.float32, *, mask=False, rank=3, axis=-1, cut=None, joint=None):
    """Attention in plain nodes, as torch's exporter leaves it around ours: ``y`` of ``q``, ``k`` and ``v``.

    ``cut`` and ``joint`` are the shapes that cut the heads and join them, when they are not those of an attention.
    """
    kind, channels = helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), heads * width
    shape = ["b", "n", channels] if rank == 3 else ["b", "r", "c", channels]
    weights = {"batch": np.array([0]), "rest": np.array([-1]), "heads": np.array([heads]), "width": np.array([width])}
    weights |= {"joint": np.array(joint or [0, -1, channels]), "scale": np.array(scale, dtype)}
    node = helper.make_node
    nodes = [
        node("Shape", ["q"], ["size"], start=0, end=1),
        node("Concat", ["size", "rest", "heads", "width"], ["cut"], axis=0),
    ]
    if cut is not None:
        weights["cut"], nodes = np.array(cut), []
    for name, order in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
        parts, moved = f"{name}.cut", f"{name}.moved"
        nodes += [node("Reshape", [name, "cut"], [parts]), node("Transpose", [parts], [moved], perm=order)]
    nodes += [node("Mul", ["q.moved", "scale"], ["scaled"]), node("MatMul", ["scaled", "k.moved"], ["scores"])]
    last = "scores"
    if dtype != np.float32:
        nodes, last = [*nodes, node("Cast", [last], ["wide"], to=TensorProto.FLOAT)], "wide"
    if mask:
        weights["hidden"] = np.array(-5, np.float32)
        nodes, last = [*nodes, node("Add", [last, "hidden"], ["masked"])], "masked"
    nodes += [node("Softmax", [last], ["weights"], axis=axis)]
    last = "weights"
    if dtype != np.float32:
        nodes, last = [*nodes, node("Cast", [last], ["narrow"], to=kind)], "narrow"
    nodes += [
        node("MatMul", [last, "v.moved"], ["heads.y"]),
        node("Transpose", ["heads.y"], ["moved"], perm=(0, 2, 1, 3)),
        node("Reshape", ["moved", "joint"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name in "qkv"]
    outputs = [helper.make_tensor_value_info("y", kind, ["b", "m", "d"])]
    graph = helper.make_graph(
        nodes, "attention", inputs, outputs, [numpy_helper.from_array(w, n) for n, w in weights.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def fused(model: onnx.ModelProto) -> ir.Model:
    result = ir.from_proto(model)
    assert fuse_attention(result) == 1
    assert [node.op_type for node in result.graph] == ["MultiHeadAttention"]
    return result


def inlined(model: ir.Model, folder) -> ir.Model:
    ir.save(model, folder / "fused.onnx")
    return read_model(folder / "fused.onnx")


def operands(batch, queries, keys, channels, dtype=np.float32):
    rng = np.random.default_rng(queries)
    return {
        name: rng.standard_normal((batch, tokens, channels)).astype(dtype)
        for name, tokens in (("q", queries), ("k", keys), ("v", keys))
    }


def by_torch(inputs, heads, scale):
    q, k, v = (torch.from_numpy(a).float().unflatten(-1, (heads, -1)).transpose(1, 2) for a in inputs.values())
    result = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return result.transpose(1, 2).flatten(2).numpy()


def by_onnxruntime(model: ir.Model, inputs):
    """All outputs, ``y`` first."""
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, inputs)


@given(sizes=SIZES, batch=st.integers(1, 3), scale=st.floats(0.01, 2))
def test_it_is_torchs_attention(sizes, batch, scale):
    queries, keys, heads, width = sizes
    model, inputs = fused(plain(heads, width, scale)), operands(batch, queries, keys, heads * width)
    np.testing.assert_allclose(by_onnxruntime(model, inputs)[0], by_torch(inputs, heads, scale), atol=2e-5)


def test_its_definition_says_the_same_in_plain_onnx(tmp_path):
    model, inputs = fused(plain(3, 8, 0.25)), operands(2, 7, 9, 24)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    ir.save(model, tmp_path / "fused.onnx")
    opened = read_model(tmp_path / "fused.onnx")
    assert {node.domain for node in opened.graph} == {""} and opened.graph.opset_imports == {"": 20}
    assert not opened.functions
    (found,) = onnx.reference.ReferenceEvaluator(ir.to_proto(opened)).run(None, inputs)
    np.testing.assert_allclose(found, by_torch(inputs, 3, 0.25), atol=2e-5)


def test_heads_may_be_cut_by_a_constant():
    """As those of the text's keys and values, whose length is fixed: ``[-1, 77, heads, width]``."""
    inputs = operands(3, 9, 9, 16)
    model = plain(2, 8, 0.5, cut=[-1, 9, 2, 8])
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[1].dim_value = 9
    np.testing.assert_allclose(by_onnxruntime(fused(model), inputs)[0], by_torch(inputs, 2, 0.5), atol=2e-5)


OTHERS = {
    "a mask": plain(2, 8, 0.5, mask=True),
    "heads cut out of four dimensions": plain(2, 8, 0.5, rank=4),
    "a softmax over the queries": plain(2, 8, 0.5, axis=2),
    "images that are merged into one": plain(2, 8, 0.5, cut=[1, -1, 2, 8]),
    "tokens of a number that is not theirs": plain(2, 8, 0.5, cut=[-1, 9, 2, 8]),
    "channels that are split": plain(2, 8, 0.5, joint=[0, -1, 8]),
    "images that are merged at the end": plain(2, 8, 0.5, joint=[1, -1, 16]),
    "fp16": plain(2, 8, 0.5, np.float16),
}


def taken_twice(name: str) -> onnx.ModelProto:
    """One of the inner values is wanted elsewhere, too."""
    model = plain(2, 8, 0.5)
    model.graph.node.append(helper.make_node("Identity", [name], ["other"]))
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, None))
    return model


OTHERS |= {f"{name}, taken twice": taken_twice(name) for name in ("weights", "heads.y", "moved")}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_another_thing_stays_as_it_is(what):
    result = ir.from_proto(OTHERS[what])
    before = [(node.op_type, [v.name for v in node.inputs if v]) for node in result.graph]
    assert fuse_attention(result) == 0
    assert [(node.op_type, [v.name for v in node.inputs if v]) for node in result.graph] == before
    assert not result.functions and result.graph.opset_imports == {"": 20}


@pytest.mark.parametrize("name", ["scores", "scaled", "q.moved", "k.cut"])
def test_what_is_wanted_elsewhere_too_is_still_made(name):
    model, inputs = ir.from_proto(taken_twice(name)), operands(2, 5, 7, 16)
    expected = by_onnxruntime(model, inputs)
    assert fuse_attention(model) == 1
    found = by_onnxruntime(model, inputs)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-5)
    np.testing.assert_array_equal(found[1], expected[1])


# Every fp16 value between the inputs and the output; the softmax itself is float32.
INNER = [n.output[0] for n in plain(2, 8, 0.5, np.float16).graph.node[2:-1] if n.output[0] not in ("wide", "weights")]


@given(st.sets(st.sampled_from(INNER), min_size=1))
def test_what_was_put_back_to_float32_stays_float32(kept):
    """Whichever values of an attention overflow fp16: it is not fused, and they are still there."""
    model = ir.from_proto(plain(2, 8, 0.5, np.float16))
    keep_float32(model, kept)
    assert fuse_attention(model) == 0
    infer_types(model)
    kinds = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert all(kinds[name] == ir.DataType.FLOAT for name in kept)


def test_the_default_model_has_every_attention_without_a_mask_fused():
    counts = {}
    for name, graph in Bundle.default().graphs.items():
        model = ir.load(graph.path)
        operators = [node.op_type for node in model.graph]
        counts[name] = operators.count("MultiHeadAttention"), operators.count("Softmax")
    assert counts["denoise"] == (14, 0)
    assert counts["decode_latents"] == (1, 0)
    assert {fused for name, (fused, _) in counts.items() if name not in ("denoise", "decode_latents")} == {0}


@pytest.mark.parametrize("width", [16, 512])
def test_tensorrt_compiles_it(tmp_path, width):
    """The ``Attention`` operator of opset 23 is refused in float32, for which TensorRT has no fused kernel."""
    path = tmp_path / "attention.onnx"
    ir.save(fused(plain(2, width, 0.25)), path)
    spec = TensorSpec(("b", "n", 2 * width))
    graph = GraphSpec("attention", path, dict.fromkeys("qkv", spec), {"y": spec})
    sizes = {"b": Range(1, 2, 2), "n": Range(64, 1024, 1024)}
    plan, _ = compile_plan(graph, sizes, BuildSettings(), target_for(TENSORRT_RTX, (89,)))
    assert plan.nbytes > 0


MEMORY = """
import sys
import numpy as np, onnxruntime
from dnp.engine.backends.onnxruntime.session import cpu_settings
from dnp.engine.backends.session import BackendOptions

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))  # KiB

settings = cpu_settings(onnxruntime, BackendOptions())
session = onnxruntime.InferenceSession(sys.argv[1], settings, providers=["CPUExecutionProvider"])
inputs = {name: np.full((1, 4096, 64), 0.1, np.float32) for name in "qkv"}
before = peak()
session.run(None, inputs)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_no_matrix_of_all_tokens_by_all_tokens_is_made(tmp_path):
    """4096 tokens by 4096 tokens in 4 heads are 268 MB; the plain nodes take them, the one node does not."""
    model = plain(4, 16, 0.25)
    onnx.save(model, tmp_path / "plain.onnx")
    ir.save(fused(model), tmp_path / "fused.onnx")
    grown = {}
    for name in ("plain", "fused"):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / f"{name}.onnx")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        grown[name] = int(done.stdout) * 1024
    assert grown["fused"] < 64e6 and grown["plain"] > 200e6
