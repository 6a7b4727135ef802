"""The ``cuda`` backend: ONNX Runtime's CUDA provider on our buffers and our stream, from plans where there are any."""

from __future__ import annotations

import io
import itertools
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dnp.engine.backends.device import DeviceBackend, DeviceSession
from dnp.engine.backends.host import first_line
from dnp.engine.backends.onnxruntime.cuda_plans import NAME, SIZES, at_sizes, build_command, plans_for, with_beams
from dnp.engine.backends.onnxruntime.passes import BEAMS
from dnp.engine.backends.onnxruntime.session import FATAL, check_session, import_onnxruntime
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.schema import REMEDY
from dnp.engine.errors import BackendError, BundleError
from dnp.engine.plans.limits import Limits
from dnp.engine.plans.plan import FOLDER, PlanSpec
from dnp.engine.plans.store import PlanStore
from dnp.engine.system.cuda import Cuda
from dnp.engine.system.imports import installed, missing_extra, place
from dnp.engine.system.interrupts import uninterrupted

if TYPE_CHECKING:
    from dnp.engine.bundle.bundle import Bundle

PROVIDER: Final = "CUDAExecutionProvider"
_NOT_CAPTURED: Final = -1  # ONNX Runtime's number for "neither capture nor replay this run"
_RUNS_TO_CAPTURE: Final = 2  # one as it comes, one that is captured
_numbers = itertools.count(1)  # to capture runs under, each once


class CudaSession(DeviceSession):
    """A graph on ONNX Runtime's CUDA provider: its plan for the present image size, or the graph as it was exported.

    Files are opened when a size asks for them first, and stay open: one for each image size that has a plan, and one
    for all others. ONNX Runtime captures a run under a number that it is given, and replays it when it meets the number
    again: sizes that were captured have one each, as long as no buffer moves.
    """

    def __init__(self, graph: GraphSpec, backend: CudaBackend, limits: Limits, bundle: Bundle | None = None) -> None:
        self._ort, self._number = backend.module, backend.options.device
        self._bundle, self._store = bundle, None
        self._plans: dict[tuple[tuple[str, int], ...], PlanSpec] = {}
        if bundle is not None:
            self._store = PlanStore(backend.options.plans or bundle.path / FOLDER)
            self._plans = plans_for(bundle, graph, self._store)
        super().__init__(graph, backend, f"ONNX Runtime {self._ort.__version__}, {PROVIDER}")
        self.limits = limits
        self._open_files: dict[tuple[tuple[str, int], ...] | None, _File] = {}
        self._numbers: dict[tuple[tuple[int, ...], ...], int] = {}
        self._file = self._opened(next(iter(self._plans), None))
        # A process that ends without closing, or forgets a session, must not take it from under work that goes on.
        self._ending = weakref.finalize(self, _settle, self._cuda, self._gpu.stream, self._open_files)

    def reshape(self, **dims: int) -> None:
        """Opens a file the first time that there is a plan for this image size, or none."""
        self._require_open()
        file = self._file_for(self._checked(dims))
        super().reshape(**dims)
        self._file = file

    def _file_for(self, sizes: Mapping[str, int]) -> _File:
        dims = with_beams(sizes)
        wanted = next((key for key in self._plans if all(dims[name] == size for name, size in key)), None)
        if wanted is None and self._bundle is not None and dims.get(BEAMS, 1) == 1:
            asked = ", ".join(f"{name} {size}" for name, size in sizes.items() if name in SIZES)
            command = build_command(self._bundle, self.graph, sizes, self._backend.options.plans)
            self._backend.warn_about(
                "plans",
                f"{self._where}: there is no plan for {asked or 'it'}, so it runs as it was exported; in a plan ONNX "
                f"Runtime finds its fused kernels, takes less memory, and can capture: {command}",
            )
        return self._opened(wanted)

    def _opened(self, sizes: tuple[tuple[str, int], ...] | None) -> _File:
        """The plan for ``sizes``, or the graph itself: for ``None``, and where the plan cannot be used."""
        if sizes in self._open_files:
            return self._open_files[sizes]
        if sizes is None:
            file = self._open(self.graph.path, self.graph.nbytes)
        elif (plan := self._open_plan(sizes)) is not None:
            file = plan
        else:
            del self._plans[sizes]
            return self._opened(None)
        self._open_files[sizes] = file
        return file

    def _open_plan(self, sizes: tuple[tuple[str, int], ...]) -> _File | None:
        """The plan, or ``None`` for one that cannot be used, which a warning names."""
        assert self._store is not None and self._bundle is not None
        plan, reason = self._store.find(self._plans[sizes])
        if plan is not None:
            nbytes = plan.nbytes + int(plan.statistics.get("weights_bytes", 0))
            try:
                return self._open(plan.path, nbytes, fixed=dict(sizes))
            except BundleError as error:
                reason = f"{plan.path.name} does not open: {first_line(error.__cause__ or error)}"
        command = build_command(self._bundle, self.graph, dict(sizes), self._backend.options.plans)
        self._backend.warn_about(
            f"plan of {self.graph.name}",
            f"{self.graph.name}: opened without its plan: {reason or 'it is gone'}; build it again: {command} --force",
        )
        return None

    def _open(self, path: Path, nbytes: int, fixed: Mapping[str, int] | None = None) -> _File:
        """A file of the graph, with weights of so many bytes: its plan, where ``fixed`` names its sizes."""
        gpu, planned = self._gpu, fixed is not None
        left = gpu.left
        # What runs beside a plan, such as a search with beams, is not tried: it would be refused.
        capture = not self._eager and (planned or not self._plans)
        gpu.hold(nbytes, f"the weights of {self.graph.name!r}", "raise --memory-limit")
        try:
            session, refusal = self._load(path, left, planned=planned, capture=capture)
            check_session(at_sizes(self.graph, fixed or {}), session)
        except BaseException:
            gpu.release(nbytes)
            raise
        if refusal is not None:
            self._backend.warn_about("capture", f"{self._where}: runs without CUDA graphs: {refusal}")
        return _File(session, session.io_binding(), nbytes, capturable=capture and refusal is None)

    def _load(self, path: Path, left: int | None, *, planned: bool, capture: bool) -> tuple[Any, str | None]:
        """ONNX Runtime's session, with so many bytes for it, and why it cannot capture if it cannot."""
        ort = self._ort
        options = ort.SessionOptions()
        options.log_severity_level = FATAL
        settings = {
            "device_id": str(self._number),
            "user_compute_stream": str(int(self._gpu.stream)),
            "do_copy_in_default_stream": "1",
            "use_tf32": "0",
            "enable_cuda_graph": "1" if capture else "0",
            "cudnn_conv_algo_search": "HEURISTIC",  # by measuring, two sessions may choose differently
            "arena_extend_strategy": "kSameAsRequested",
            "prefer_nhwc": "1" if planned else "0",  # a plan's group normalisations have the channels last
            "enable_skip_layer_norm_strict_mode": "1",  # sums in float32
        }
        if left is not None:  # of each session's own pool; the buffers are ours, and counted by the device
            settings["gpu_mem_limit"] = str(left)
        refusal: str | None = None

        def attempt() -> Any:
            # Else it prints an error, goes on without the GPU, and that is all it tells.
            return ort.InferenceSession(str(path), options, providers=[(PROVIDER, settings)], enable_fallback=0)

        try:
            try:
                session = attempt()
            except Exception as refused:
                if _is_about_memory(refused) or not capture:
                    raise
                refusal = first_line(refused)
                settings["enable_cuda_graph"] = "0"
                session = attempt()  # no session that captures opens when a node has to run on the processor
        except Exception as error:
            if _is_about_memory(error):
                raise BackendError(
                    f"no memory on the GPU for the weights of {self.graph.name!r}: {first_line(error)}; raise "
                    "--memory-limit, or free what else is there"
                ) from error
            raise BundleError(
                f"{path}: no graph that ONNX Runtime can load on CUDA: {first_line(error)}; {REMEDY}"
            ) from error
        running = session.get_providers()
        if running[:1] != [PROVIDER]:
            raise BackendError(
                f"ONNX Runtime was asked for {PROVIDER} and runs {', '.join(running)}; it needs CUDA 13 and cuDNN 9: "
                "pip install 'dnp-engine[gpu]'"
            )
        return session, refusal

    @property
    def captured(self) -> Sequence[Mapping[str, int]]:
        return [dict(zip(self.graph.symbols, sizes, strict=True)) for _, sizes, _ in self._numbers]

    def _capture(self) -> None:
        if not self._file.capturable or self._state() in self._numbers:
            return
        self._numbers[self._state()] = next(_numbers)
        for _ in range(_RUNS_TO_CAPTURE):
            self.run()
        self._cuda.synchronize(self._gpu.stream)

    def run(self) -> None:
        """Starts the work and does not wait for it."""
        dims = self._require_dims()
        self._cuda.activate()
        self._check_inputs(dims)
        file, state = self._file, self._state()
        if file.bound != state:
            self._bind(file)
            file.bound = state
        number = self._numbers.get(state, _NOT_CAPTURED)
        if number not in file.ways:
            file.ways[number] = self._way(file, number)
        try:
            file.session.run_with_iobinding(file.binding, file.ways[number])
        except Exception as error:
            remedy = f"; {self._backend.remedy}" if _is_about_memory(error) else ""
            told = f"{self._where} failed on {self.backend} with {dims}: {first_line(error)}{remedy}"
            raise BackendError(told) from error
        self._start_feedback()

    def _way(self, file: _File, number: int) -> Any:
        """ONNX Runtime's options of a run that is captured, and replayed, under ``number``."""
        how = self._ort.RunOptions()
        # Where nothing is captured, ONNX Runtime gives back what a run took of the host's memory by a callback on the
        # stream, at the end of a run that it may wait for. Runs that it may not wait for leave that to the session's
        # end, where the callback can be the last to hold the pool, and CUDA forbids callbacks to free memory: the
        # process would end. Where runs are captured there is no callback, and a replay needs what its capture took.
        how.add_run_config_entry("disable_synchronize_execution_providers", "1" if file.capturable else "0")
        how.add_run_config_entry("gpu_graph_id", str(number))
        return how

    def _bind(self, file: _File) -> None:
        number, binding = self._number, file.binding
        for name, buffer in self._inputs.items():
            binding.bind_input(name, "cuda", number, buffer.dtype, list(buffer.shape), buffer.address)
        for name, buffer in self._outputs.items():
            binding.bind_output(name, "cuda", number, buffer.dtype, list(buffer.shape), buffer.address)

    def _state(self) -> tuple[tuple[int, ...], ...]:
        """What a captured run depends on: the thread, which ONNX Runtime keeps it for, the sizes, and the addresses."""
        buffers = [*self._inputs.values(), *self._outputs.values()]
        sizes, addresses = tuple(self._require_dims().values()), tuple(buffer.address for buffer in buffers)
        return (threading.get_ident(),), sizes, addresses

    def _forget(self) -> None:
        self._numbers.clear()

    def close(self) -> None:
        """Not cut short by Ctrl-C: a session that is half gone cannot be closed again."""
        with uninterrupted():
            super().close()

    def _release(self) -> None:
        self._ending.detach()
        del self._file
        while self._open_files:
            _, file = self._open_files.popitem()
            self._gpu.release(file.nbytes)
            file.close()


class _File:
    """What ONNX Runtime holds of a file: the session, and its binding, which must go first.

    Attributes:
        capturable: whether runs can be captured.
        bound: the state that the binding is of; to bind takes as long as to launch.
        ways: the options of a run, by the number that it is captured under.
    """

    def __init__(self, session: Any, binding: Any, nbytes: int, *, capturable: bool) -> None:
        self.session, self.binding, self.nbytes, self.capturable = session, binding, nbytes, capturable
        self.bound: tuple[tuple[int, ...], ...] | None = None
        self.ways: dict[int, Any] = {}

    def close(self) -> None:
        """Give it back; nothing is under way any more."""
        self.binding = None
        self.session = None


def _settle(cuda: Cuda, stream: Any, files: dict[Any, _File]) -> None:
    """Wait for what is under way on a stream, whatever became of it, and close what ran there."""
    with suppress(BackendError):
        cuda.activate()
        cuda.synchronize(stream)
    for file in files.values():
        file.close()


def _is_about_memory(error: Exception) -> bool:
    """Whether ONNX Runtime, or CUDA below it, found too little memory."""
    said = str(error).lower()
    return any(words in said for words in ("failed to allocate memory", "out of memory", "available memory"))


class CudaBackend(DeviceBackend):
    """ONNX Runtime on one GPU, with one stream for all its sessions."""

    name = NAME
    remedy = "ask for fewer images at once, or smaller ones"

    def _load(self) -> Any:
        module = import_onnxruntime("gpu")
        if PROVIDER not in module.get_available_providers():
            gpu, there = installed("onnxruntime-gpu"), place("onnxruntime-gpu")
            if gpu and there != place("onnxruntime"):
                raise BackendError(
                    f"{gpu} in {there} is hidden by {installed('onnxruntime')} in {place('onnxruntime')}, which comes "
                    "first on Python's path: change their order, or use an environment without it"
                )
            raise missing_extra("onnxruntime-gpu", "gpu", "the backend 'cuda'")
        if hasattr(module, "preload_dlls"):
            with redirect_stdout(io.StringIO()):  # it prints what is missing; the session will say what it needs
                module.preload_dlls()  # CUDA and cuDNN from their own packages
        return module

    def session(self, graph: GraphSpec, bundle: Bundle | None = None) -> CudaSession:
        """A plan that cannot be used is named in a warning, and the graph itself opened."""
        return CudaSession(graph, self, Limits.of_captures(graph, bundle), bundle)
