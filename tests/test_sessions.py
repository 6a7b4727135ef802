"""Sessions on every backend, with real graphs, against numpy."""

from __future__ import annotations

import gc
import importlib
import os
import re
import subprocess
import sys
import textwrap
import tracemalloc
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import dnp.engine
from dnp.engine.backends import registry
from dnp.engine.backends.host import HostBuffer
from dnp.engine.backends.onnxruntime import cuda as ort_cuda
from dnp.engine.backends.registry import backend_names, doctor, open_graph, open_session
from dnp.engine.backends.session import BackendOptions, Buffer
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.tensors import TensorSpec
from dnp.engine.errors import BackendError, BundleError, SettingsError
from dnp.engine.system import imports, processor

DNP = str(Path(sys.executable).with_name("dnp"))

ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
}
IMAGE = ("batch", "height", "width", 3)


HOSTS = ("cpu", "openvino")  # the backends that compute in ordinary memory


@pytest.fixture(params=HOSTS)
def backend(request):
    return request.param


@pytest.fixture
def make(tmp_path):
    """Write a graph of ONNX nodes and give its spec."""

    def write(name, nodes, inputs, outputs, weights=()):
        values = [
            [helper.make_tensor_value_info(n, ONNX_TYPES[t.dtype], list(t.shape)) for n, t in side.items()]
            for side in (inputs, outputs)
        ]
        constants = [numpy_helper.from_array(array, n) for n, array in dict(weights).items()]
        graph = helper.make_graph(nodes, name, *values, initializer=constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        path = tmp_path / f"{name}.onnx"
        onnx.save(model, path)
        return GraphSpec(name, path, inputs, outputs)

    return write


@pytest.fixture
def step(make):
    """state' = 2·state + noise, index' = index + 1, and the state as uint8: a small relative of ``denoise``."""
    state, index = TensorSpec(("batch", 4, "width")), TensorSpec(("batch",), "int64")
    nodes = [
        helper.make_node("Mul", ["state", "two"], ["doubled"]),
        helper.make_node("Add", ["doubled", "noise"], ["next_state"]),
        helper.make_node("Add", ["index", "one"], ["next_index"]),
        helper.make_node("Clip", ["next_state", "low", "high"], ["clipped"]),
        helper.make_node("Cast", ["clipped"], ["image"], to=TensorProto.UINT8),
    ]
    weights = {
        "two": np.float32(2), "low": np.float32(0), "high": np.float32(255), "one": np.array([1], np.int64)
    }  # fmt: skip
    return make(
        "step",
        nodes,
        {"state": state, "noise": state, "index": index},
        {"next_state": state, "next_index": index, "image": TensorSpec(state.shape, "uint8")},
        {name: np.asarray(value) for name, value in weights.items()},
    )


@pytest.fixture
def matmul(make):
    """y = x·w, float32 ``[batch, 64]``."""
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    spec = TensorSpec(("batch", 64))
    return make("matmul", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": spec}, {"y": spec}, {"w": w}), w


def fill(session, batch, width, seed=0):
    """Shape a ``step`` session, write random inputs and return them."""
    rng = np.random.default_rng(seed)
    arrays = {
        "state": rng.uniform(0, 100, (batch, 4, width)).astype(np.float32),
        "noise": rng.standard_normal((batch, 4, width)).astype(np.float32),
        "index": rng.integers(0, 1 << 30, batch),
    }
    session.reshape(batch=batch, width=width)
    for name, array in arrays.items():
        session.inputs[name].write(array)
    return arrays


def check(session, arrays):
    expected = arrays["state"] * 2 + arrays["noise"]
    np.testing.assert_allclose(session.outputs["next_state"].read(), expected, rtol=1e-6, atol=1e-5)
    assert np.array_equal(session.outputs["next_index"].read(), arrays["index"] + 1)
    image = session.outputs["image"].read()
    assert image.dtype == np.uint8
    assert np.abs(image - np.clip(expected, 0, 255)).max() <= 1
    for name, array in arrays.items():  # nobody computes in our inputs' memory
        assert np.array_equal(session.inputs[name].read(), array)


def test_growing_and_shrinking_keeps_results_right(step, backend):
    with open_graph(step, backend) as session:
        for seed, (batch, width) in enumerate([(2, 3), (1, 1), (5, 40), (3, 7), (5, 40), (1, 64), (2, 3)]):
            arrays = fill(session, batch, width, seed)
            for _ in range(2):
                session.run()
                check(session, arrays)


@settings(max_examples=25)
@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 33)), min_size=1, max_size=6))
def test_any_sequence_of_sizes(step, backend, sizes):
    with open_graph(step, backend, BackendOptions(threads=1)) as session:
        for seed, (batch, width) in enumerate(sizes):
            arrays = fill(session, batch, width, seed)
            session.run()
            check(session, arrays)


def test_buffers_are_aligned_and_allocated_once(step, backend):
    with open_graph(step, backend) as session:
        fill(session, 8, 32)
        buffers = [*session.inputs.values(), *session.outputs.values()]
        assert all(isinstance(b, HostBuffer) and b.location == "cpu" for b in buffers)
        places = [b.view.ctypes.data for b in buffers]
        assert all(place % 64 == 0 for place in places)
        for batch, width in [(2, 3), (8, 32), (1, 1), (4, 64)]:
            arrays = fill(session, batch, width)
            session.run()
            check(session, arrays)
            assert [b.view.ctypes.data for b in session.inputs.values()] == places[:3]
            assert [b.shape for b in session.outputs.values()] == [(batch, 4, width), (batch,), (batch, 4, width)]
        assert buffers == [*session.inputs.values(), *session.outputs.values()]


def test_a_run_allocates_no_arrays(make, backend):
    spec = TensorSpec(("n",))
    graph = make("big", [helper.make_node("Neg", ["x"], ["y"])], {"x": spec}, {"y": spec})
    with open_graph(graph, backend) as session:
        session.reshape(n=1_000_000)
        session.inputs["x"].write(np.ones(1_000_000, np.float32))
        session.run()
        gc.collect()
        tracemalloc.start()
        for _ in range(5):
            session.run()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 50_000
        assert (session.outputs["y"].read() == -1).all()


def test_state_is_carried_by_copy(step, backend):
    """The loop of the runtime: run, then hand the outputs back to the inputs."""
    with open_graph(step, backend) as session:
        arrays = fill(session, 3, 5)
        state = arrays["state"].astype(np.float64)
        for _ in range(6):
            session.run()
            session.inputs["state"].copy(session.outputs["next_state"])
            session.inputs["index"].copy(session.outputs["next_index"])
            state = 2 * state + arrays["noise"]
        np.testing.assert_allclose(session.inputs["state"].read(), state, rtol=1e-5)
        assert np.array_equal(session.inputs["index"].read(), arrays["index"] + 6)


def test_what_is_read_is_the_readers_own(step, backend):
    with open_graph(step, backend) as session:
        arrays = fill(session, 2, 3)
        session.run()
        first = session.outputs["next_state"].read()
        kept = first.copy()
        first[0] = -1
        check(session, arrays)
        fill(session, 2, 3, seed=1)
        session.run()
        assert np.array_equal(first[1], kept[1])
        given_array = np.zeros((2, 4, 3), np.float32)
        session.inputs["state"].write(given_array)
        given_array[:] = 7
        assert not session.inputs["state"].read().any()


def test_anything_that_numpy_can_lay_out_can_be_written(step, backend):
    with open_graph(step, backend) as session:
        arrays = fill(session, 2, 3)
        wide = np.zeros((2, 4, 6), np.float32)
        wide[..., ::2] = arrays["state"]
        session.inputs["state"].write(wide[..., ::2])
        session.inputs["noise"].write(np.asfortranarray(arrays["noise"]))
        session.run()
        check(session, arrays)


def test_a_linked_input_is_read_in_place(step, matmul, make, backend):
    """Also after the buffer moved because its own session grew, and after both shrank."""
    spec = TensorSpec(("batch", 4, "width"))
    reader_graph = make("reader", [helper.make_node("Neg", ["x"], ["y"])], {"x": spec}, {"y": spec})
    with open_graph(step, backend) as source, open_graph(reader_graph, backend) as reader:
        reader.alias("x", source.outputs["next_state"])
        assert reader.inputs["x"] is source.outputs["next_state"]
        for batch, width in [(1, 2), (6, 50), (2, 2), (6, 51)]:
            arrays = fill(source, batch, width)
            reader.reshape(batch=batch, width=width)
            for _ in range(2):
                source.run()
                reader.run()
                expected = -(arrays["state"] * 2 + arrays["noise"])
                np.testing.assert_allclose(reader.outputs["y"].read(), expected, rtol=1e-6, atol=1e-5)
        with pytest.raises(SettingsError, match=r"'x' must be \[1, 4, 1\].*'next_state' is \[6, 4, 51\]"):
            reader.reshape(batch=1, width=1)
            reader.run()
        reader.reshape(batch=6, width=51)
        reader.run()
        fill(source, 3, 3)
        with pytest.raises(SettingsError, match=r"'x' must be \[6, 4, 51\].*'next_state' is \[3, 4, 3\]"):
            reader.run()
        reader.reshape(batch=1, width=1)
        with pytest.raises(SettingsError, match="same sizes"):
            reader.run()
        reader.reshape(batch=3, width=3)
        source.run()
        reader.run()
        assert np.array_equal(reader.outputs["y"].read(), -source.outputs["next_state"].read())
        fill(source, 100, 100)  # closing the reader leaves the source alone
        reader.close()
        source.run()


def test_links_may_change_and_cross_backends(step, matmul):
    graph, w = matmul
    with open_graph(graph, "cpu") as one, open_graph(graph, "openvino") as two, open_graph(graph, "cpu") as three:
        three.alias("x", one.outputs["y"])
        for source in (one, two, one):
            three.alias("x", source.outputs["y"])
            x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
            source.reshape(batch=2)
            three.reshape(batch=2)
            source.inputs["x"].write(x)
            source.run()
            three.run()
            np.testing.assert_allclose(three.outputs["y"].read(), x @ w @ w, rtol=1e-4, atol=1e-3)


class ElsewhereBuffer(Buffer):
    """A buffer whose memory numpy cannot reach, as a GPU's."""

    location = "elsewhere:0"

    def __init__(self, contents):
        self.name, self.dtype, self._contents = "far", contents.dtype, contents

    @property
    def shape(self):
        return self._contents.shape

    def write(self, array):
        raise AssertionError

    def read(self):
        return self._contents.copy()

    def copy(self, other):
        raise AssertionError

    def at(self, *index):
        raise AssertionError


def test_a_buffer_of_another_device_is_copied_not_linked(step, backend):
    with open_graph(step, backend) as session:
        arrays = fill(session, 2, 3)
        far = ElsewhereBuffer(arrays["state"] + 1)
        with pytest.raises(BackendError, match=r"'far' lies on elsewhere:0.*copy"):
            session.alias("state", far)
        session.inputs["state"].copy(far)
        session.run()
        check(session, {**arrays, "state": arrays["state"] + 1})


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ({"batch": 1}, "no size given for width"),
        ({}, "batch, width"),
        ({"batch": 1, "width": 2, "hieght": 3}, "unknown size 'hieght'"),
        ({"batch": 1, "witdh": 2}, "did you mean 'width'"),
        ({"batch": 0, "width": 2}, "batch must be an integer from 1, not 0"),
        ({"batch": 1, "width": -2}, "-2"),
        ({"batch": 1.0, "width": 2}, "1.0"),
        ({"batch": True, "width": 2}, "True"),
        ({"batch": "1", "width": 2}, "'1'"),
        ({"batch": 1 << 40, "width": 1 << 40}, "no memory for 'state'"),
    ],
)
def test_impossible_sizes_change_nothing(step, backend, dims, words):
    with open_graph(step, backend) as session:
        arrays = fill(session, 2, 3)
        with pytest.raises(SettingsError) as caught:
            session.reshape(**dims)
        assert words in str(caught.value)
        session.run()
        check(session, arrays)
        session.reshape(batch=np.int64(1), width=np.int32(2))


def test_what_does_not_fit_is_refused_with_names_and_shapes(step, backend):
    with open_graph(step, backend) as session:
        with pytest.raises(SettingsError, match="reshape first"):
            session.run()
        fill(session, 2, 3)
        state, index = session.inputs["state"], session.inputs["index"]
        with pytest.raises(SettingsError, match=r"'state' holds float32 \[2, 4, 3\].*float32 \[2, 4, 4\]"):
            state.write(np.zeros((2, 4, 4), np.float32))
        with pytest.raises(SettingsError, match="float64"):
            state.write(np.zeros((2, 4, 3)))
        with pytest.raises(SettingsError, match="'index' holds int64"):
            index.copy(state)
        with pytest.raises(SettingsError, match="no input 'stat' to alias, did you mean 'state'"):
            session.alias("stat", state)
        with pytest.raises(SettingsError, match="'index' is int64, 'state' holds float32"):
            session.alias("index", state)
        with pytest.raises(SettingsError, match="its own output"):
            session.alias("state", session.outputs["next_state"])
        with pytest.raises(TypeError):
            session.inputs["state"] = state


def test_a_closed_session_says_so(step, backend):
    session = open_graph(step, backend)
    fill(session, 2, 3)
    session.close()
    session.close()
    for use in (session.run, lambda: session.reshape(batch=1, width=1)):
        with pytest.raises(BackendError, match="'step' is closed"):
            use()


def test_the_backend_says_what_runs(step, backend):
    with open_graph(step, backend, BackendOptions(threads=1)) as session:
        assert session.backend.startswith(f"{backend} (")
        assert "f32" in session.backend
        assert session.backend.endswith("threads: 1)")
        assert {"cpu": "CPUExecutionProvider", "openvino": "CPU,"}[backend] in session.backend


def test_a_silent_fallback_is_an_error(step, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: ["OtherProvider"])
    with pytest.raises(BackendError, match="asked for CPUExecutionProvider and runs OtherProvider"):
        open_graph(step)


def test_an_operator_that_openvino_lacks_is_named(step):
    model = onnx.load(step.path)
    model.graph.node.append(helper.make_node("Nonesuch", ["state"], ["unused"], domain="com.example"))
    model.graph.output.append(helper.make_tensor_value_info("unused", TensorProto.FLOAT, ["batch", 4, "width"]))
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    onnx.save(model, step.path)
    with pytest.raises(
        BackendError, match=r"lacks the operator com\.example\.Nonesuch; take 2026\.3 or newer: pip install"
    ):
        open_graph(step, "openvino")


def test_openvino_computes_in_the_precision_that_was_asked_for(matmul):
    """Its own choice would be bf16, which is 1e-2 off here."""
    graph, w = matmul
    x = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    errors = {}
    for precision in (None, "f32", "bf16"):
        try:
            session = open_graph(graph, "openvino", BackendOptions(precision=precision))
        except BackendError as error:
            assert precision == "bf16"
            assert "use f32" in str(error)
            continue
        with session:
            session.reshape(batch=4)
            session.inputs["x"].write(x)
            session.run()
            errors[precision] = float(np.abs(session.outputs["y"].read() - x @ w).max())
            assert (precision or "f32") in session.backend
    assert errors[None] == errors["f32"] < 1e-4
    assert 1e-3 < errors.get("bf16", 1e-2) < 1


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cpuu", {}, "did you mean 'cpu'"),
        ("", {}, "cpu, openvino"),
        ("cpu", {"precision": "bf16"}, "'openvino'"),
        ("cpu", {"precision": "f8"}, "'f8'"),
        ("openvino", {"precision": "f16"}, "did you mean 'bf16'"),
    ],
)
def test_unknown_backends_and_precisions_are_refused(step, name, options, words):
    with pytest.raises(BackendError) as caught:
        open_graph(step, name, BackendOptions(**options))
    assert words in str(caught.value)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_impossible_threads_are_refused(threads):
    with pytest.raises(SettingsError, match="threads must be an integer from 1"):
        BackendOptions(threads=threads)


def test_a_file_that_is_no_graph_is_the_bundles_fault_and_quiet(step, backend, capfd):
    good = step.path.read_bytes()
    for damaged in (good[: len(good) // 2], b"", b"hello" * 100):
        step.path.write_bytes(damaged)
        with pytest.raises(BundleError, match=r"step\.onnx.*export"):
            open_graph(step, backend)
    out, err = capfd.readouterr()
    assert out + err == ""


def test_a_graph_that_is_not_the_manifests_is_refused(step, backend):
    right = TensorSpec(("batch", 4, "width"))
    for wrong in (
        {**step.inputs, "extra": right},
        {**step.inputs, "state": TensorSpec(("batch", 5, "width"))},
        {**step.inputs, "state": TensorSpec(("batch", "width"))},
        {**step.inputs, "state": TensorSpec(right.shape, "float16")},
        {"state": right, "noise": right},
    ):
        with pytest.raises(BundleError, match=r"inputs\.\w+ is .* in the file"):
            open_graph(GraphSpec("step", step.path, wrong, step.outputs), backend)


def test_a_graph_that_fails_while_running_is_named(make, backend, capfd):
    a, b = TensorSpec(("n",)), TensorSpec(("m",))
    graph = make("sum", [helper.make_node("Add", ["a", "b"], ["c"])], {"a": a, "b": b}, {"c": a})
    with open_graph(graph, backend) as session:
        session.reshape(n=4, m=3)
        for buffer in session.inputs.values():
            buffer.write(np.zeros(buffer.shape, np.float32))
        with pytest.raises(BackendError, match=r"graph 'sum' failed on .*'n': 4, 'm': 3"):
            session.run()
        session.reshape(n=3, m=3)
        for buffer in session.inputs.values():
            buffer.write(np.ones(buffer.shape, np.float32))
        session.run()
        assert (session.outputs["c"].read() == 2).all()
    assert "\n" not in capfd.readouterr().err.strip()


@pytest.mark.parametrize("declared", ["2*n", "m"])
def test_an_output_of_another_shape_than_declared_is_an_error(make, backend, declared):
    x, y = TensorSpec(("n",)), TensorSpec((declared,))
    graph = make("same", [helper.make_node("Neg", ["x"], ["y"])], {"x": x}, {"y": TensorSpec(("q",))})
    graph = GraphSpec("same", graph.path, {"x": x}, {"y": y})
    with open_graph(graph, backend) as session:
        session.reshape(**{symbol: 4 if symbol == "n" else 9 for symbol in graph.symbols})
        session.inputs["x"].write(np.zeros(4, np.float32))
        with pytest.raises(BackendError, match="'same' failed"):
            session.run()


def test_half_precision_crosses_the_border(make, backend):
    cache = TensorSpec(("batch", 3), "float16")
    graph = make("half", [helper.make_node("Add", ["x", "x"], ["y"])], {"x": cache}, {"y": cache})
    with open_graph(graph, backend) as session:
        session.reshape(batch=2)
        x = np.arange(6, dtype=np.float16).reshape(2, 3)
        session.inputs["x"].write(x)
        session.run()
        assert np.array_equal(session.outputs["y"].read(), x * 2)
        assert session.outputs["y"].read().dtype == np.float16


def test_an_image_goes_in_as_it_is(make, backend):
    """uint8 in, float32 out; two inputs give the symbols."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["pixels", "axes"], ["total"], keepdims=0),
    ]
    graph = make(
        "total", nodes, {"image": TensorSpec(IMAGE, "uint8")}, {"total": TensorSpec(("batch", 3))},
        {"axes": np.array([1, 2], np.int64)},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    with open_graph(graph, backend) as session:
        for batch, height, width in [(1, 5, 4), (3, 2, 9)]:
            image = rng.integers(0, 256, (batch, height, width, 3), np.uint8)
            session.reshape(batch=batch, height=height, width=width)
            session.inputs["image"].write(image)
            session.run()
            assert np.array_equal(session.outputs["total"].read(), image.astype(np.float32).sum((1, 2)))


def test_sessions_open_from_a_bundle(step, backend):
    class OneGraph:
        """All that ``open_session`` asks of a bundle."""

        path, precision = step.path.parent, "fp32"

        def graph(self, name):
            assert name == "step"
            return step

        def graph_sha256(self, name):
            assert name == "step"
            return "0" * 64

    with open_session(OneGraph(), "step", backend) as session:
        arrays = fill(session, 1, 1)
        session.run()
        check(session, arrays)


def test_the_backends_are_the_documented_ones():
    assert backend_names() == ("cpu", "openvino", "cuda", "tensorrt", "tensorrt-rtx")


def test_doctor_tries_every_backend(backend):
    report = {r.name: r for r in doctor()}[backend]
    assert (report.works, report.why_not, report.remedy) == (True, "", "")
    assert report.precisions[0] == "f32"
    assert report.version.split(" ")[1][0].isdigit()
    assert "threads" in report.hardware


def test_doctor_says_what_is_missing_and_how_to_add_it(monkeypatch):
    for module in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed

    def absent(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(imports, "version", absent)
    for report in doctor():
        assert not report.works
        assert report.version == ""
        assert "not installed" in report.why_not
        assert report.remedy == f"pip install 'dnp-engine[{'gpu' if report.name == 'cuda' else report.name}]'"


def test_the_extra_s_name_finds_the_backend():
    with pytest.raises(BackendError, match=r"unknown backend 'gpu', did you mean 'cuda'\?"):
        registry.open_backend("gpu")


def test_doctor_does_not_advise_what_breaks_the_other_package():
    report = next(report for report in doctor() if report.name == "cuda")
    assert report.remedy == "pip uninstall --yes onnxruntime; then pip install 'dnp-engine[gpu]'"


@pytest.mark.parametrize("apart", [False, True])
def test_doctor_knows_two_onnxruntimes_in_one_place_from_two_in_different_ones(monkeypatch, tmp_path, apart):
    """In one place they overwrite each other's files; in two, the one that comes first on the path hides the other."""
    own = imports.place("onnxruntime")
    for module in (registry, ort_cuda):
        monkeypatch.setattr(module, "installed", lambda package: f"{package} 1.0")
        monkeypatch.setattr(module, "place", lambda package: tmp_path if apart and package.endswith("gpu") else own)
    cpu, cuda = (next(report for report in doctor() if report.name == name) for name in ("cpu", "cuda"))
    assert cpu.works and not cuda.works
    if apart:
        assert (cpu.why_not, cpu.remedy, cpu.version) == ("", "", "onnxruntime 1.0")
        assert f"onnxruntime-gpu 1.0 in {tmp_path} is hidden by onnxruntime 1.0 in {own}" in cuda.why_not
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # as on a machine where it comes first
        assert doctor()[0].version == "onnxruntime-gpu 1.0"
    else:
        assert "overwritten each other's files" in cpu.why_not
        assert "overwritten each other's files" in cuda.why_not
        assert cpu.remedy.startswith("pip uninstall")


def test_onnxruntime_s_own_logger_is_silent(tmp_path):
    """It writes to stderr whatever a session's severity is; here about a file that is no graph of its version."""
    code = """
import onnxruntime
from dnp.engine.backends.onnxruntime.session import FATAL, import_onnxruntime
set_to = []
onnxruntime.set_default_logger_severity = set_to.append
import_onnxruntime()
assert set_to == [FATAL]
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stderr == b""


@pytest.mark.parametrize("source", ["", "raise ValueError('half a package')", "import nothing_of_this_name"])
@pytest.mark.parametrize("backend", ["tensorrt-rtx", "openvino", "cpu"])
def test_a_broken_package_is_a_sentence_with_the_line_that_repairs_it(tmp_path, backend, source):
    module, package = {
        "tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx-cu13"),
        "openvino": ("openvino", "openvino"),
        "cpu": ("onnxruntime", "onnxruntime"),
    }[backend]
    (tmp_path / f"{module}.py").write_text(source)
    command = [DNP, "generate", "a red circle", "--backend", backend, "--out", str(tmp_path / "out")]
    told = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert told.returncode == 4, told.stderr
    assert "Traceback" not in told.stderr
    assert re.search(rf"pip install (--force-reinstall '{package}'|'dnp-engine\[{backend}\]')", told.stderr)


def test_doctor_survives_bindings_of_cuda_that_are_broken(tmp_path):
    (tmp_path / "cuda" / "bindings").mkdir(parents=True)
    for file in ("__init__.py", "bindings/__init__.py", "bindings/runtime.py"):
        (tmp_path / "cuda" / file).write_text("")
    told = subprocess.run(
        [DNP, "doctor"], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (told.returncode, told.stderr) == (0, "")
    assert "cuda-python>=13 is installed but empty" in told.stdout


@pytest.mark.parametrize("option", [{"device": 1}, {"eager": True}, {"memory_limit": 10}])
@pytest.mark.parametrize("backend", ["cpu", "openvino"])
def test_options_of_a_gpu_are_refused_where_there_is_none(step, backend, option):
    with pytest.raises(SettingsError, match=f"{next(iter(option))} is for a backend on a GPU, and '{backend}' runs on"):
        open_graph(step, backend, BackendOptions(**option))


def test_a_missing_package_is_named_with_its_pip_line(step, backend, monkeypatch):
    package = {"cpu": "onnxruntime", "openvino": "openvino"}[backend]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=rf"pip install 'dnp-engine\[{backend}\]'"):
        open_graph(step, backend)


def test_doctor_finds_two_packages_of_one_import_name(monkeypatch):
    monkeypatch.setattr(imports, "version", lambda package: "1.2.3")
    monkeypatch.setattr(registry, "place", lambda package: "site-packages")
    report = doctor()[0]
    assert "onnxruntime 1.2.3 and onnxruntime-gpu 1.2.3" in report.why_not
    assert "pip uninstall --yes onnxruntime onnxruntime-gpu" in report.remedy


def test_doctor_notices_wrong_numbers(monkeypatch):
    monkeypatch.setattr(HostBuffer, "read", lambda self: self.view * 0)
    for report in doctor():
        assert not report.works
        assert "wrong numbers" in report.why_not or report.name not in HOSTS


def test_carried_outputs_are_the_next_run_s_inputs(step, backend):
    with open_graph(step, backend) as session, open_graph(step, backend) as by_hand:
        for opened in (session, by_hand):
            fill(opened, 2, 3)
        session.feed_back("state", "next_state")
        for _ in range(3):
            session.run()
            by_hand.run()
            by_hand.inputs["state"].copy(by_hand.outputs["next_state"])
            np.testing.assert_array_equal(session.inputs["state"].read(), by_hand.inputs["state"].read())
        for wrong, told in (
            (("stat", "next_state"), "no input 'stat' to feed back, did you mean 'state'?"),
            (("state", "next"), "no output 'next' to feed back"),
            (("state", "next_index"), "cannot be fed back into 'state'"),
        ):
            with pytest.raises(SettingsError, match=re.escape(told)):
                session.feed_back(*wrong)
        with pytest.raises(SettingsError, match="takes over 'next_state', and cannot be aliased"):
            session.alias("state", by_hand.outputs["next_state"])
        by_hand.alias("state", session.outputs["next_state"])
        with pytest.raises(SettingsError, match="is aliased, nothing can be fed back into it"):
            by_hand.feed_back("state", "next_state")


def test_cores_are_those_that_this_process_may_use(monkeypatch, tmp_path):
    assert 1 <= processor.core_count() <= os.cpu_count()
    for cpu in range(4):  # two cores of two threads each
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        siblings = "0,2" if cpu % 2 == 0 else "1,3"
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(siblings + "\n")
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(processor, "_CPUS", tmp_path)
    monkeypatch.setattr(processor, "_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert processor.core_count() == 2
    quota.write_text("max 100000")
    assert processor.core_count() == 2
    quota.write_text("50000 100000")
    assert processor.core_count() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7})
    assert processor.core_count() == 1


def test_the_public_names_are_there_and_importing_them_is_light():
    for name in dnp.engine.__all__:
        assert getattr(dnp.engine, name).__name__ == name
    assert dir(dnp.engine) == dnp.engine.__all__
    with pytest.raises(AttributeError):
        dnp.engine.nonsense  # noqa: B018
    assert importlib.import_module("dnp.engine").open_session is open_session


def test_running_a_session_imports_no_training_library_and_opens_no_socket(step, backend, tmp_path):
    code = f"""
    import sys
    opened = []
    sys.addaudithook(lambda event, _: opened.append(event) if event.startswith("socket.") else None)
    import dnp.engine
    assert not set(sys.modules) & {{"numpy", "onnxruntime", "openvino"}}
    import numpy as np
    from pathlib import Path
    from dnp.engine import GraphSpec, TensorSpec, open_graph
    assert not set(sys.modules) & {{"onnxruntime", "openvino"}}
    state, index = TensorSpec(("batch", 4, "width")), TensorSpec(("batch",), "int64")
    image = TensorSpec(state.shape, "uint8")
    graph = GraphSpec("step", Path({str(step.path)!r}), {{"state": state, "noise": state, "index": index}},
        {{"next_state": state, "next_index": index, "image": image}})
    with open_graph(graph, {backend!r}) as session:
        session.reshape(batch=2, width=3)
        session.run()
        session.outputs["image"].read()
    heavy = {{"torch", "diffusers", "transformers", "onnx", "onnxscript", "tensorflow"}} & set(sys.modules)
    assert not heavy, heavy
    assert not opened, opened
    """
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_ctrl_c_after_openvino_sessions_were_closed(tmp_path):
    """OpenVINO's cores leave a dangling signal stack when they are freed in the order they were made."""
    code = """
        import os, signal
        from dnp.engine.bundle.bundle import Bundle
        from dnp.engine.backends.registry import open_session
        bundle, graphs = Bundle.default(), ("encode_text", "decode_latents", "encode_image")
        sessions = [open_session(bundle, graph, "openvino") for graph in graphs]
        while sessions:
            sessions.pop(0).close()
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            print("interrupted")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
