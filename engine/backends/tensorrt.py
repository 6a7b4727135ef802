"""The backends ``tensorrt`` and ``tensorrt-rtx``: compiled plans, and runs captured as CUDA graphs."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dnp.engine.backends.device import DeviceBackend, DeviceSession
from dnp.engine.backends.host import check_signature
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.errors import BackendError, OutputError
from dnp.engine.plans.build import build_command, settings_of, target_for
from dnp.engine.plans.choice import plan_for
from dnp.engine.plans.compiler import compile_plan
from dnp.engine.plans.limits import Limits
from dnp.engine.plans.plan import FOLDER, Plan
from dnp.engine.plans.product import TENSORRT, TENSORRT_RTX, Log, Product, listening, logger
from dnp.engine.plans.profile import any_profile, from_dict, largest
from dnp.engine.plans.settings import BuildSettings
from dnp.engine.plans.store import PlanStore
from dnp.engine.system import cuda
from dnp.engine.system.files import write_together

if TYPE_CHECKING:
    from dnp.engine.bundle.bundle import Bundle

_STREAM: Final = "build the plan with --weight-streaming"
_DTYPES: Final = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "UINT8": "uint8"}


@dataclass
class _Run:
    """A graph at fixed sizes: an execution context of its own, and what was captured of it."""

    context: Any
    dims: dict[str, int]
    captured: Any = None


class TrtSession(DeviceSession):
    """A plan on a GPU. Buffers have the profile's largest sizes and never move, so what was captured stays valid.

    Sizes that were captured have an execution context each, whose run is one launch of a captured CUDA graph. All
    others share one, whose runs are enqueued.
    """

    def __init__(
        self,
        graph: GraphSpec,
        plan: memoryview | mmap.mmap,
        limits: Limits,
        backend: TrtBackend,
        cache: Path | None,
        weights: int,
    ) -> None:
        super().__init__(graph, backend, f"{backend.product.title} {backend.module.__version__}")
        self.limits = limits
        self._product, self._trt, self._cache_file = backend.product, backend.module, cache
        self._loose: _Run | None = None
        self._captured: dict[tuple[int, ...], _Run] = {}
        self._saved = b""  # the runtime cache as it lies beside the plan
        self._gpu.hold(weights, f"the weights of {graph.name!r}", _STREAM)
        self._held = weights
        try:
            self._load(plan)
            for buffer, shape in self._own(largest(limits.ranges)):
                buffer.reserve(shape)
        except BaseException:
            self._gpu.release(weights)
            self._free_buffers()
            raise
        self._streamable = int(self._engine.streamable_weights_size)  # 0 unless it was built to be
        if self._streamable:
            self._engine.weight_streaming_budget_v2 = 0  # its share is known when all others are open: `_settle`
            self._gpu.want_share(self._streamable)
        self._want_scratch()

    def _load(self, plan: memoryview | mmap.mmap) -> None:
        with listening(self._trt) as log:
            self._runtime = self._trt.Runtime(logger(self._trt))
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(
                f"{self._where}: {self._product.title} cannot load the plan on {self._gpu.properties.name}: "
                f"{log.errors()}; {self._remedy(log, f'build it again: {self.limits.build_command()} --force')}"
            )
        self._engine = engine
        self._check_engine()
        self._config = self._runtime_config()

    def _want_scratch(self) -> None:
        self._scratch_size = int(self._engine.get_device_memory_size_for_profile_v2(0))
        self._gpu.want_scratch(self._scratch_size)

    def _settle(self) -> None:
        """Decide how many of the weights lie on the device, which cannot be changed once there is a context."""
        if not self._streamable:
            return
        share = self._gpu.share(self._streamable)
        self._streamable, self._held = 0, self._held + share
        self._engine.weight_streaming_budget_v2 = share
        self._want_scratch()  # it depends on how many are streamed

    @property
    def captured(self) -> Sequence[Mapping[str, int]]:
        return [run.dims for run in self._captured.values()]

    def _capture(self) -> None:
        """Capture the run at the present sizes as a CUDA graph, and keep the kernels that this took.

        When that cannot be done, this session runs without captured graphs from then on; the backend says so once.
        """
        key = tuple(self._require_dims().values())
        if key in self._captured:
            return
        try:
            run = _Run(self._context(), {})
            self._enqueue(run)  # what TensorRT does only once must not be captured
            self._cuda.synchronize(self._gpu.stream)
            if self._product.portable and not run.context.is_stream_capturable(self._gpu.stream):
                raise BackendError("TensorRT says that this graph cannot be captured at these sizes")
            self._cuda.begin_capture(self._gpu.stream)
            try:
                self._enqueue(run)
            except BaseException:  # a Ctrl-C must not leave a stream that captures instead of computing
                with suppress(BackendError):  # what it says of the end is less than what went wrong
                    self._cuda.free_graph(self._cuda.end_capture(self._gpu.stream))
                raise
            run.captured = self._cuda.end_capture(self._gpu.stream)
        except BackendError as error:
            self._run_eagerly(error)
            return
        self._captured[key] = run
        self._save_cache()  # not only when it is closed: a process that is killed keeps it too

    def run(self) -> None:
        """Starts the work and does not wait for it."""
        dims = self._require_dims()
        self._cuda.activate()
        run = self._captured.get(tuple(dims.values()))
        if run is None:
            self._loose = self._loose or _Run(self._context(), {})
            self._enqueue(self._loose)
        else:
            self._check_inputs(dims)
            self._cuda.launch(run.captured, self._gpu.stream)

    def check_refit(self) -> None:
        """Weights are exchanged in plans that were built for it."""
        self._require_open()
        if not self._engine.refittable:
            raise BackendError(
                f"{self._where}: this plan keeps its weights; build one that does not: "
                f"{self.limits.build_command()} --refit"
            )

    def refit(self, path: Path) -> None:
        """A LoRA is merged into the original weights before, see ``dnp export --lora``."""
        self.check_refit()
        self._cuda.activate()
        self._cuda.synchronize(self._gpu.stream)
        with listening(self._trt) as log:
            refitter = self._trt.Refitter(self._engine, logger(self._trt))
            parser = self._trt.OnnxParserRefitter(refitter, logger(self._trt))
            fits = parser.refit_from_file(str(path)) and not refitter.get_missing_weights()
            if not fits or not refitter.refit_cuda_engine():
                self.close()  # it may hold some of the weights
                raise BackendError(f"{self._where}: the weights of {path} do not fit this plan: {log.errors()}")
        self._forget()

    def layers(self) -> str:
        """What the engine inspector says of each layer, as JSON."""
        self._require_open()
        inspector = self._given(self._engine.create_engine_inspector(), "engine inspector")
        told: str = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        return told

    def _enqueue(self, run: _Run) -> None:
        dims = self._require_dims()
        self._check_inputs(dims)
        with listening(self._trt) as log:
            if run.dims != dims:
                run.dims = {}  # until all of them are set
                for name, spec in self.graph.inputs.items():
                    shape = spec.resolve(dims)
                    if not run.context.set_input_shape(name, shape):
                        raise BackendError(
                            f"{self._where}: TensorRT takes no {name!r} of {list(shape)}: {log.errors()}"
                        )
                run.dims = dims
            if not run.context.execute_async_v3(int(self._gpu.stream)):
                raise BackendError(f"{self._where} failed on {self.backend} with {dims}: {log.errors()}")
        self._start_feedback()

    def _context(self) -> Any:
        self._settle()
        with listening(self._trt) as log:
            context = self._engine.create_execution_context(self._config)
        if context is None:
            raise BackendError(
                f"{self._where}: TensorRT made no execution context: {log.errors()}; "
                f"{self._remedy(log, 'see `dnp doctor`')}"
            )
        if self._scratch_size:
            context.set_device_memory(self._gpu.scratch(), self._scratch_size)
        for name, buffer in [*self._inputs.items(), *self._outputs.items()]:
            if not context.set_tensor_address(name, buffer.address):
                raise BackendError(f"{self._where}: TensorRT takes no address for {name!r}")
        return context

    def _runtime_config(self) -> Any:
        trt = self._trt
        config = self._given(self._engine.create_runtime_config(), "runtime configuration")
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._product.portable:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # we capture ourselves, with what is fed back
            # A captured graph keeps the kernels that it was captured with: they must be the best ones by then.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            self._cache = self._given(config.create_runtime_cache(), "runtime cache")
            with suppress(OSError):  # none yet, or none that can be read
                if self._cache_file is not None:
                    self._saved = self._cache_file.read_bytes()
                    self._cache.deserialize(self._saved)  # False: of another GPU or version, and unused
            config.set_runtime_cache(self._cache)
        return config

    def _given(self, thing: Any, what: str) -> Any:
        """What TensorRT made. Raises BackendError when it made none."""
        if thing is None:
            raise BackendError(f"{self._where}: {self._product.title} made no {what}; see `dnp doctor`")
        return thing

    def _save_cache(self) -> None:
        """Keep the kernels that the driver finished, for the next start."""
        if self._cache_file is None or not self._product.portable:
            return
        data = self._cache.serialize()
        if data is None or bytes(data) == self._saved:
            return
        try:
            write_together({self._cache_file: data})
            self._saved = bytes(data)
        except OutputError as error:
            self._cache_file = None
            self._backend.warn_about("cache", f"{self._where}: the runtime cache is not kept: {error}")

    def _check_engine(self) -> None:
        """Hold the plan's inputs and outputs against the manifest's."""
        engine, found = self._engine, {"inputs": {}, "outputs": {}}  # type: ignore[var-annotated]
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            side = "inputs" if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT else "outputs"
            dtype = engine.get_tensor_dtype(name).name
            shape = tuple(None if size < 0 else size for size in engine.get_tensor_shape(name))
            found[side][name] = (_DTYPES.get(dtype, dtype.lower()), shape)
        check_signature(self.graph, found)

    def _remedy(self, log: Log, otherwise: str) -> str:
        """What to do about a call that gave nothing, going by what TensorRT said."""
        said = log.errors().lower()
        if not any(word in said for word in ("outofmemory", "out of memory", "memory allocation")):
            return otherwise
        wanted, free = self._held / 1e6, self._cuda.free_memory() / 1e6
        return f"its weights take {wanted:.1f} MB, {free:.1f} MB is free: {_STREAM}, or with smaller largest sizes"

    def _forget(self) -> None:
        runs, self._captured, self._loose = [*self._captured.values()], {}, None
        for run in runs:
            with suppress(BackendError):  # after an error that lasts; what can be freed is
                self._cuda.free_graph(run.captured)

    def _release(self) -> None:
        self._gpu.release(self._held)
        self._gpu.want_share(-self._streamable)
        try:
            self._save_cache()
        finally:
            del self._config, self._engine, self._runtime


class TrtBackend(DeviceBackend):
    """Plans on one GPU, with one scratch memory for all of them."""

    product: Product
    remedy = "build plans of smaller largest sizes (dnp build --batch, --height, --width, --steps)"

    def _load(self) -> Any:
        """The library; the wrong card is told before anything is loaded for it."""
        number = self.options.device
        try:
            gpu = cuda.open_cuda(number).properties(number)
        except BackendError:
            pass  # told when the device is opened, after what is not installed
        else:
            gpu.check_age()
            self.product.check_gpu(gpu)
        return self.product.load()

    def session(self, graph: GraphSpec, bundle: Bundle | None = None) -> TrtSession:
        """Open the newest plan that fits; see ``plan_for``. A graph in no bundle has none, and is compiled here."""
        target = target_for(self.product, (), self.options.device)
        if bundle is None:
            profile = any_profile(graph)
            built, statistics = compile_plan(graph, profile, BuildSettings(), target)
            weights = int(statistics.get("weights_bytes", 0))
            return TrtSession(graph, memoryview(built), Limits.of_plan(graph, profile), self, None, weights)
        store = PlanStore(self.options.plans or bundle.path / FOLDER)
        plan = plan_for(bundle, graph, target, store)
        folder = store.folder if self.options.plans else None
        command = build_command(bundle, self.name, settings_of(plan.spec), folder, self.options.device)
        limits = Limits.of_plan(graph, from_dict(plan.spec.profile), bundle, command)
        return self._open(graph, plan, limits, plan.path.with_suffix(f".sm{self.gpu.properties.sm}.cache"))

    def layers(self, graph: GraphSpec, plan: Plan) -> str:
        """What the engine inspector says of a plan's layers, as JSON. Raises BackendError when it cannot be loaded."""
        limits = Limits.of_plan(graph, from_dict(plan.spec.profile))
        with closing(self._open(graph, plan, limits, None)) as session:
            return session.layers()

    def _open(self, graph: GraphSpec, plan: Plan, limits: Limits, cache: Path | None) -> TrtSession:
        streamed = plan.spec.flags.get("weight_streaming", False)
        with ExitStack() as opened:
            try:
                file = opened.enter_context(plan.path.open("rb"))
                data = opened.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except (OSError, ValueError) as error:  # it was there a moment ago
                raise BackendError(f"{plan.path} cannot be read any more ({error}); open it again") from error
            weights = 0 if streamed else int(plan.statistics.get("weights_bytes", len(data)))
            return TrtSession(graph, data, limits, self, cache, weights)


class TensorRtBackend(TrtBackend):
    """TensorRT, on the GPU that the plans are built on."""

    name = "tensorrt"
    product = TENSORRT


class TensorRtRtxBackend(TrtBackend):
    """TensorRT for RTX, whose plans can be built anywhere."""

    name = "tensorrt-rtx"
    product = TENSORRT_RTX
