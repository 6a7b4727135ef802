"""Windows on buffers, and sessions captured at given sizes: in ordinary memory, and on the stand-in for a GPU.

Nothing here ran on a GPU, see ``fake_gpu``.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from small import small_bundle, write_graph

from dnp.engine.backends.registry import open_backend, open_graph
from dnp.engine.backends.session import BackendOptions
from dnp.engine.bundle.tensors import TensorSpec
from dnp.engine.errors import BackendError, SettingsError
from dnp.engine.plans.build import build_plans
from dnp.engine.plans.profile import Range

EVERYWHERE = ("cpu", "openvino", "cuda", "tensorrt-rtx")
ON_GPU = ("cuda", "tensorrt-rtx")
SHAPE = ("places", 2, "width")


@pytest.fixture
def graph(tmp_path):
    """x' = 2 x, with x fed back where a test says so; and ids, which do not take part."""
    spec, ids = TensorSpec(SHAPE), TensorSpec(("places",), "int64")
    nodes = [helper.make_node("Add", ["x", "x"], ["doubled"]), helper.make_node("Add", ["ids", "ids"], ["more"])]
    inputs, outputs = {"x": spec, "ids": ids}, {"doubled": spec, "more": ids}
    return write_graph(tmp_path / "double.onnx", "double", nodes, inputs, outputs)


def a_write(shape, rng):
    """An index into some leading dimensions of ``shape``, and what to write there."""
    depth = int(rng.integers(0, len(shape) + 1))
    index = tuple(int(rng.integers(0, size)) for size in shape[:depth])
    return index, rng.standard_normal(shape[depth:]).astype(np.float32)


@pytest.mark.parametrize("backend", EVERYWHERE)
@settings(max_examples=20)
@given(places=st.integers(1, 8), width=st.integers(1, 8), seed=st.integers(0, 1 << 30))
def test_what_is_written_through_windows_is_what_numpy_writes(graph, gpu, backend, places, width, seed):
    """Writes and copies in any order and overlap, none of which is waited for; neighbours stay as they were."""
    rng = np.random.default_rng(seed)
    with open_graph(graph, backend) as session:
        session.reshape(places=places, width=width)
        x, doubled = session.inputs["x"], session.outputs["doubled"]
        expected = rng.standard_normal(x.shape).astype(np.float32)
        x.write(expected)
        for _ in range(6):
            index, part = a_write(x.shape, rng)
            x.at(*index).write(part)
            expected[index] = part
        session.run()
        whole = doubled.read()
        np.testing.assert_array_equal(whole, 2 * expected)
        for _ in range(3):
            source, target = (int(n) for n in rng.integers(0, places, 2))
            x.at(target).copy(doubled.at(source))
            expected[target] = whole[source]
            row = int(rng.integers(0, 2))
            assert np.array_equal(doubled.at(source).at(row).read(), whole[source, row])
        np.testing.assert_array_equal(x.read(), expected)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_a_window_follows_its_buffer_and_tells_what_it_lacks(graph, gpu, backend):
    with open_graph(graph, backend) as session:
        x = session.inputs["x"]
        with pytest.raises(SettingsError, match=r"'x' \[0\] has nothing at \[0\]"):
            x.at(0)
        session.reshape(places=2, width=3)
        last = x.at(1)
        assert (last.shape, last.dtype, last.location) == ((2, 3), x.dtype, x.location)
        session.reshape(places=8, width=7)  # it has moved
        last.write(np.ones((2, 7), np.float32))
        assert np.array_equal(x.read()[1], np.ones((2, 7)))
        for index in ((8,), (-1,), (0, 2), (0, 0, 7), (0, 0, 0, 0)):
            with pytest.raises(SettingsError, match=r"'x' \[8, 2, 7\] has nothing at .*indices count from 0"):
                x.at(*index)
        with pytest.raises(SettingsError, match=r"'x\[1\]' holds float32 \[2, 7\], but was given float32 \[1\]"):
            last.write(np.ones(1, np.float32))
        with pytest.raises(SettingsError, match=r"'ids\[1\]' holds int64 \[\], but 'x\[1\]' holds"):
            session.inputs["ids"].at(1).copy(last)
        session.reshape(places=1, width=7)
        with pytest.raises(SettingsError, match=r"has nothing at \[1\]"):
            last.read()
        with pytest.raises(BackendError, match=r"'x\[0\]' lies on .* cannot be read in place here; copy it instead"):
            session.alias("x", x.at(0))


def test_windows_copy_from_any_memory(graph, gpu):
    with open_graph(graph, "cpu") as host, open_graph(graph, "cuda") as device:
        for session in (host, device):
            session.reshape(places=3, width=4)
        array = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
        host.inputs["x"].write(array)
        device.inputs["x"].write(np.zeros_like(array))
        device.inputs["x"].at(2, 1).copy(host.inputs["x"].at(0, 0))
        assert np.array_equal(device.inputs["x"].read()[2, 1], array[0, 0])
        assert device.inputs["x"].read()[:2].any() == False  # noqa: E712  numpy's own
        host.inputs["x"].at(1).copy(device.inputs["x"].at(2))
        assert np.array_equal(host.inputs["x"].read()[1, 1], array[0, 0])


@pytest.mark.parametrize("backend", ON_GPU)
def test_neighbours_are_written_without_waiting(graph, gpu, backend):
    with open_graph(graph, backend) as session:
        session.reshape(places=4, width=2)
        x = session.inputs["x"]
        part = np.ones((2, 2), np.float32)
        x.at(0).write(part)  # makes the pinned memory
        since = len(gpu.calls)
        for place in (1, 2, 3):
            x.at(place).write(part)
        x.at(0).copy(x.at(1))
        calls = gpu.counted(since)
        assert (calls["to_device"], calls["on_device"]) == (3, 1)
        assert not calls["wait"] + calls["synchronize"] + calls["malloc_host"]
        x.at(3, 1).write(part[0] * 7)  # on top of what the device may not have read yet
        assert gpu.counted(since)["wait"] == 1
        assert np.array_equal(x.read()[3], [[1, 1], [7, 7]])


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_reading_waits_for_a_device_or_for_nobody(graph, gpu, backend):
    with open_graph(graph, backend) as session:
        assert session.asynchronous == (backend in ON_GPU)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_captured_sizes_are_one_launch_each_and_change_no_result(graph, gpu, backend):
    """A run is the same number by number, captured or not; sizes that are captured are captured once."""
    sizes = [{"places": 4, "width": 3}, {"places": 2, "width": 3}, {"places": 1, "width": 1}]
    with open_graph(graph, backend) as session:
        session.feed_back("x", "doubled")
        for dims in [*sizes, sizes[0]]:
            session.capture(**dims)
            assert session.inputs["x"].shape == (dims["places"], 2, dims["width"])
        captured = [dict(dims) for dims in session.captured]
        assert captured == (sizes if backend in ON_GPU else [])
        for dims in [*sizes[::-1], {"places": 3, "width": 2}]:
            session.reshape(**dims)
            x = np.random.default_rng(0).standard_normal(session.inputs["x"].shape).astype(np.float32)
            session.inputs["x"].write(x)
            since, replayed = len(gpu.calls), len(gpu.ort.captured)
            for _ in range(3):
                session.run()
            launches = gpu.counted(since)["launch"] or len(gpu.ort.captured) - replayed
            assert launches == (3 if dims in captured else 0)
            np.testing.assert_array_equal(session.inputs["x"].read(), x * 8)


@pytest.mark.parametrize("backend", ON_GPU)
def test_a_capture_reads_nothing_that_other_sizes_left(graph, gpu, backend):
    """What is an index at one size may be out of range at the next: while it captures, inputs are zeros."""
    with open_graph(graph, backend) as session:
        session.reshape(places=8, width=1)
        session.inputs["ids"].write(np.arange(8))
        session.capture(places=4, width=1)
        assert not session.outputs["more"].read().any()


@pytest.mark.parametrize("backend", ON_GPU)
def test_nothing_is_captured_when_run_eagerly(graph, gpu, backend):
    with open_graph(graph, backend, BackendOptions(eager=True)) as session:
        session.capture(places=2, width=2)
        assert session.inputs["x"].shape == (2, 2, 2)
        assert not session.captured
        assert not gpu.counted()["begin_capture"]


def test_sizes_out_of_range_are_neither_captured_nor_run(graph, gpu):
    with open_graph(graph, "tensorrt-rtx") as session:
        for use in (session.capture, session.reshape):
            with pytest.raises(SettingsError, match=r"'double': the plan was compiled for width 1:4:8, not for 9$"):
                use(places=2, width=9)


def test_the_backends_capture_what_the_contract_says(gpu, tmp_path):
    """The sizes that a session fills up to are the symbols' own: of a plan's largest, or of a default plan's."""
    bundle = small_bundle(tmp_path)
    build_plans(bundle, ranges={"batch": Range(1, 1, 3), "steps": Range(1, 2, 30)}, folder=tmp_path / "plans")
    found = {}
    for name in EVERYWHERE:
        backend = open_backend(name, BackendOptions(plans=tmp_path / "plans"))
        with backend.session(bundle.graph("denoise"), bundle) as session:
            fit = session.limits.fit
            found[name] = {
                symbol: [fit(symbol, size) for size in sizes]
                for symbol, sizes in {
                    "places": (1, 3), "rows": (1, 2, 5, 6, 7), "steps": (4, 129), "noise_steps": (1, 2),
                    "height": (10,),
                }.items()
            }  # fmt: skip
        backend.close()
    as_they_are = {"places": [1, 3], "rows": [1, 2, 5, 6, 7], "steps": [4, 129], "noise_steps": [1, 2], "height": [10]}
    assert found["cpu"] == found["openvino"] == as_they_are
    assert found["cuda"] == {
        "places": [8, 8], "rows": [1, 2, 6, 6, 8], "steps": [128, 129], "noise_steps": [1, 128], "height": [10]
    }  # fmt: skip
    assert found["tensorrt-rtx"] == {
        "places": [3, 3], "rows": [1, 2, 6, 6, 7], "steps": [30, 129], "noise_steps": [1, 30], "height": [10]
    }  # fmt: skip
