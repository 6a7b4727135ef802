"""What goes wrong on a GPU, on the stand-in for one: no figure or result here is a GPU's."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import fake_gpu
import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from cuda.bindings import runtime as cuda_runtime

import dnp
from dnp.cli import run
from dnp.engine import Bundle, open_session, seal
from dnp.engine.backends.session import BackendOptions
from dnp.engine.backends.tensorrt import TrtSession
from dnp.engine.errors import BackendError, DnpError, SettingsError
from dnp.engine.plans.build import build_plans
from dnp.engine.plans.profile import Range
from dnp.engine.plans.settings import BuildSettings
from dnp.engine.plans.store import PlanStore
from dnp.engine.system import cuda

PROMPT = "a large red circle left of a small blue square on a plain yellow background"
QUICK = {"steps": 2, "dns_steps": 2}


def asked(default_bundle, folder, largest=2, **settings):
    """Plans of all graphs for so many images."""
    ranges = {"batch": Range(1, 1, largest)}
    build_plans(default_bundle, ranges=ranges, settings=BuildSettings(**settings), folder=folder)


def sessions_of(pipeline):
    return pipeline.sessions


def failing(message):
    """A call that fails."""

    def fail(*_, **__):
        raise BackendError(message)

    return fail


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory, default_bundle):
    """The default bundle with another first bias in the denoiser."""
    folder = tmp_path_factory.mktemp("other") / "bundle"
    shutil.copytree(default_bundle.path, folder, ignore=shutil.ignore_patterns("plans"))
    path = folder / "graphs/denoise.onnx"
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 1)
    array = onnx.numpy_helper.to_array(tensor) + np.float32(0.5)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)
    manifest = json.loads((folder / "bundle.json").read_text())
    seal(folder, {key: value for key, value in manifest.items() if key not in ("files", "sha256")})
    return Bundle.open(folder)


class TestBatches:
    def test_a_plan_for_fewer_images_than_the_others_limits_the_pipeline(self, open_pipeline, default_bundle, tmp_path):
        folder = tmp_path / "plans"
        asked(default_bundle, folder, 2)
        build_plans(default_bundle, graphs=["decode_latents"], ranges={"batch": Range(1, 1, 1)}, folder=folder)
        result = open_pipeline()(PROMPT, images=2, **QUICK)
        assert len(result.images) == 2

    def test_captions_are_found_in_parts_where_the_image_encoder_takes_fewer(
        self, open_pipeline, default_bundle, tmp_path
    ):
        folder = tmp_path / "plans"
        asked(default_bundle, folder, 2)
        build_plans(default_bundle, graphs=["encode_image"], ranges={"batch": Range(1, 1, 1)}, folder=folder)
        assert len(open_pipeline()(PROMPT, images=2, **QUICK).negatives) == 2

    def test_texts_are_filled_up_to_what_the_text_encoder_takes(self, open_pipeline, gpu, default_bundle, tmp_path):
        folder = tmp_path / "plans"
        asked(default_bundle, folder, 2)
        build_plans(default_bundle, graphs=["encode_text"], ranges={"batch": Range(4, 4, 4)}, folder=folder)
        pipeline = open_pipeline()
        pipeline.warm_up()
        assert sessions_of(pipeline)["encode_text"].limits.nearest("batch", 1) > 2  # texts: ∅ and the prompt
        assert len(pipeline(PROMPT, images=1, **QUICK).images) == 1

    @pytest.mark.parametrize("graph", ["encode_image", "caption_step"])
    def test_what_cannot_be_had_is_refused_before_any_work(self, open_pipeline, gpu, default_bundle, tmp_path, graph):
        folder = tmp_path / "plans"
        asked(default_bundle, folder, 2)
        build_plans(default_bundle, graphs=[graph], ranges={"batch": Range(2, 2, 2)}, folder=folder)
        pipeline = open_pipeline()
        pipeline.warm_up()
        since = len(gpu.calls)
        with pytest.raises(SettingsError, match=rf"graph '{graph}': the plan was compiled for .*--batch 1:"):
            pipeline(PROMPT, images=1, **QUICK)
        assert not gpu.counted(since)["launch"]

    @pytest.mark.parametrize(("images", "beams", "fits"), [(15, 5, True), (13, 5, False), (15, 1, True)])
    def test_captions_are_found_in_the_parts_that_were_admitted(
        self, open_pipeline, default_bundle, gpu, tmp_path, images, beams, fits
    ):
        """15 images by 5 beams are captioned 6, 6 and 3 at a time, 13 of them 6, 6 and 1."""
        for graphs, sizes in (
            (("encode_image", "caption_step"), Range(3, 4, 8)),
            (("encode_text", "denoise", "decode_latents"), Range(1, 1, 8)),
        ):
            build_plans(default_bundle, graphs=graphs, ranges={"batch": sizes}, folder=tmp_path / "plans")
        pipeline = open_pipeline(eager=True)
        request = pipeline.resolve(dnp.Request(PROMPT, images=images, beams=beams, **QUICK))
        if fits:
            assert next(pipeline.steps(request)).phase == "dns"
        else:
            with pytest.raises(SettingsError, match="compiled for batch 3:4:8, not for 1"):
                next(pipeline.steps(request))


class TestRefit:
    def test_what_is_not_open_yet_is_checked_too(self, default_bundle, other_weights):
        with dnp.Pipeline(default_bundle) as pipeline:
            before = pipeline(PROMPT, **QUICK)
        with dnp.Pipeline(default_bundle) as pipeline:
            with pytest.raises(BackendError, match="cannot exchange weights"):
                pipeline.refit(other_weights)
            assert pipeline.bundle is default_bundle
            assert np.array_equal(pipeline(PROMPT, **QUICK).arrays, before.arrays)

    def test_a_session_that_cannot_take_the_weights_is_not_left_behind(
        self, open_pipeline, gpu, default_bundle, other_weights, tmp_path
    ):
        asked(default_bundle, tmp_path / "plans", 1, refit=True)
        pipeline = open_pipeline()
        gpu.trt.fail.add("refit")
        with pytest.raises(BackendError):
            pipeline.refit(other_weights)
        assert not gpu.device


class TestInterruptions:
    def test_a_ctrl_c_while_a_run_is_captured_ends_the_capture(self, open_pipeline, gpu, monkeypatch):
        pipeline = open_pipeline()
        execute, interrupted = fake_gpu.FakeContext.execute_async_v3, []

        def interrupt(self, stream):
            if gpu.capturing is not None and not interrupted:
                interrupted.append(True)
                raise KeyboardInterrupt
            return execute(self, stream)

        monkeypatch.setattr(fake_gpu.FakeContext, "execute_async_v3", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pipeline.warm_up()
        assert interrupted
        assert gpu.capturing is None
        assert len(pipeline(PROMPT, **QUICK).images) == 1
        pipeline.close()
        assert not gpu.device

    def test_a_failure_while_a_run_is_captured_leaves_the_session_without_captured_runs(
        self, open_pipeline, gpu, monkeypatch, caplog
    ):
        execute = fake_gpu.FakeContext.execute_async_v3
        monkeypatch.setattr(
            fake_gpu.FakeContext,
            "execute_async_v3",
            lambda self, stream: gpu.capturing is None and execute(self, stream),
        )
        result = open_pipeline()(PROMPT, **QUICK)
        assert len(result.images) == 1
        assert gpu.capturing is None
        (told,) = [record.message for record in caplog.records if "runs without CUDA graphs" in record.message]
        assert "failed" in told


class TestBuffers:
    def test_a_closed_session_s_buffers_take_nothing(self, gpu, default_bundle, tmp_path):
        build_plans(default_bundle, graphs=["decode_latents"], folder=tmp_path / "plans")
        session = open_session(
            default_bundle, "decode_latents", "tensorrt-rtx", BackendOptions(plans=tmp_path / "plans")
        )
        side = default_bundle.latents.height
        session.reshape(places=1, batch=1, height=side, width=side)
        buffer = session.inputs["latents"]
        session.close()
        with pytest.raises(SettingsError, match="'latents' holds float32"):
            buffer.write(np.zeros((1, 4, side, side), np.float32))
        assert buffer.read().size == 0

    def test_a_size_that_the_memory_does_not_hold_leaves_all_as_it_was(self, gpu, default_bundle):
        session = open_session(default_bundle, "encode_text", "cuda")
        with session:
            session.reshape(batch=1, tokens=32)
            session.inputs["ids"].write(np.full(session.inputs["ids"].shape, 1, np.int64))
            session.run()
            before = session.outputs["embeddings"].read()
            gpu.memory = sum(block.nbytes for block in gpu.device.values()) + 300_000  # one buffer, and no more
            with pytest.raises(BackendError, match="no memory on cuda:0"):
                session.reshape(batch=1000, tokens=32)
            assert session.inputs["ids"].shape == (1, 32)
            session.inputs["ids"].write(np.full(session.inputs["ids"].shape, 1, np.int64))
            session.run()
            np.testing.assert_array_equal(session.outputs["embeddings"].read(), before)

    def test_a_buffer_on_another_stream_is_out_of_reach(self, gpu, default_bundle, tmp_path):
        options = BackendOptions(plans=tmp_path / "plans")
        build_plans(default_bundle, graphs=["denoise", "decode_latents"], folder=tmp_path / "plans")
        with (
            open_session(default_bundle, "denoise", "tensorrt-rtx", options) as denoise,
            open_session(default_bundle, "decode_latents", "tensorrt-rtx", options) as decode,
            pytest.raises(BackendError, match="cannot be read in place here; copy it instead"),
        ):
            decode.alias("latents", denoise.outputs["latents"])

    def test_pinned_memory_that_is_not_there_says_so(self, open_pipeline, gpu):
        gpu.fail["malloc_host"] = cuda.OutOfMemoryError("cudaMallocHost found no memory")
        with pytest.raises(BackendError, match=r"no pinned memory on the host for '\w+' of '\w+': .* MB are wanted"):
            open_pipeline()(PROMPT, **QUICK)
        gpu.fail.clear()

    def test_a_size_to_warm_up_that_fails_is_not_tried_again(self, open_pipeline, gpu, default_bundle, tmp_path):
        sides = dict.fromkeys(("height", "width"), Range(64, 64, 96))
        build_plans(default_bundle, ranges={"batch": Range(1, 1, 1), **sides}, folder=tmp_path / "plans")
        pipeline = open_pipeline()
        expected = pipeline(PROMPT, **QUICK)
        gpu.fail["to_device"] = fake_gpu.broken("cuda call to_device failed")
        with pytest.raises(BackendError):
            pipeline.warm_up(sizes=[(96, 96)])
        gpu.fail.clear()
        gpu.pending.clear()
        since = len(gpu.calls)
        assert np.array_equal(pipeline(PROMPT, **QUICK).arrays, expected.arrays)
        assert not gpu.counted(since)["begin_capture"]

    def test_sessions_are_captured_from_any_thread(self, gpu, default_bundle, tmp_path):
        options = BackendOptions(plans=tmp_path / "plans")
        build_plans(default_bundle, graphs=["decode_latents"], folder=tmp_path / "plans")
        with open_session(default_bundle, "decode_latents", "tensorrt-rtx", options) as session:
            sides = {symbol: session.limits.nearest(symbol, 1) for symbol in ("height", "width")}
            with ThreadPoolExecutor(1) as pool:
                pool.submit(session.capture, places=1, batch=1, **sides).result()
            assert gpu.counted()["begin_capture"] == 1


class TestClosing:
    def test_whatever_fails_the_rest_is_closed(self, open_pipeline, gpu, monkeypatch):
        pipeline = open_pipeline()
        pipeline.warm_up()
        monkeypatch.setattr(fake_gpu.FakeCuda, "activate", failing("the driver is gone"))
        with suppress(BackendError):
            pipeline.close()
        assert pipeline.graphs.closed
        assert not gpu.device
        pipeline.close()

    def test_a_runtime_cache_that_tensorrt_does_not_give_is_none(self, open_pipeline, gpu, monkeypatch, tmp_path):
        config = fake_gpu.FakeEngine.create_runtime_config

        def without(self):
            made = config(self)
            cache = made.create_runtime_cache()
            cache.serialize = lambda: None
            return made

        monkeypatch.setattr(fake_gpu.FakeEngine, "create_runtime_config", without)
        pipeline = open_pipeline()
        pipeline.warm_up()
        pipeline.close()
        assert not gpu.device
        assert not list((tmp_path / "plans").glob("*.sm*.cache"))


class TestPlans:
    def test_a_session_s_files_are_no_leftovers(self, gpu, default_bundle, tmp_path):
        writing = tmp_path / ".dnp.encode_text-0123456789abcdef.sm89.cache.x"
        writing.write_bytes(b"half")
        build_plans(default_bundle, graphs=["encode_text"], folder=tmp_path)
        assert writing.exists()

    def test_a_plan_that_is_there_needs_no_folder_that_can_be_written(self, gpu, default_bundle, tmp_path, monkeypatch):
        build_plans(default_bundle, graphs=["encode_text"], folder=tmp_path)
        monkeypatch.setattr("dnp.engine.plans.store.write_together", failing("read-only"))
        monkeypatch.setattr(PlanStore, "_locked", failing("read-only"))
        build_plans(default_bundle, graphs=["encode_text"], folder=tmp_path)

    def test_other_plans_are_removed_when_asked(self, gpu, default_bundle, tmp_path):
        plans = [
            build_plans(default_bundle, graphs=["encode_text"], ranges={"batch": Range(1, 1, n)}, folder=tmp_path)
            for n in (1, 2)
        ]
        (others,) = build_plans(default_bundle, graphs=["decode_latents"], folder=tmp_path)
        (tmp_path / f"{plans[0][0].path.stem}.sm89.cache").write_bytes(b"kernels")
        assert PlanStore(tmp_path).prune(plans[1]) == [plans[0][0].path]
        assert sorted(path.name for path in tmp_path.glob("*.plan")) == sorted(
            plan.path.name for plan in (others, *plans[1])
        )
        assert not list(tmp_path.glob(f"{plans[0][0].path.stem}*"))

    def test_the_runtime_cache_is_kept_at_warm_up_and_read_at_the_next_start(
        self, open_pipeline, gpu, tmp_path, monkeypatch
    ):
        read = []
        config = fake_gpu.FakeEngine.create_runtime_config

        def noted(self):
            made = config(self)
            made.create_runtime_cache().deserialize = lambda blob: read.append(blob) or True
            return made

        monkeypatch.setattr(fake_gpu.FakeEngine, "create_runtime_config", noted)
        pipeline = open_pipeline()
        pipeline.warm_up()
        assert read == []
        assert len(list((tmp_path / "plans").glob("*.sm89.cache"))) == 5  # although nothing was closed
        with monkeypatch.context() as later:
            later.setattr(TrtSession, "_save_cache", failing("a request that captures nothing has nothing to keep"))
            pipeline(PROMPT, **QUICK)
        open_pipeline().warm_up()
        assert read == [b"kernels"] * 5

    def test_a_runtime_cache_that_cannot_be_read_is_none(self, open_pipeline, tmp_path, caplog):
        pipeline = open_pipeline()
        pipeline.warm_up()
        pipeline.close()
        for path in (tmp_path / "plans").glob("*.sm89.cache"):
            path.unlink()
            path.mkdir()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            open_pipeline().warm_up()
        assert len([record for record in caplog.records if "runtime cache is not kept" in record.message]) == 1

    def test_a_plan_that_is_gone_when_it_is_opened(self, open_pipeline, monkeypatch):
        open_pipeline().warm_up()
        find = PlanStore.find

        def gone(self, spec):
            plan, reason = find(self, spec)
            return plan and replace(plan, path=plan.path.with_name("gone.plan")), reason

        monkeypatch.setattr(PlanStore, "find", gone)
        with pytest.raises(BackendError, match=r"gone\.plan cannot be read any more"):
            open_pipeline().warm_up()

    @pytest.mark.parametrize(
        "changes", [{"sm": 89}, {"sm": ("89",)}, {"weight_streaming": "no"}, {"workspace": 10**13}]
    )
    def test_settings_of_wrong_kinds(self, changes):
        with pytest.raises(SettingsError):
            BuildSettings(**changes)

    def test_one_graph_may_be_named_without_a_list(self, gpu, default_bundle, tmp_path):
        assert [plan.spec.graph for plan in build_plans(default_bundle, graphs="denoise", folder=tmp_path)] == [
            "denoise"
        ]


class TestTensorRt:
    def test_an_address_that_it_does_not_take(self, open_pipeline, monkeypatch):
        monkeypatch.setattr(fake_gpu.FakeContext, "set_tensor_address", lambda *_: False)
        with pytest.raises(BackendError, match="TensorRT takes no address for 'ids'"):
            open_pipeline(eager=True)(PROMPT, **QUICK)

    def test_too_little_memory_for_its_weights(self, open_pipeline, gpu, monkeypatch):
        def full(self, config):
            self.module.say(
                "[defaultAllocator.cpp] Requested amount of GPU memory could not be allocated: out of memory"
            )

        monkeypatch.setattr(fake_gpu.FakeEngine, "create_execution_context", full)
        with pytest.raises(
            BackendError, match=r"its weights take .* MB is free: build the plan with --weight-streaming"
        ):
            open_pipeline()(PROMPT, **QUICK)

    @pytest.mark.parametrize("made", ["create_runtime_config", "create_engine_inspector"])
    def test_what_it_does_not_make(self, open_pipeline, gpu, default_bundle, monkeypatch, made):
        monkeypatch.setattr(fake_gpu.FakeEngine, made, lambda self: None, raising=False)
        with pytest.raises(BackendError, match=r"TensorRT for RTX made no \w+ \w+; see `dnp doctor`"):
            pipeline = open_pipeline()
            pipeline.warm_up()
            sessions_of(pipeline)["denoise"].layers()

    def test_layers(self, gpu, default_bundle, tmp_path, capsys, monkeypatch):
        told = SimpleNamespace(get_engine_information=lambda form: '{"Layers": ["a fused kernel"]}')
        monkeypatch.setattr(fake_gpu.FakeEngine, "create_engine_inspector", lambda self: told, raising=False)
        build_plans(default_bundle, graphs=["encode_text"], folder=tmp_path)
        assert run(["inspect", "--plans", str(tmp_path), "--layers"]) == 0
        assert "a fused kernel" in capsys.readouterr().out

    def test_it_compiles_for_no_other_gpu(self, gpu, default_bundle, tmp_path):
        with pytest.raises(BackendError, match="compiles for the GPU that is present; --sm is for tensorrt-rtx"):
            build_plans(default_bundle, "tensorrt", settings=BuildSettings(sm=(89,)), folder=tmp_path)


class TestNumbers:
    def test_vision_features_that_are_no_numbers_are_a_named_error(self, open_pipeline, monkeypatch):
        pipeline = open_pipeline()
        pipeline.warm_up()
        step = sessions_of(pipeline)["caption_step"]
        logits = step.outputs["logits"]
        read = type(logits).read

        def spoiled(self):
            found = read(self)
            return np.full_like(found, np.nan) if self is logits else found

        monkeypatch.setattr(type(logits), "read", spoiled)
        with pytest.raises(DnpError, match="no longer finite numbers"):
            pipeline(PROMPT, **QUICK)


class TestOnnxRuntime:
    def test_too_little_memory_is_no_fault_of_the_bundle(self, gpu, default_bundle, monkeypatch):
        def full(*arguments, **options):
            raise RuntimeError("bfc_arena.cc:376: Failed to allocate memory for requested buffer of size 4096")

        monkeypatch.setattr(gpu.ort, "InferenceSession", full, raising=False)
        with pytest.raises(
            BackendError, match=r"no memory on the GPU for the weights of 'encode_text'.*--memory-limit"
        ):
            open_session(default_bundle, "encode_text", "cuda")
        assert not gpu.device

    def test_a_graph_that_it_cannot_load(self, gpu, default_bundle, monkeypatch):
        monkeypatch.setattr(gpu.ort, "InferenceSession", failing("not a graph"), raising=False)
        with pytest.raises(DnpError, match="no graph that ONNX Runtime can load on CUDA"):
            open_session(default_bundle, "encode_text", "cuda")

    def test_a_fall_back_to_the_processor_is_an_error(self, gpu, default_bundle):
        gpu.ort.providers = ["CPUExecutionProvider"]
        with pytest.raises(BackendError):
            open_session(default_bundle, "encode_text", "cuda")

    def test_a_run_that_fails_names_the_sizes(self, gpu, default_bundle, monkeypatch):
        with open_session(default_bundle, "encode_text", "cuda") as session:
            session.reshape(batch=1, tokens=32)
            monkeypatch.setattr(session._file.session, "run_with_iobinding", failing("out of memory"), raising=False)
            with pytest.raises(BackendError, match=r"failed on cuda .*'batch': 1.*ask for fewer images at once"):
                session.run()


class TestCalls:
    """The class of CUDA calls itself, on the real bindings, whose functions are told what to answer."""

    @pytest.fixture
    def answered(self, monkeypatch):
        error = cuda_runtime.cudaError_t

        def answer(**results):
            for name, result in {"cudaSetDevice": (error.cudaSuccess,), **results}.items():
                function = lambda *_, result=result: result  # noqa: E731
                function.__name__ = name
                monkeypatch.setattr(cuda_runtime, name, function)
            return cuda.Cuda()

        return answer

    def test_out_of_memory(self, answered):
        opened = answered(cudaMalloc=(cuda_runtime.cudaError_t.cudaErrorMemoryAllocation, None))
        with pytest.raises(cuda.OutOfMemoryError, match="cudaMalloc found no memory"):
            opened.malloc(10)

    def test_any_other_error_names_the_call(self, answered):
        opened = answered(cudaGraphLaunch=(cuda_runtime.cudaError_t.cudaErrorLaunchFailure,))
        with pytest.raises(BackendError, match=r"cudaGraphLaunch failed: .* \(cudaErrorLaunchFailure\)"):
            opened.launch(0, 0)

    @pytest.mark.parametrize(
        ("error", "driver", "told"),
        [
            ("cudaErrorNoDevice", 13000, "there is no NVIDIA GPU here"),
            ("cudaErrorInvalidDevice", 13000, "there is no GPU number 0 here"),
            ("cudaErrorInsufficientDriver", 0, "there is no NVIDIA driver here: install one for CUDA 13.0 or newer"),
            ("cudaErrorInsufficientDriver", 12040, "the NVIDIA driver here is for CUDA 12.4, which is too old"),
        ],
    )
    def test_no_device(self, answered, error, driver, told):
        with pytest.raises(BackendError, match=told):
            answered(
                cudaSetDevice=(getattr(cuda_runtime.cudaError_t, error),),
                cudaDriverGetVersion=(cuda_runtime.cudaError_t.cudaSuccess, driver),
            )

    def test_a_device_of_an_impossible_number(self):
        for number in (-1, 99999999999):
            with pytest.raises(BackendError, match=f"there is no GPU number {number} here"):
                cuda.Cuda(number)
