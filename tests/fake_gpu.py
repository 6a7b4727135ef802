"""A stand-in for CUDA and TensorRT, for the tests alone: it computes with ONNX Runtime in ordinary memory.

It shows in which order the calls are made and that the bookkeeping is right. It says nothing about a GPU: not that
anything works there, nor how long it takes. Everything that it makes says so: its device is called ``FAKE``, its
version ends in ``fake``, and its plans begin with the sentence ``THIS IS NO PLAN``.

Work that is started is done only when somebody waits for it, as on a device that is slow: whoever reads too early or
frees too early sees it.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import onnxruntime

from dnp.engine.errors import BackendError
from dnp.engine.system.cuda import Cuda, GpuProperties, OutOfMemoryError

MARK = b"THIS IS NO PLAN but a note for the fake of the tests\n"
POISON = 0xA5  # what memory holds that nobody wrote
DTYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64", "tensor(uint8)": "UINT8"}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "UINT8": np.uint8}


class FakeCuda:
    """The public face of ``dnp.engine.system.cuda.Cuda`` over numpy memory.

    ``calls`` holds the name of each call in order; ``fail`` maps a name to an error that it raises once it is called.
    """

    def __init__(self, memory=1 << 40, sm=89):
        self.memory, self.sm = memory, sm
        self.calls, self.fail = [], {}
        self.device, self.pinned = {}, {}
        self.pending = []  # started, and not yet done
        self.capturing = None
        self.graphs, self.events, self.streams = {}, {}, set()
        self.handles = itertools.count(100)
        self.threads = set()  # those that have made the device theirs

    def __getattribute__(self, name):
        found = object.__getattribute__(self, name)
        if name in PUBLIC and name != "activate":
            calls, fail = object.__getattribute__(self, "calls"), object.__getattribute__(self, "fail")
            calls.append(name)
            if name in fail:
                raise fail[name]
        return found

    def counted(self, since=0):
        """How often each call was made, from the call number ``since`` on."""
        return Counter(self.calls[since:])

    def activate(self):
        self.threads.add(threading.get_ident())

    def properties(self, device=0):
        return GpuProperties("FAKE, no GPU", self.sm, self.memory)

    def free_memory(self):
        return self.memory - sum(block.nbytes for block in self.device.values())

    def malloc(self, size):
        if size > self.memory - sum(block.nbytes for block in self.device.values()):
            raise OutOfMemoryError("the fake found no memory")
        return self._block(self.device, size)

    def free(self, address):
        self._drain()
        del self.device[address]

    def malloc_host(self, size):
        return self._block(self.pinned, size)

    def free_host(self, address):
        assert not self.pending, "pinned memory was freed while copies were under way"
        del self.pinned[address]

    def to_device(self, device, host, size, stream):
        self._start(stream, lambda: self._move(device, self.device, host, self.pinned, size))

    def to_host(self, host, device, size, stream):
        self._start(stream, lambda: self._move(host, self.pinned, device, self.device, size))

    def on_device(self, into, source, size, stream):
        self._start(stream, lambda: self._move(into, self.device, source, self.device, size))

    def clear(self, address, size, stream):
        self._start(stream, lambda: ctypes.memset(address, 0, size))

    def stream(self):
        handle = next(self.handles)
        self.streams.add(handle)
        return handle

    def free_stream(self, stream):
        self.streams.remove(stream)

    def synchronize(self, stream):
        assert self.capturing is None, "waiting while capturing is an error"
        self._drain()

    def begin_capture(self, stream):
        assert self.capturing is None
        self.capturing = []

    def end_capture(self, stream):
        handle = next(self.handles)
        self.graphs[handle], self.capturing = self.capturing, None
        return handle

    def launch(self, graph, stream):
        work = self.graphs[graph]
        self._start(stream, lambda: [step() for step in work])

    def free_graph(self, graph):
        self._drain()
        del self.graphs[graph]

    def event(self):
        handle = next(self.handles)
        self.events[handle] = 0
        return handle

    def record(self, event, stream):
        assert self.capturing is None

    def wait(self, event):
        assert self.capturing is None, "waiting while capturing is an error"
        self._drain()

    def elapsed(self, start, end):
        return 0.0

    def free_event(self, event):
        del self.events[event]

    def _start(self, stream, work):
        assert stream in self.streams, "work on a stream that does not exist"
        assert threading.get_ident() in self.threads, "this thread works on another device"
        (self.pending if self.capturing is None else self.capturing).append(work)

    def _drain(self):
        work, self.pending = self.pending, []
        for step in work:
            step()

    def _block(self, blocks, size):
        whole = np.full(size + 256, POISON, np.uint8)
        block = whole[-whole.ctypes.data % 256 :][:size]
        blocks[block.ctypes.data] = block
        return block.ctypes.data

    def _within(self, blocks, address, size):
        ends = ((start, start + block.nbytes) for start, block in blocks.items())
        return any(start <= address and address + size <= end for start, end in ends)

    def _move(self, into, into_blocks, source, source_blocks, size):
        assert self._within(into_blocks, into, size), "a copy beyond the end"
        assert self._within(source_blocks, source, size), "a copy from beyond the end"
        ctypes.memmove(into, source, size)


PUBLIC = {name for name in vars(Cuda) if not name.startswith("_")}


class FakeTensorRt:
    """As much of the module ``tensorrt_rtx`` as the package uses; ``fail`` switches single calls to failing."""

    __name__ = "fake_tensorrt"
    __version__ = "0.0.0.fake"

    def __init__(self, cuda):
        self.cuda, self.fail, self.built, self.contexts, self.engines = cuda, set(), 0, [], []
        self.log = None
        module = self

        class ILogger:
            class Severity:
                INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        class IProgressMonitor:
            pass

        class Builder:
            def __init__(self, logger):
                module.log = logger

            def create_network(self, flags):
                return SimpleNamespace(path=None, num_layers=0)

            def create_builder_config(self):
                return Config()

            def create_optimization_profile(self):
                return SimpleNamespace(set_shape=lambda *_: None)

            def build_serialized_network(self, network, config):
                module.built += 1
                config.progress_monitor.phase_start("Building", None, 3)
                for step in range(3):
                    if not config.progress_monitor.step_complete("Building", step):
                        return None
                config.progress_monitor.phase_finish("Building")
                if "build" in module.fail:
                    module.say("the fake was told to fail\nat length")
                    return None
                if {module.BuilderFlag.WEIGHT_STREAMING, module.BuilderFlag.REQUIRE_USER_ALLOCATION} <= config.flags:
                    module.say("kREQUIRE_USER_ALLOCATION is not compatible with BuilderFlag::kWEIGHT_STREAMING")
                    return None
                module.log.log(3, "Total Activation Memory: 1000 bytes")
                module.log.log(3, "Total Weights Memory: 2000 bytes")
                return MARK + json.dumps({"path": network.path, "flags": sorted(config.flags)}).encode()

        class Config:
            def __init__(self):
                self.flags = set()

            def set_flag(self, flag):
                self.flags.add(flag)

            def clear_flag(self, flag):
                pass

            def set_memory_pool_limit(self, pool, size):
                pass

            def set_compute_capability(self, capability, index):
                pass

            def add_optimization_profile(self, profile):
                return 0

            def create_timing_cache(self, blob):
                return bytes(blob)

            def set_timing_cache(self, cache, ignore_mismatch):
                assert cache is not None
                return cache in (b"", b"timings")

            def get_timing_cache(self):
                return SimpleNamespace(serialize=lambda: b"timings")

        class OnnxParser:
            num_errors = 0

            def __init__(self, network, logger):
                self.network = network

            def parse_from_file(self, path):
                self.network.path = path
                return "parse" not in module.fail

        class Runtime:
            def __init__(self, logger):
                module.log = logger

            def deserialize_cuda_engine(self, plan):
                plan = bytes(plan)
                if "deserialize" in module.fail or not plan.startswith(MARK):
                    module.say("no plan")
                    return None
                return FakeEngine(module, **json.loads(plan.removeprefix(MARK)))

        class Refitter:
            def __init__(self, engine, logger):
                module.log = logger
                self.engine, self.session = engine, None

            def get_missing_weights(self):
                return ["a weight"] if "refit" in module.fail else []

            def refit_cuda_engine(self):
                assert self.engine.refittable
                self.engine.session = self.session
                return True

        class OnnxParserRefitter:
            def __init__(self, refitter, logger):
                self.refitter = refitter

            def refit_from_file(self, path):
                self.refitter.session = open_on_cpu(path)
                return True

        for kind in (ILogger, IProgressMonitor, Builder, OnnxParser, Runtime, Refitter, OnnxParserRefitter):
            setattr(self, kind.__name__, kind)
        names = SimpleNamespace
        self.TensorIOMode = names(INPUT="input", OUTPUT="output")
        self.ExecutionContextAllocationStrategy = names(USER_MANAGED=2)
        self.CudaGraphStrategy = names(DISABLED=0)
        self.DynamicShapesKernelSpecializationStrategy = names(EAGER=1)
        self.NetworkDefinitionCreationFlag = names(STRONGLY_TYPED=1)
        self.BuilderFlag = names(TF32=0, WEIGHT_STREAMING=1, REFIT=2, REQUIRE_USER_ALLOCATION=3)
        self.MemoryPoolType = names(WORKSPACE=0)
        self.ProfilingVerbosity = names(DETAILED=2)
        self.LayerInformationFormat = names(JSON=1)
        self.ComputeCapability = names(SM75=75, SM80=80, SM86=86, SM89=89, SM120=120, SM121=121)

    def say(self, message):
        """An error in TensorRT's log."""
        self.log.log(1, message)


def open_on_cpu(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class FakeEngine:
    def __init__(self, module, path, flags):
        self.module, self.contexts, self.budget = module, 0, None
        self.refittable = module.BuilderFlag.REFIT in flags
        self.streamable_weights_size = 2000 if module.BuilderFlag.WEIGHT_STREAMING in flags else 0
        self.capturable = module.BuilderFlag.REQUIRE_USER_ALLOCATION in flags
        module.engines.append(self)
        self.session = open_on_cpu(path)
        self.values = {v.name: v for v in [*self.session.get_inputs(), *self.session.get_outputs()]}
        self.inputs = [v.name for v in self.session.get_inputs()]
        self.outputs = [v.name for v in self.session.get_outputs()]
        self.num_io_tensors = len(self.values)

    @property
    def weight_streaming_budget_v2(self):
        return self.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, size):
        assert not self.contexts, "the budget cannot change once there is a context"
        assert 0 <= size <= self.streamable_weights_size
        self.budget = size

    def get_tensor_name(self, index):
        return [*self.values][index]

    def get_tensor_mode(self, name):
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=DTYPES[self.values[name].type])

    def get_tensor_shape(self, name):
        return tuple(size if isinstance(size, int) else -1 for size in self.values[name].shape)

    def get_device_memory_size_for_profile_v2(self, index):
        return 4096 if self.budget in (None, self.streamable_weights_size) else 8192

    def create_runtime_config(self):
        cache = SimpleNamespace(serialize=lambda: b"kernels", deserialize=lambda blob: True)
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=lambda: cache,
            set_runtime_cache=lambda cache: None,
        )

    def create_execution_context(self, config):
        if "context" in self.module.fail:
            return None
        self.contexts += 1
        context = FakeContext(self)
        self.module.contexts.append(context)
        return context


class FakeContext:
    def __init__(self, engine):
        self.engine, self.module = engine, engine.module
        self.shapes, self.addresses, self.scratch = {}, {}, 0

    def set_device_memory(self, address, size):
        assert self.module.cuda.device[address].nbytes >= size >= self.engine.get_device_memory_size_for_profile_v2(0)
        self.scratch = address

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return "shape" not in self.module.fail

    def set_tensor_address(self, name, address):
        assert address % 256 == 0
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream):
        return self.engine.capturable and "capturable" not in self.module.fail

    def execute_async_v3(self, stream):
        if "execute" in self.module.fail:
            self.module.say("the fake was told to fail")
            return False
        assert self.scratch, "no device memory was given"
        shapes, addresses = dict(self.shapes), dict(self.addresses)  # what a capture holds too
        self.module.cuda._start(stream, lambda: self._execute(shapes, addresses))
        return True

    def _execute(self, shapes, addresses):
        engine, cuda = self.engine, self.module.cuda
        feeds = {name: self._view(name, addresses[name], shapes[name]) for name in engine.inputs}
        results = engine.session.run(engine.outputs, feeds)
        for name, result in zip(engine.outputs, results, strict=True):
            assert cuda.device[addresses[name]].nbytes >= result.nbytes, f"{name} goes beyond its buffer"
            ctypes.memmove(addresses[name], np.ascontiguousarray(result).ctypes.data, result.nbytes)

    def _view(self, name, address, shape):
        dtype = np.dtype(NUMPY[DTYPES[self.engine.values[name].type]])
        size = int(np.prod(shape)) * dtype.itemsize
        return self.module.cuda.device[address][:size].view(dtype).reshape(shape)


class FakeOnnxRuntime:
    """``onnxruntime`` with a CUDA provider, which is its CPU provider at work in the fake's memory."""

    __version__ = "0.0.0.fake"

    def __init__(self, cuda, providers=("CUDAExecutionProvider",)):
        self.cuda, self.providers, self.captured = cuda, list(providers), []
        self.settings = []  # those of each session that was opened
        self.aborts = []  # what would have ended the process
        self.refuse_capture = False
        self.SessionOptions = onnxruntime.SessionOptions

    def get_available_providers(self):
        return [*self.providers, "CPUExecutionProvider"]

    class RunOptions(dict):
        def add_run_config_entry(self, key, value):
            self[key] = value

    def InferenceSession(self, path, options, providers, enable_fallback):  # noqa: N802  the library's name
        assert not enable_fallback, "a session that cannot have the GPU would go on without, and print it"
        return FakeOrtSession(self, path, dict(providers)["CUDAExecutionProvider"])


class FakeOrtSession:
    def __init__(self, module, path, settings):
        self.module, self.settings, self.path = module, dict(settings), path
        self.deferred = 0  # runs whose buffers on the host nobody has given back
        module.settings.append(self.settings)
        if module.refuse_capture and settings["enable_cuda_graph"] == "1":
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(in_plain_nodes(path), options, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self.session.get_inputs, self.session.get_outputs
        self.replays = {}

    def __del__(self):
        # Runs that ONNX Runtime may not wait for leave what they took of the host's memory to the session's end. There
        # a callback gives it back, unless runs are captured, and a callback must not free: CUDA failure 800.
        if getattr(self, "deferred", 0) and self.settings["enable_cuda_graph"] == "0":
            self.module.aborts.append("a session ended with buffers that its runs took")
        if self.module.cuda.pending:
            self.module.aborts.append("a session ended with work under way")

    def get_providers(self):
        return [*self.module.providers, "CPUExecutionProvider"]

    def io_binding(self):
        bound = {}

        def bind(name, device, number, dtype, shape, address):
            assert device == "cuda"
            bound[name] = (np.dtype(dtype), tuple(shape), address)

        return SimpleNamespace(bind_input=bind, bind_output=bind, bound=bound)

    def run_with_iobinding(self, binding, how):
        asynchronous = how["disable_synchronize_execution_providers"] == "1"
        self.deferred = self.deferred + 1 if asynchronous else 0
        bound, number = dict(binding.bound), int(how["gpu_graph_id"])
        if number > 0:
            # what was captured under a number is done again, whatever is bound by then
            assert self.settings["enable_cuda_graph"] == "1"
            bound = self.replays.setdefault(number, bound)
            self.module.captured.append(number)
        self.module.cuda._start(int(self.settings["user_compute_stream"]), lambda: self._execute(bound))

    def _execute(self, bound):
        def view(name):
            dtype, shape, address = bound[name]
            size = int(np.prod(shape)) * dtype.itemsize
            return self.module.cuda.device[address][:size].view(dtype).reshape(shape)

        outputs = [value.name for value in self.get_outputs()]
        results = self.session.run(outputs, {value.name: view(value.name) for value in self.get_inputs()})
        for name, result in zip(outputs, results, strict=True):
            view(name)[...] = result


def in_plain_nodes(path):
    """A graph for the CPU, which has no kernels for what CUDA has: as its definitions say."""
    import onnx_ir as ir

    from dnp.engine.backends.onnxruntime.passes.definitions import inlined

    model = ir.load(path)
    if not model.functions:
        return path
    ir.external_data.load_to_model(model)
    return ir.to_proto(inlined(model)).SerializeToString()


def broken(message="the fake was told to fail"):
    """An error as a CUDA call raises it."""
    return BackendError(message)
