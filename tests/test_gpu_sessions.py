"""What runs on a GPU, against a stand-in for CUDA and TensorRT: the order of the calls, and what is waited for.

Nothing here ran on a GPU, see ``fake_gpu``. Results are compared with those of the ``cpu`` backend.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fake_gpu
import numpy as np
import onnx
import onnx.numpy_helper
import pytest

import dnp
from dnp.engine import Bundle, seal
from dnp.engine.backends import device, registry
from dnp.engine.backends.onnxruntime import cuda as ort_cuda
from dnp.engine.backends.session import BackendOptions
from dnp.engine.backends.tensorrt import TensorRtBackend, TensorRtRtxBackend
from dnp.engine.errors import BackendError, DnpError, SettingsError
from dnp.engine.plans.build import build_plans, target_for
from dnp.engine.plans.plan import PlanSpec
from dnp.engine.plans.product import PRODUCTS, Product
from dnp.engine.plans.profile import Range
from dnp.engine.plans.settings import BuildSettings
from dnp.engine.plans.store import PlanStore
from dnp.runtime.batching import Batcher, BatchOptions

BACKENDS = {"tensorrt": TensorRtBackend, "tensorrt-rtx": TensorRtRtxBackend, "cuda": ort_cuda.CudaBackend}
PROMPT = "a large red circle left of a small blue square on a plain yellow background"
QUICK = {"steps": 3, "dns_steps": 2}


@pytest.fixture(params=sorted(PRODUCTS))
def product(request):
    return request.param


@pytest.fixture(scope="module")
def on_cpu():
    return dnp.Pipeline.open()


def test_the_fake_has_the_public_face_of_what_it_stands_for(gpu):
    assert {name for name in vars(fake_gpu.FakeCuda) if not name.startswith("_")} >= fake_gpu.PUBLIC
    assert "FAKE" in gpu.properties().name
    assert gpu.trt.__version__.endswith("fake")


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_whole_request_is_the_same_as_on_the_cpu(open_pipeline, on_cpu, backend, eager):
    settings = {"seed": 3, "images": 2, "compare": True, **QUICK}
    result = open_pipeline(backend, eager=eager)(PROMPT, **settings)
    expected = on_cpu(PROMPT, **settings)
    for name in ("arrays", "dns_arrays", "plain_arrays"):
        difference = getattr(result, name).astype(int) - getattr(expected, name)
        assert abs(difference).max() <= 1  # the steps are padded here, and the threads may differ
    assert result.negatives == expected.negatives
    assert "FAKE" in result.runs_on
    assert result.backend == backend


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_captured_runs_give_the_bits_of_eager_ones(open_pipeline, sampler):
    settings = {"seed": 5, "sampler": sampler, **QUICK}
    captured, eager = (open_pipeline(eager=eager)(PROMPT, **settings) for eager in (False, True))
    assert np.array_equal(captured.arrays, eager.arrays)
    assert captured.negatives == eager.negatives


def test_between_steps_nothing_is_waited_for_and_nothing_crosses(open_pipeline, gpu):
    pipeline = open_pipeline()
    pipeline.warm_up()
    request = pipeline.resolve(dnp.Request(prompt=PROMPT, negative="a small green cross", steps=20))
    marks = [len(gpu.calls)]
    steps = pipeline.steps(request)
    for _ in steps:
        marks.append(len(gpu.calls))
    between = [gpu.calls[start:end] for start, end in itertools.pairwise(marks[1:])]
    assert between == [["launch"]] * 19


def test_tokens_cross_to_the_host_but_caches_do_not(open_pipeline, gpu):
    pipeline = open_pipeline()
    pipeline.warm_up()
    steps = pipeline.steps(pipeline.resolve(dnp.Request(prompt=PROMPT, **QUICK)))
    marks = [len(gpu.calls) for step in steps if step.phase == "caption"]
    looks = [gpu.calls[start:end] != ["launch"] for start, end in itertools.pairwise(marks)]
    assert looks.count(False) >= 2 * looks.count(True) > 0  # most tokens are found without the host
    for start, end in itertools.pairwise(marks):
        others = [call for call in gpu.calls[start:end] if call not in ("launch", "malloc_host")]
        assert others in ([], ["to_host", "synchronize"])
        assert gpu.calls[start:end].count("launch") == 1


def test_contexts_latents_and_vision_features_stay_on_the_device(open_pipeline, gpu):
    pipeline = open_pipeline()
    pipeline.warm_up()
    since = len(gpu.calls)
    pipeline(PROMPT, negative="a small green cross", **QUICK)
    calls = gpu.counted(since)
    # table, noise, state and index go up, empty and for the sample; whose rows are whose, thrice; ids of two texts; and
    # the place to decode. The image comes down, and the latents, which must be finite
    assert calls["to_device"] == 2 * 4 + 3 + 2 + 1
    assert calls["to_host"] == 2
    assert calls["on_device"] == 2 + 1  # the embeddings, and the latents to decode; all else is aliased or captured


def test_a_request_records_nothing_and_allocates_nothing_on_the_device(open_pipeline, gpu):
    pipeline = open_pipeline(largest=3)
    pipeline.warm_up()
    before = gpu.counted()
    # the captioner's two at three batches, the text encoder and the decoder at one; denoise at 1, 2, 3, 4 and 6 rows,
    # with and without noise on the way
    assert before["begin_capture"] == before["end_capture"] == 2 * 3 + 2 + 2 * 5
    variations = (
        {"sampler": "ddim", "steps": 3},
        {"sampler": "euler_a", "steps": 7, "guidance": -2.5},
        {"sampler": "unipc", "steps": 40, "guidance": [1.0] * 40},
        {"sampler": "heun", "steps": 5, "images": 3, "seed": 9},
    )
    for variation in variations:
        pipeline("another prompt", negative="and its n*", **variation)
    pipeline(PROMPT, **QUICK)
    after = gpu.counted()
    for call in ("begin_capture", "malloc", "stream"):
        assert after[call] == before[call], call


def test_every_step_of_every_sampler_is_a_launch(open_pipeline, gpu):
    pipeline = open_pipeline()
    pipeline.warm_up()
    since = len(gpu.calls)
    result = pipeline(PROMPT, negative="n*", sampler="pndm", steps=6)
    job = pipeline.resolve(result.request)
    assert gpu.counted(since)["launch"] == job.tables[-1].calls + 2 + 1  # the text encoder twice, the decoder once


def test_a_plan_s_facts_tell_what_its_session_takes(open_pipeline, tmp_path):
    pipeline = open_pipeline()
    pipeline.graphs.open("encode_text")
    statistics = PlanStore(tmp_path / "plans").newest("encode_text", "tensorrt-rtx")[0].statistics
    assert pipeline.graphs.backend.gpu.allocated == statistics["weights_bytes"] + statistics["buffer_bytes"]


def test_activations_share_one_piece_of_memory(open_pipeline, gpu):
    open_pipeline().warm_up()
    assert len({context.scratch for context in gpu.trt.contexts}) == 1


def test_closing_gives_everything_back(open_pipeline, gpu):
    pipeline = open_pipeline()
    pipeline(PROMPT, **QUICK)
    assert gpu.device
    assert gpu.pinned
    pipeline.close()
    assert (gpu.device, gpu.pinned, gpu.graphs, gpu.events, gpu.streams) == ({}, {}, {}, {}, set())
    with pytest.raises(DnpError, match="closed"):
        pipeline(PROMPT)


@pytest.mark.parametrize("how", ["capturable", "end_capture"])
def test_a_capture_that_fails_falls_back_with_one_warning(open_pipeline, gpu, caplog, how):
    if how == "capturable":
        gpu.trt.fail.add("capturable")
    else:
        gpu.fail["end_capture"] = fake_gpu.broken("cudaStreamEndCapture failed: operation not permitted")
        gpu.begin_capture = lambda stream: None
    with caplog.at_level(logging.WARNING, "dnp.engine"):
        result = open_pipeline()(PROMPT, **QUICK)
    told = [record.getMessage() for record in caplog.records if "without CUDA graphs" in record.getMessage()]
    assert len(told) == 1
    assert gpu.counted()["launch"] == 0
    assert result.images


def test_what_the_profile_excludes_is_refused_before_any_work(open_pipeline, gpu):
    pipeline = open_pipeline()
    pipeline.warm_up()
    since = len(gpu.calls)
    with pytest.raises(SettingsError, match=r"compiled for steps 1:25:128, not for 200.* --steps 1:25:200"):
        pipeline(PROMPT, sampler="heun", steps=100)
    assert not gpu.counted(since)["launch"]
    told = r"compiled for height 16, not for 24; .*dnp build \S+ --backend tensorrt-rtx .*--sm 89 .*--height 64:64:96"
    with pytest.raises(SettingsError, match=told):
        pipeline(PROMPT, negative="n*", height=96)
    assert not gpu.counted(since)["launch"]


def test_more_images_than_the_plan_takes_are_sampled_in_turns(open_pipeline, gpu):
    pipeline = open_pipeline(largest=2)
    result = pipeline(PROMPT, images=3, **QUICK)
    assert len(result.images) == 3
    # What runs, and no more: captions of 1 and 2 images, texts and pictures one by one, steps of 2 and 4 rows, which
    # draw no noise.
    assert gpu.counted()["begin_capture"] == 2 * 2 + 2 + 2
    with pytest.raises(SettingsError, match="beams must be a whole number from 1 to 8, not 9"):
        pipeline(PROMPT, beams=9)
    assert len(pipeline(PROMPT, images=2, beams=8, **QUICK).negatives) == 2


def test_a_memory_limit_says_what_was_asked_for_and_what_would_fit(open_pipeline):
    pipeline = open_pipeline(memory_limit=1_000_000)
    with pytest.raises(
        BackendError, match=r"no memory on cuda:0 for 'noise' .*MB of the memory limit is left.*dnp build"
    ):
        pipeline.warm_up()


def test_a_memory_limit_counts_weights(open_pipeline, gpu):
    pipeline = open_pipeline(memory_limit=1999)  # the fake's plans have 2000 bytes of them
    told = r"no memory on cuda:0 for the weights of 'encode_text': .* MB are wanted, .* MB of the memory limit is left"
    with pytest.raises(BackendError, match=told + ".*--weight-streaming$"):
        pipeline.graphs.open("encode_text")
    assert pipeline.graphs.backend.gpu.allocated == 0


def test_onnxruntime_keeps_to_the_memory_limit_too(open_pipeline, gpu, default_bundle):
    weights = sum(graph.nbytes for graph in default_bundle.graphs.values())
    pipeline = open_pipeline("cuda", memory_limit=1 << 30)
    pipeline(PROMPT, **QUICK)
    limits = [int(settings["gpu_mem_limit"]) for settings in gpu.ort.settings]
    assert limits[0] == 1 << 30
    assert limits == sorted(limits, reverse=True)
    assert pipeline.graphs.backend.gpu.allocated == weights + sum(block.nbytes for block in gpu.device.values())
    pipeline.close()
    told = r"no memory on cuda:0 for .* MB of the memory limit is left; (raise --memory-limit|ask for fewer images)"
    for limit in (1_000_000, weights + 10_000):
        with pytest.raises(BackendError, match=told):
            open_pipeline("cuda", memory_limit=limit)(PROMPT, **QUICK)


def streaming_pipeline(open_pipeline, default_bundle, folder, **options):
    settings = BuildSettings(weight_streaming=True)
    build_plans(default_bundle, ranges={"batch": Range(1, 1, 1)}, settings=settings, folder=folder)
    return open_pipeline(plans=folder, **options)


def test_weights_that_may_be_streamed_share_what_the_limit_leaves(open_pipeline, gpu, default_bundle, tmp_path):
    settings = {"seed": 4, **QUICK}
    whole = streaming_pipeline(open_pipeline, default_bundle, tmp_path)
    expected = whole(PROMPT, **settings)
    assert [engine.budget for engine in gpu.trt.engines] == [2000] * 5  # there is room for all of them
    needed = whole.graphs.backend.gpu.allocated
    gpu.trt.engines.clear()
    half = streaming_pipeline(open_pipeline, default_bundle, tmp_path, memory_limit=needed - 5000)
    assert np.array_equal(half(PROMPT, **settings).arrays, expected.arrays)
    assert [engine.budget for engine in gpu.trt.engines] == [1000] * 5
    assert half.graphs.backend.gpu.left == 0
    half.close()
    gpu.trt.engines.clear()
    none = streaming_pipeline(open_pipeline, default_bundle, tmp_path, memory_limit=needed - 10_000)
    none(PROMPT, **settings)
    assert [engine.budget for engine in gpu.trt.engines] == [0] * 5


def test_a_full_device_says_so(open_pipeline, gpu):
    gpu.memory = 1_000_000
    with pytest.raises(BackendError, match=r"no memory on cuda:0 .* MB is free on FAKE"):
        open_pipeline().warm_up()


ERRORS = {
    "deserialize": r"cannot load the plan on FAKE, no GPU: no plan; build it again: dnp build .* --batch .* --force",
    "context": "made no execution context",
    "execute": r"graph 'encode_image' failed on tensorrt-rtx .*: the fake was told to fail",
    "shape": "takes no 'image' of",
    "parse": "cannot read it: no reason given",
    "build": r"cannot compile 'encode_text' for sm89: the fake was told to fail$",
}


@pytest.mark.parametrize("call", ERRORS)
def test_calls_that_fail_without_an_exception_are_noticed(open_pipeline, gpu, call):
    gpu.trt.fail.add(call)
    with pytest.raises(DnpError, match=ERRORS[call]):
        open_pipeline()(PROMPT, **QUICK)
    gpu.trt.fail.clear()


@pytest.mark.parametrize("call", ["launch", "synchronize", "to_host", "to_device", "on_device"])
def test_a_cuda_call_that_fails_is_an_error_and_the_pipeline_lives_on(open_pipeline, gpu, call):
    pipeline = open_pipeline()
    first = pipeline(PROMPT, **QUICK)
    gpu.fail[call] = fake_gpu.broken(f"cuda call {call} failed: unspecified launch failure")
    with pytest.raises(BackendError, match=f"{call} failed"):
        pipeline(PROMPT, **QUICK)
    gpu.fail.clear()
    gpu.pending.clear()
    assert np.array_equal(pipeline(PROMPT, **QUICK).arrays, first.arrays)


def test_plans_are_found_again(open_pipeline, gpu, product, tmp_path):
    open_pipeline(product).warm_up()
    assert gpu.trt.built == 5
    open_pipeline(product).warm_up()
    assert gpu.trt.built == 5
    assert len(list((tmp_path / "plans").glob("*.plan"))) == 5


@pytest.mark.parametrize(
    ("there", "sm", "chosen"),
    [
        (["tensorrt", "tensorrt-rtx-cu13"], 89, "tensorrt"),
        (["tensorrt-rtx-cu13"], 89, "tensorrt-rtx"),
        (["tensorrt-rtx-cu13"], 90, "cpu"),  # no architecture of TensorRT for RTX
        ([], 89, "cpu"),
    ],
)
def test_plans_are_compiled_for_what_is_here(gpu, monkeypatch, there, sm, chosen):
    gpu.sm = sm
    monkeypatch.setattr(registry, "installed", lambda package: package if package in there else "")
    assert registry.compiles_here() == chosen


TOO_OLD = r"FAKE, no GPU \(SM 61\) is too old: .* need SM 75 or newer; use the backend 'cpu' or 'openvino'$"


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_gpu_that_is_too_old_is_refused(open_pipeline, gpu, backend, monkeypatch):
    gpu.sm = 61
    monkeypatch.setattr(registry, "installed", lambda package: f"{package} FAKE")
    with pytest.raises(BackendError, match=TOO_OLD):
        open_pipeline(backend)
    if backend in PRODUCTS:
        with pytest.raises(BackendError, match=TOO_OLD):
            target_for(PRODUCTS[backend])
    (report,) = (report for report in registry.doctor() if report.name == backend)
    assert re.search(TOO_OLD, report.why_not)
    assert report.hardware.startswith("FAKE, no GPU, SM 61")


def test_a_gpu_that_tensorrt_for_rtx_has_no_code_for_is_sent_to_tensorrt(open_pipeline, gpu):
    gpu.sm = 90
    with pytest.raises(BackendError, match=r"\(SM 90\) is none of those .* it knows 75, 80.*'cuda' or 'tensorrt'"):
        open_pipeline("tensorrt-rtx").warm_up()


def test_the_wrong_card_is_told_before_anything_is_loaded(gpu, monkeypatch):
    gpu.sm = 100
    monkeypatch.setattr(Product, "load", lambda self: pytest.fail("TensorRT was loaded"))
    with pytest.raises(BackendError, match=r"\(SM 100\) is none of those .*use the backend 'cuda' or 'tensorrt'"):
        TensorRtRtxBackend()
    assert not gpu.streams


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("ending", ["close", "forget", "error", "interrupt"])
def test_no_session_of_onnxruntime_ends_with_anything_left_to_do(gpu, default_bundle, ending, eager, monkeypatch):
    """Buffers that its runs took would be given back by a callback, where CUDA forbids it and the process ends."""
    opened = ort_cuda.CudaBackend(BackendOptions(eager=eager))
    session = opened.session(default_bundle.graphs["encode_text"], default_bundle)
    session.reshape(batch=1, tokens=default_bundle.text.length)
    session.inputs["ids"].write(np.zeros(session.inputs["ids"].shape, np.int64))
    session.run()
    assert gpu.pending
    if ending == "error":
        monkeypatch.setitem(gpu.fail, "free", fake_gpu.broken())
    if ending == "interrupt":
        synchronize = gpu.synchronize
        gpu.synchronize = lambda stream: (signal.raise_signal(signal.SIGINT), synchronize(stream))
        with pytest.raises(KeyboardInterrupt):
            session.close()
        del gpu.synchronize
    elif ending != "forget":
        session.close()
    del session
    gc.collect()
    assert not gpu.ort.aborts
    assert not gpu.pending
    gpu.fail.clear()
    opened.close()


def test_onnxruntime_waits_for_no_run_that_is_captured(gpu, default_bundle):
    opened = ort_cuda.CudaBackend()
    session = opened.session(default_bundle.graphs["encode_text"], default_bundle)
    session.capture(batch=1, tokens=default_bundle.text.length)
    asked = []
    run = session._file.session.run_with_iobinding
    session._file.session.run_with_iobinding = lambda binding, how: (asked.append(dict(how)), run(binding, how))
    session.run()
    assert [how["disable_synchronize_execution_providers"] for how in asked] == ["1"]
    session.close()
    opened.close()


def test_a_precision_is_the_graph_s(gpu, product):
    with pytest.raises(BackendError, match=r"not in 'bf16'.*dnp export --precision fp16"):
        BACKENDS[product](BackendOptions(precision="bf16"))


def test_latents_that_are_no_numbers_and_flat_images_are_errors(open_pipeline, monkeypatch):
    pipeline = open_pipeline()
    with pytest.raises(DnpError, match="no longer finite numbers"):
        pipeline(PROMPT, negative="n*", guidance=1e38, steps=2)
    buffer = pipeline.graphs.decode.outputs["image"]
    monkeypatch.setattr(type(buffer), "read", lambda self: np.zeros(self.shape, self.dtype))
    with pytest.raises(DnpError, match=r"one flat colour.*--check-ranges"):
        pipeline(PROMPT, negative="n*", **QUICK)


def test_a_buffer_written_twice_keeps_both_contents_in_order(open_pipeline):
    pipeline = open_pipeline()
    pipeline.warm_up(captioner=False)
    session = pipeline.sessions["encode_text"]
    session.reshape(batch=1, tokens=pipeline.bundle.text.length)
    ids, context = session.inputs["ids"], session.outputs["embeddings"]
    results = []
    for text in ("a red circle", "a blue square"):
        array = pipeline.tokenizer.encode([text])
        ids.write(array)
        array[:] = 0  # the caller's own again
        session.run()
        results.append(context.read())
    assert not np.array_equal(*results)


def test_the_runtime_cache_lies_beside_the_plan(open_pipeline, tmp_path, product):
    open_pipeline(product).warm_up()
    pipeline = open_pipeline(product)
    pipeline.warm_up()
    pipeline.close()
    caches = [path.name for path in (tmp_path / "plans").glob("*.cache") if not path.name.startswith(".")]
    timings = list((tmp_path / "plans").glob(".timing-*.cache"))
    assert len(caches) == (5 if product == "tensorrt-rtx" else 0)
    assert len(timings) == (0 if product == "tensorrt-rtx" else 1)


def test_sidecars_say_what_the_plan_is(open_pipeline, tmp_path, default_bundle):
    open_pipeline().warm_up(captioner=False)
    plan, *_ = PlanStore(tmp_path / "plans").plans()
    sidecar = json.loads(plan.path.with_suffix(".json").read_text())
    assert set(sidecar) == {"spec", "statistics", "size", "sha256"}
    assert sidecar["spec"]["precision"] == default_bundle.precision
    spec = PlanSpec(**sidecar["spec"])
    assert spec == plan.spec
    assert spec.key in plan.path.name
    for change in ({"version": "1"}, {"graph_sha256": "0"}, {"profile": {}}, {"flags": {}}, {"architecture": "sm86"}):
        assert replace(spec, **change).key != spec.key
        assert next(iter(change)) in spec.difference(replace(spec, **change))


def test_onnxruntime_replays_what_it_captured_and_nothing_moves(open_pipeline, gpu, on_cpu):
    pipeline = open_pipeline("cuda")
    pipeline.warm_up()
    numbers, before = set(gpu.ort.captured), gpu.counted()
    assert len(numbers) == 2 + 2 * 2 + 2 * 3  # two sessions at one image, two at two; denoise at 1, 2 and 4 rows, twice
    settings = {"negative": "n*", "sampler": "euler_a", "steps": 6}
    result = pipeline(PROMPT, **settings)
    assert set(gpu.ort.captured) == numbers
    assert gpu.counted()["malloc"] == before["malloc"]
    assert abs(result.arrays.astype(int) - on_cpu(PROMPT, **settings).arrays).max() <= 1
    # a size that was not captured moves the buffers: what was captured for them is never replayed again
    since = len(gpu.ort.captured)
    larger = pipeline(PROMPT, negative="n*", height=192, steps=2)
    again = pipeline(PROMPT, **settings)
    assert larger.arrays.shape[1] == 192
    assert np.array_equal(again.arrays, result.arrays)
    assert len(gpu.ort.captured[since:]) == 4  # two requests, two texts each: those buffers have not moved


def test_onnxruntime_between_steps_waits_for_nothing(open_pipeline, gpu):
    pipeline = open_pipeline("cuda")
    pipeline.warm_up()
    request = pipeline.resolve(dnp.Request(prompt=PROMPT, negative="n*", steps=8))
    marks = [len(gpu.calls) for _ in pipeline.steps(request)]
    between = [gpu.calls[start:end] for start, end in itertools.pairwise(marks)]
    assert between == [["on_device", "on_device"]] * 7  # the state and the row index


def test_onnxruntime_that_cannot_capture_runs_eagerly_and_says_so_once(open_pipeline, gpu, caplog):
    gpu.ort.refuse_capture = True
    with caplog.at_level(logging.WARNING, "dnp.engine"):
        assert open_pipeline("cuda")(PROMPT, **QUICK).images
    assert len([r for r in caplog.records if "without CUDA graphs" in r.getMessage()]) == 1
    assert not gpu.ort.captured


def test_onnxruntime_without_its_cuda_provider_is_refused(open_pipeline, gpu):
    gpu.ort.providers = []
    with pytest.raises(BackendError, match=r"pip install 'dnp-engine\[gpu\]'"):
        open_pipeline("cuda")


@pytest.mark.slow
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_gpu_check_runs_to_its_end_and_names_the_fake(gpu, monkeypatch, tmp_path, capsys, backend):
    """Every line of the program that is for those who have a GPU; its figures mean nothing here."""
    spec = importlib.util.spec_from_file_location(
        "gpu_check", Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"
    )
    gpu_check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_check)
    monkeypatch.setattr(device, "BATCH", 1)
    monkeypatch.setattr(gpu_check, "REPEATS", 2)
    gpu.elapsed = lambda start, end: 1.0
    out = tmp_path / "check.json"
    code = gpu_check.main(["--backend", backend, "--batches", "1", "--out", str(out)])
    told, report = capsys.readouterr(), json.loads(out.read_text())
    failed = {name for name, entry in report["checks"].items() if not entry["passed"]}
    assert failed == set(), told.out
    assert code == 0
    assert "FAKE" in report["gpu"]["name"]
    assert "FAKE" in told.out
    assert report["checks"]["capture"]["passed"]
    assert report["steps"][0]["batch"] == 1


def test_gpu_check_without_a_gpu_is_a_sentence(tmp_path):
    program = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"
    done = subprocess.run(
        [sys.executable, program, "--backend", "tensorrt-rtx", "--out", tmp_path / "out.json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:  # where there is a GPU, it runs
        assert done.returncode == 4, done.stderr
        assert done.stderr.startswith("gpu-check: there is no NVIDIA driver here")
        assert not list(tmp_path.iterdir())


def test_the_dns_image_is_captioned_where_it_lies(open_pipeline, gpu):
    pipeline = open_pipeline()
    pipeline.warm_up()
    since = len(gpu.calls)
    for step in pipeline.steps(pipeline.resolve(dnp.Request(prompt=PROMPT, **QUICK))):
        if step.phase == "caption":
            break
    calls = gpu.counted(since)
    # as above; two resize matrices; tokens, position, both lengths and parent; no image
    assert calls["to_device"] == 14 + 2 + 5
    assert calls["on_device"] == 2 + 1 + 1  # the embeddings, the latents, the image


def test_another_thread_than_the_one_that_opened_it_may_run_it(open_pipeline, on_cpu):
    pipeline = open_pipeline()
    pipeline.warm_up()
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(pipeline, PROMPT, seed=2, **QUICK).result()
    assert result.negatives == on_cpu(PROMPT, seed=2, **QUICK).negatives


@pytest.fixture(scope="module")
def fine_tune(default_bundle, tmp_path_factory):
    """The default bundle with other weights in all graphs."""
    folder = tmp_path_factory.mktemp("fine-tune") / "bundle"
    shutil.copytree(default_bundle.path, folder, ignore=shutil.ignore_patterns("plans"))
    for path in (folder / "graphs").glob("*.onnx"):
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor)
            if array.dtype.kind == "f" and array.ndim > 1:
                changed = (array * 1.0625).astype(array.dtype)
                tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
        onnx.save(model, path)
    manifest = json.loads((folder / "bundle.json").read_text())
    seal(folder, {key: value for key, value in manifest.items() if key not in ("files", "sha256")})
    return Bundle.open(folder)


def refittable(open_pipeline, default_bundle, folder, product="tensorrt-rtx"):
    ranges, settings = {"batch": Range(1, 1, 1)}, BuildSettings(refit=True)
    build_plans(default_bundle, product, ranges=ranges, settings=settings, folder=folder)
    return open_pipeline(product, plans=folder)


def test_weights_are_exchanged_and_come_back(open_pipeline, gpu, default_bundle, fine_tune, tmp_path, product):
    pipeline = refittable(open_pipeline, default_bundle, tmp_path, product)
    plain, whole = {"negative": "n*", "seed": 6, **QUICK}, {"seed": 6, **QUICK}
    first = pipeline(PROMPT, **plain)  # the captioner is not open yet
    built = gpu.trt.built
    pipeline.refit(fine_tune.path)
    with dnp.Pipeline(fine_tune) as expected:
        for settings in (plain, whole):
            found, wanted = pipeline(PROMPT, **settings), expected(PROMPT, **settings)
            assert abs(found.arrays.astype(int) - wanted.arrays).max() <= 1
            assert found.negatives == wanted.negatives
            assert found.bundle == fine_tune.fingerprint
    assert not np.array_equal(pipeline(PROMPT, **plain).arrays, first.arrays)
    pipeline.refit(default_bundle)
    since = len(gpu.calls)
    again = pipeline(PROMPT, **plain)
    assert np.array_equal(again.arrays, first.arrays)
    assert again.bundle == default_bundle.fingerprint
    calls = gpu.counted(since)
    assert calls["launch"] == QUICK["steps"] + 2 + 1  # captured anew by refit itself
    assert not calls["begin_capture"]
    assert gpu.trt.built == built


def test_what_cannot_be_refitted_says_so_and_changes_nothing(open_pipeline, gpu, default_bundle, fine_tune, tmp_path):
    with dnp.Pipeline.open() as on_cpu:
        on_cpu(PROMPT, negative="n*", steps=1)
        with pytest.raises(BackendError, match=r"cpu .* cannot exchange weights; open a pipeline on the bundle"):
            on_cpu.refit(fine_tune)
    pipeline = open_pipeline()
    first = pipeline(PROMPT, negative="n*", **QUICK)
    with pytest.raises(BackendError, match=r"this plan keeps its weights; .* dnp build .*tensorrt-rtx .*--refit$"):
        pipeline.refit(fine_tune)
    for change in ({"precision": "fp16"}, {"latents": replace(fine_tune.latents, max_width=128)}):
        with pytest.raises(SettingsError, match=f"of another model .*: '{next(iter(change))}' differs"):
            pipeline.refit(replace(fine_tune, **change))
    other_words = {**fine_tune.files, fine_tune.text.tokenizers[0].file: fine_tune.files[fine_tune.caption.tokenizer]}
    with pytest.raises(SettingsError, match=r"'tokenizers/.*' differs"):
        pipeline.refit(replace(fine_tune, files=other_words))
    assert np.array_equal(pipeline(PROMPT, negative="n*", **QUICK).arrays, first.arrays)
    pipeline = refittable(open_pipeline, default_bundle, tmp_path / "refit")
    pipeline(PROMPT, negative="n*", **QUICK)
    gpu.trt.fail.add("refit")
    with pytest.raises(BackendError, match=r"weights of .* do not fit this plan"):
        pipeline.refit(fine_tune)
    with pytest.raises(DnpError, match="closed"):
        pipeline(PROMPT, negative="n*", **QUICK)


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "cuda"])
def test_more_sizes_can_be_captured_at_warm_up(open_pipeline, gpu, default_bundle, tmp_path, backend):
    if backend != "cuda":
        sides = dict.fromkeys(("height", "width"), Range(64, 64, 96))
        build_plans(default_bundle, backend, ranges={"batch": Range(1, 1, 1), **sides}, folder=tmp_path / "plans")
    pipeline = open_pipeline(backend, largest=1)
    pipeline.warm_up()
    pipeline.warm_up(captioner=False, sizes=[(64, 96), (96, 64)])
    numbers, before = set(gpu.ort.captured), gpu.counted()
    for height, width in ((64, 64), (64, 96), (96, 64), (64, 64)):
        since, runs = len(gpu.calls), len(gpu.ort.captured)
        request = pipeline.resolve(dnp.Request(prompt=PROMPT, height=height, width=width, **QUICK))
        phases = [step.phase for step in pipeline.steps(request)]
        replayed = gpu.counted(since)["launch"] if backend != "cuda" else len(gpu.ort.captured) - runs
        runs = len(phases) + 3 + 2 + 1  # the texts, the decoder twice, the image encoder
        assert replayed == runs, (height, width)
    assert set(gpu.ort.captured) == numbers
    for call in ("begin_capture", "malloc"):
        assert gpu.counted()[call] == before[call], call
    with pytest.raises(SettingsError, match="height 65 does not fit the latents"):
        pipeline.warm_up(sizes=[(65, 64)])
    if backend != "cuda":
        with pytest.raises(SettingsError, match=r"compiled for width 16:16:24, not for 32"):
            pipeline.warm_up(sizes=[(64, 128)])


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "cuda"])
def test_an_engine_captures_in_the_thread_that_serves_and_allocates_nothing_later(open_pipeline, gpu, backend):
    """ONNX Runtime keeps a captured run for the thread that made it."""
    pipeline = open_pipeline(backend)
    pipeline.warm_up()
    with Batcher(pipeline, BatchOptions(samples=2)) as batcher:
        numbers, before = set(gpu.ort.captured), gpu.counted()
        beams = pipeline.graphs.captioner.widest
        for more in ({}, {"images": 3}, {"beams": beams, "images": 2}, {"beams": 2, "images": 3}, {}):
            since, runs = len(gpu.calls), len(gpu.ort.captured)
            request = dnp.Request(prompt=PROMPT, **{**QUICK, **more})
            assert len(batcher.submit(request).result(60).images) == more.get("images", 1)
            replayed = gpu.counted(since)["launch"] if backend != "cuda" else len(gpu.ort.captured) - runs
            assert replayed >= QUICK["steps"] + QUICK["dns_steps"], more
        assert set(gpu.ort.captured) == numbers
        for call in ("begin_capture", "malloc"):
            assert gpu.counted()[call] == before[call], call
    runs = len(gpu.ort.captured)
    assert pipeline(PROMPT, **QUICK).images  # its owner's again, in the owner's thread
    assert backend != "cuda" or len(gpu.ort.captured) > runs


@pytest.mark.parametrize("ranges", [{"batch": Range(2, 2, 2)}, {"height": Range(96, 96, 128)}])
def test_plans_that_exclude_the_default_sizes_are_warmed_up_at_theirs(open_pipeline, default_bundle, tmp_path, ranges):
    build_plans(default_bundle, ranges={"batch": Range(1, 1, 1), **ranges}, folder=tmp_path / "plans")
    pipeline = open_pipeline()
    images = ranges["batch"].low if "batch" in ranges else 1
    height = ranges["height"].low if "height" in ranges else 64
    assert len(pipeline(PROMPT, images=images, height=height, **QUICK).images) == images
    with pytest.raises(SettingsError, match="the plan was compiled for"):
        pipeline(PROMPT, **QUICK)


def test_a_timing_cache_that_is_damaged_is_begun_anew(open_pipeline, gpu, tmp_path):
    open_pipeline("tensorrt").warm_up(captioner=False)
    (timings,) = (tmp_path / "plans").glob(".timing-*.cache")
    timings.write_bytes(b"nonsense")
    gpu.trt.__version__ = "0.0.0.fake"
    for plan in (tmp_path / "plans").glob("*.plan"):
        plan.unlink()
    open_pipeline("tensorrt").warm_up(captioner=False)
    assert timings.read_bytes() == b"timings"


def test_a_failed_open_gives_back_what_it_took(open_pipeline, gpu):
    pipeline = open_pipeline(memory_limit=1_000_000)
    for _ in range(2):
        before = pipeline.graphs.backend.gpu.allocated
        with pytest.raises(BackendError, match="no memory on"):
            pipeline.graphs.open("denoise")
        assert pipeline.graphs.backend.gpu.allocated == before


def test_after_an_error_that_lasts_closing_still_frees(open_pipeline, gpu):
    pipeline = open_pipeline()
    pipeline(PROMPT, **QUICK)
    gpu.fail["synchronize"] = fake_gpu.broken("cudaStreamSynchronize failed: an illegal memory access")
    with pytest.raises(BackendError, match="illegal memory access"):
        pipeline(PROMPT, **QUICK)
    gpu.pending.clear()
    pipeline.close()
    assert not gpu.device
