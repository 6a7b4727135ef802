"""Plans from the real compiler of TensorRT for RTX, which needs no GPU; and the folder that they are kept in."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, save

from dnp.cli import run
from dnp.engine.bundle.columns import ROW
from dnp.engine.bundle.contract import symbols
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.tensors import TensorSpec
from dnp.engine.errors import BackendError, BundleError, Cancelled, OutputError, SettingsError
from dnp.engine.plans.build import build_plans, memory_needed, target_for
from dnp.engine.plans.compiler import compile_plan
from dnp.engine.plans.plan import PlanSpec
from dnp.engine.plans.product import TENSORRT_RTX, listening, logger
from dnp.engine.plans.profile import Range, asked_for, default_profile, from_dict
from dnp.engine.plans.settings import BuildSettings, Target
from dnp.engine.plans.store import PlanStore
from dnp.engine.system import cuda
from dnp.export.fp16.float32 import infer_types, keep_float32
from dnp.export.passes.onnx_file import write_model

DNP = str(Path(sys.executable).with_name("dnp"))
GRAPHS = ["encode_text", "decode_latents"]  # of which plans are built in a second
SETTINGS = BuildSettings(sm=(86, 89, 120))
# The most activation memory of each graph's plan, in bytes, at batches up to 8 (32 rows of the caption decoder): a
# third more than was measured.
ACTIVATIONS = {
    "encode_text": 12e6,
    "denoise": 29e6,
    "decode_latents": 35e6,
    "encode_image": 24e6,
    "caption_step": 19e6,
}

# The same for one image of 256x256 pixels, where tokens are many: attention that is not fused takes a matrix of all
# tokens by all tokens besides. The other graphs have 65 tokens at most, too few for that matrix to be seen.
LARGE_ACTIVATIONS = {"denoise": 27e6, "decode_latents": 51e6}


def no_gpu() -> bool:
    try:
        cuda.open_cuda()
    except BackendError:
        return True
    return False


without_gpu = pytest.mark.skipif(not no_gpu(), reason="says what happens where there is no GPU")


@pytest.fixture(scope="module")
def plans(default_bundle, tmp_path_factory):
    """Plans of two graphs, for three architectures at once."""
    folder = tmp_path_factory.mktemp("plans")
    return build_plans(default_bundle, graphs=GRAPHS, settings=SETTINGS, folder=folder)


@pytest.fixture
def small(tmp_path):
    """A graph that is compiled in a moment: y = x w, float16, and the bundle's part that a plan's key needs."""
    weight = numpy_helper.from_array(np.eye(16, dtype=np.float16), "w")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT16, ["batch", 16]) for n in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "small", [x], [y], [weight])
    path = tmp_path / "small.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    spec = TensorSpec(("batch", 16), "float16")
    return GraphSpec("small", path, {"x": spec}, {"y": spec})


def for_sm89() -> Target:
    return target_for(TENSORRT_RTX, (89,))


@pytest.mark.slow
def test_every_graph_compiles_in_fp16_for_three_architectures(default_fp16, tmp_path):
    plans = build_plans(default_fp16, settings=SETTINGS, folder=tmp_path)
    assert [plan.spec.graph for plan in plans] == list(default_fp16.graphs)
    for plan in plans:
        assert plan.spec.architecture == "sm86,sm89,sm120"
        assert plan.spec.precision == "fp16"
        assert plan.path.read_bytes()[:4] == b"vtrt"
        batch = asked_for(from_dict(plan.spec.profile), symbols(default_fp16))["batch"]
        assert (batch.low, batch.high) == (1, 8)
        assert 0 < plan.statistics["activation_bytes"] <= ACTIVATIONS[plan.spec.graph], plan.statistics
        assert plan.statistics["weights_bytes"] > 0
        assert plan.statistics["layers"] > 0
        assert plan.statistics["seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("sm", [75, 80, 86, 89, 120, 121])
def test_the_denoiser_compiles_for_each_architecture_alone(default_fp16, tmp_path, sm):
    (plan,) = build_plans(default_fp16, graphs=["denoise"], settings=BuildSettings(sm=(sm,)), folder=tmp_path)
    assert plan.statistics["activation_bytes"] <= ACTIVATIONS["denoise"]


def unfused(graph: GraphSpec, folder: Path) -> GraphSpec:
    """The same graph with the products of queries and keys in float32, which no fused kernel takes."""
    model = ir.load(graph.path)
    infer_types(model)
    products = []
    for node in model.graph:
        if node.op_type == "Softmax":
            value = node.inputs[0]
            while value.producer().op_type in ("Where", "Add"):  # the mask
                value = value.producer().inputs[1 if value.producer().op_type == "Where" else 0]
            products.append(value.producer().inputs[0].name)  # in fp16, under the Cast of the softmax
    assert products
    keep_float32(model, products)
    write_model(model, folder / graph.path.name)
    return replace(graph, path=folder / graph.path.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_ACTIVATIONS)
def test_the_bound_on_activations_tells_fused_attention_from_unfused(default_fp16, tmp_path, name):
    sides = dict.fromkeys(("height", "width"), Range(256, 256, 256))
    graph = default_fp16.graphs[name]
    profile = default_profile(default_fp16, graph, {"batch": Range(1, 1, 1), **sides})
    sizes = [
        compile_plan(one, profile, BuildSettings(), for_sm89())[1]["activation_bytes"]
        for one in (graph, unfused(graph, tmp_path))
    ]
    assert sizes[0] <= LARGE_ACTIVATIONS[name] < sizes[1], sizes


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_streaming": True},
        {"weight_streaming": True, "optimization_level": 0, "workspace": 10**9},
        *({"optimization_level": level} for level in range(6)),
        {"workspace": 10**12},
    ],
)
def test_the_compiler_takes_every_setting(small, settings):
    plan, statistics = compile_plan(small, {"batch": Range(1, 2, 3)}, BuildSettings(**settings), for_sm89())
    assert bytes(memoryview(plan)[:4]) == b"vtrt"
    assert statistics["weights_bytes"] > 0


def test_a_plan_that_is_there_is_not_built_again(plans, default_bundle):
    folder = plans[0].path.parent
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = build_plans(default_bundle, graphs=GRAPHS, settings=SETTINGS, folder=folder)
    assert [plan.path for plan in again] == [plan.path for plan in plans]
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert after == before


def test_inspect_shows_the_plans(plans, default_bundle, capsys):
    folder = str(plans[0].path.parent)
    assert run(["inspect", str(default_bundle.path), "--plans", folder]) == 0
    told = capsys.readouterr().out
    assert "tensorrt-rtx 1.7" in told
    assert "sm86,sm89,sm120, fp32" in told
    assert "batch 1:8" in told
    assert "activations" in told
    decoder = next(plan for plan in plans if plan.spec.graph == "decode_latents")
    most = sum(decoder.statistics[name] for name in ("weights_bytes", "activation_bytes", "buffer_bytes"))
    assert f"on the GPU {most / 1e6:.1f} MB at most" in told
    assert run(["inspect", str(default_bundle.path), "--plans", folder, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["plans"]
    assert {plan["spec"]["graph"] for plan in listed} == set(GRAPHS)


@without_gpu
def test_layers_and_running_take_a_gpu(plans, default_bundle, capsys):
    folder = str(plans[0].path.parent)
    assert run(["inspect", str(default_bundle.path), "--plans", folder, "--layers"]) == 4
    assert "there is no NVIDIA driver here" in capsys.readouterr().err
    assert run(["generate", "a circle", "--backend", "tensorrt-rtx", "--bundle", str(default_bundle.path)]) == 4
    assert "there is no NVIDIA driver here" in capsys.readouterr().err


@without_gpu
@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--backend", "tensorrt-rtx"], 4, "name the architectures to compile for, e.g. --sm 89,120"),
        (["--sm", "90"], 4, "does not compile for SM 90; it knows 75, 80, 86, 89, 120, 121"),
        (["--sm", "8.9"], 2, "no list of numbers such as 89,120"),
        (["--sm", "89,89"], 2, "named twice: 89, 89"),
        (["--sm", "89", "--batch", "8:1"], 2, "8:8:1 is no range"),
        (["--sm", "89", "--batch", "many"], 2, "'many' is no range; write 4, 1:8 or 1:4:8"),
        (["--sm", "89", "--height", "102"], 2, "height 102 has sizes that are no multiples of 4"),
        (["--sm", "89", "--height", "64:4096"], 2, "beyond 256 pixels"),
        (["--sm", "89", "--graph", "denoize"], 3, "did you mean 'denoise'?"),
        (["--sm", "89", "--optimization-level", "9"], 2, "from 0 to 5, not 9"),
        (["--backend", "tensorrt"], 4, "pip install 'dnp-engine[tensorrt]'"),
        (["--backend", "openvino"], 4, "'openvino' compiles no plans, known: cpu, tensorrt, tensorrt-rtx"),
        (
            ["--sm", "89", "--refit", "--graph", "encode_text"],
            4,
            "plans that can be refitted are built where the GPU is",
        ),
        (["--sm", "89", "--workspace", "1", "--graph", "encode_image"], 4, "cannot compile 'encode_image'"),
    ],
)
def test_bad_input_is_a_sentence(default_bundle, tmp_path, capsys, arguments, code, told):
    folder = tmp_path / "plans"
    assert run(["build", str(default_bundle.path), "--plans", str(folder), *arguments]) == code
    assert told in capsys.readouterr().err
    assert not list(folder.glob("*.plan")) if folder.exists() else True


def test_a_folder_that_cannot_be_written_is_told(default_bundle, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        build_plans(default_bundle, settings=BuildSettings(sm=(89,)), folder=tmp_path / "file", graphs=["encode_text"])


def test_a_callback_stops_a_build_and_nothing_is_left(default_bundle, tmp_path):
    seen = []

    def stop(state):
        seen.append(state)
        return len(seen) < 3

    with pytest.raises(Cancelled, match="build of 'denoise' was stopped"):
        build_plans(
            default_bundle, graphs=["denoise"], settings=BuildSettings(sm=(89,)), folder=tmp_path, progress=stop
        )
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]
    assert [state.seconds for state in seen] == sorted(state.seconds for state in seen)


def test_progress_names_the_phase(default_bundle, tmp_path):
    seen = []
    build_plans(
        default_bundle, graphs=["encode_text"], settings=BuildSettings(sm=(89,)), folder=tmp_path, progress=seen.append
    )
    assert {state.graph for state in seen} == {"encode_text"}
    assert any(state.phase != "parsing" for state in seen)


def test_an_operator_that_tensorrt_lacks_is_named(tmp_path):
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch"]) for n in "xy")
    nodes = [helper.make_node("Multinomial", ["x2"], ["y2"]), helper.make_node("Cast", ["y1"], ["y"], to=1)]
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axis"], ["x2"]),
        nodes[0],
        helper.make_node("Squeeze", ["y2", "axis"], ["y1"]),
        nodes[1],
    ]
    axis = numpy_helper.from_array(np.array([1], np.int64), "axis")
    graph = helper.make_graph(nodes, "odd", [x], [y], [axis])
    path = tmp_path / "odd.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    spec = TensorSpec(("batch",))
    with pytest.raises(BundleError, match=r"odd\.onnx: TensorRT for RTX cannot read it: Multinomial: UNSUPPORTED_NODE"):
        compile_plan(
            GraphSpec("odd", path, {"x": spec}, {"y": spec}), {"batch": Range(1, 2, 3)}, BuildSettings(), for_sm89()
        )


def test_a_file_that_is_no_graph_is_told(small):
    small.path.write_bytes(b"nonsense")
    with pytest.raises(BundleError, match=r"small\.onnx: TensorRT for RTX cannot read it"):
        compile_plan(small, {"batch": Range(1, 2, 3)}, BuildSettings(), for_sm89())


def test_each_thread_hears_what_tensorrt_says_to_it():
    trt = TENSORRT_RTX.load()
    meet, heard = threading.Barrier(2, timeout=60), {}

    def say(what):
        logger(trt).log(trt.ILogger.Severity.ERROR, what)

    def listen(name):
        with listening(trt) as log:
            meet.wait()  # both listen
            say(name)
            with listening(trt) as inner:
                say(f"{name} inside")
            meet.wait()  # both have spoken
            if name == "one":
                stranger = threading.Thread(target=say, args=["a thread of TensorRT's own"])
                stranger.start()
                stranger.join()
            meet.wait()
            heard[name] = log.errors(), inner.errors()

    threads = [threading.Thread(target=listen, args=[name]) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == {n: (f"{n}; a thread of TensorRT's own", f"{n} inside") for n in ("one", "two")}
    assert not logger(trt).listeners


def test_two_processes_that_want_the_same_plan_build_it_once(default_bundle, tmp_path):
    command = [
        DNP, "build", str(default_bundle.path), "--sm", "89", "--graph", "encode_text",
        "--plans", str(tmp_path), "--json",
    ]  # fmt: skip
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    built = {json.loads(out)["plans"][0]["statistics"]["built"] for out, _ in told}
    assert len(built) == 1
    assert sum("compiling" in errors for _, errors in told) == 1
    assert len(list(tmp_path.glob("*.plan"))) == 1


@pytest.mark.parametrize("often", [1, 2])
def test_ctrl_c_ends_a_build_and_leaves_nothing(default_bundle, tmp_path, often):
    command = [DNP, "build", str(default_bundle.path), "--sm", "89", "--graph", "denoise", "--plans", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while "compiling" not in (line := process.stderr.readline()):
            assert line, "it ended by itself"
        time.sleep(0.5)
        for _ in range(often):
            time.sleep(0.02)
            process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait(timeout=120) == 130, told
        assert told.strip() == "dnp: cancelled"
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


def test_a_plan_is_found_only_as_it_was_written(tmp_path):
    spec = a_spec()
    store = PlanStore(tmp_path)
    assert store.find(spec) == (None, "")
    written = store.write(spec, b"a plan", {"seconds": 1.5})
    assert store.find(spec) == (written, "")
    other = replace(spec, version="2")
    assert store.find(other) == (None, f"{written.path.name}: version is 1, wanted is 2")
    written.path.write_bytes(b"a plam")
    assert store.find(spec)[1] == f"{written.path.name} is damaged: its SHA-256 differs"
    written.path.write_bytes(b"a pla")
    assert store.find(spec)[1] == f"{written.path.name} is damaged: 5 bytes, wanted are 6"
    written.path.with_suffix(".json").unlink()
    assert "no sidecar that can be read" in store.find(spec)[1]
    assert not [path.name for path in tmp_path.iterdir() if "partial" in path.name]


def test_the_key_covers_every_field_and_nothing_else(tmp_path):
    spec = a_spec()
    changed = [
        replace(spec, **{field.name: {"x": [1, 1, 2]} if field.type.startswith("dict") else "other"})
        for field in fields(spec)
    ]
    assert len({other.key for other in [spec, *changed]}) == len(fields(spec)) + 1
    for field, other in zip(fields(spec), changed, strict=True):
        assert other.difference(spec).startswith(field.name)
    assert not spec.difference(spec)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=3).map(sorted))
def test_a_range_reads_back_as_it_is_written(numbers):
    parsed = Range.parse(":".join(map(str, numbers)))
    assert (parsed.low, parsed.high) == (numbers[0], numbers[-1])
    assert parsed.low <= parsed.best <= parsed.high
    assert Range.parse(str(parsed)) == parsed


@given(st.text(max_size=12))
def test_no_text_is_a_range_by_accident(text):
    try:
        parsed = Range.parse(text)
    except SettingsError:
        return
    assert 1 <= parsed.low <= parsed.best <= parsed.high


def test_what_a_plan_will_take_is_said_before_it_is_built(default_bundle):
    graph = default_bundle.graphs["denoise"]
    state = 4 * 4 * 16 * 16 * 4  # bytes of [4 slots, 4 channels, 16, 16] in float32, of one image
    noise, latents, table = 128 * state // 4, state // 4, 128 * ROW * 4
    bank, numbers = 2 * 32 * 128 * 4, (1 + 1 + 2) * 8  # index, next index, and the rows of two roles
    rows = 2 * 2 * 8  # place and role of two rows
    for batch in (1, 8):
        buffers = batch * (2 * state + noise + 2 * latents + bank + table + numbers + rows) / 1e6
        profile = default_profile(default_bundle, graph, {"batch": Range(1, 1, batch)})
        told = memory_needed(graph, profile)
        assert re.match(r"compiling 11 MB of weights, about 0\.\d GB of memory", told)
        assert f"the GPU will hold the weights, {buffers:.1f} MB of buffers, and activations, known when" in told


def a_spec() -> PlanSpec:
    return PlanSpec("denoise", "ab", "tensorrt-rtx", "1", "sm89", "fp16", {"batch": [1, 1, 8]}, {"refit": False})
