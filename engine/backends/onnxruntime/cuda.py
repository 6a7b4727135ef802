"""The ``cuda`` backend: ONNX Runtime's CUDA provider on our buffers and our stream; no plans, no fixed sizes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from dnp.engine.backends.device import DeviceBackend, DeviceSession
from dnp.engine.backends.host import first_line
from dnp.engine.backends.onnxruntime.session import FATAL, check_session, import_onnxruntime
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.schema import REMEDY
from dnp.engine.errors import BackendError, BundleError
from dnp.engine.plans.limits import Limits
from dnp.engine.system.imports import missing_extra

if TYPE_CHECKING:
    from dnp.engine.bundle.bundle import Bundle

PROVIDER: Final = "CUDAExecutionProvider"
_NOT_RECORDED: Final = -1  # ONNX Runtime's number for "neither record nor replay this run"
_RUNS_TO_RECORD: Final = 2  # one as it comes, one that is recorded
_numbers = itertools.count(1)  # to record runs under, each once


class CudaSession(DeviceSession):
    """A graph on ONNX Runtime's CUDA provider.

    ONNX Runtime records a run under a number that it is given, and replays it when it meets the number again: sizes
    that were captured have one each, as long as no buffer moves.
    """

    def __init__(self, graph: GraphSpec, backend: CudaBackend, limits: Limits) -> None:
        ort, gpu = backend.module, backend.gpu
        options = ort.SessionOptions()
        options.log_severity_level = FATAL
        settings = {
            "device_id": str(backend.options.device),
            "user_compute_stream": str(int(gpu.stream)),
            "do_copy_in_default_stream": "1",
            "use_tf32": "0",
            "enable_cuda_graph": "0" if backend.options.eager else "1",
            "cudnn_conv_algo_search": "HEURISTIC",  # by measuring, two sessions may choose differently
            "arena_extend_strategy": "kSameAsRequested",
        }
        if gpu.left is not None:  # of each session's own pool; the buffers are ours, and counted by the device
            settings["gpu_mem_limit"] = str(gpu.left)
        gpu.hold(graph.nbytes, f"the weights of {graph.name!r}", "raise --memory-limit")
        try:
            self._open(ort, graph, options, settings)
            check_session(graph, self._session)
            super().__init__(graph, backend, f"ONNX Runtime {ort.__version__}, {PROVIDER}")
        except BaseException:
            gpu.release(graph.nbytes)
            raise
        self.limits = limits
        self._ort, self._number = ort, backend.options.device
        if self._refusal is not None:
            self._run_eagerly(self._refusal)
        self._numbers: dict[tuple[tuple[int, ...], ...], int] = {}
        self._binding = self._session.io_binding()

    def _open(self, ort: Any, graph: GraphSpec, options: Any, settings: dict[str, str]) -> None:
        self._refusal: str | None = None

        def attempt() -> None:
            self._session = ort.InferenceSession(str(graph.path), options, providers=[(PROVIDER, settings)])

        try:
            try:
                attempt()
            except Exception as refused:
                if _is_about_memory(refused):
                    raise
                self._refusal = first_line(refused)
                settings["enable_cuda_graph"] = "0"
                attempt()  # no session that records opens when a node has to run on the processor
        except Exception as error:
            if _is_about_memory(error):
                raise BackendError(
                    f"no memory on the GPU for the weights of {graph.name!r}: {first_line(error)}; raise "
                    "--memory-limit, or free what else is there"
                ) from error
            raise BundleError(
                f"{graph.path}: no graph that ONNX Runtime can load on CUDA: {first_line(error)}; {REMEDY}"
            ) from error
        running = self._session.get_providers()
        if running[:1] != [PROVIDER]:
            raise BackendError(
                f"ONNX Runtime was asked for {PROVIDER} and runs {', '.join(running)}; it needs CUDA 13 and cuDNN 9: "
                "pip install 'dnp-engine[gpu]'"
            )

    @property
    def captured(self) -> Sequence[Mapping[str, int]]:
        return [dict(zip(self.graph.symbols, sizes, strict=True)) for _, sizes, _ in self._numbers]

    def _capture(self) -> None:
        if self._state() in self._numbers:
            return
        self._numbers[self._state()] = next(_numbers)
        for _ in range(_RUNS_TO_RECORD):
            self.run()
        self._cuda.synchronize(self._gpu.stream)

    def run(self) -> None:
        """Starts the work and does not wait for it."""
        dims = self._require_dims()
        self._cuda.activate()
        self._check_inputs(dims)
        self._bind()
        how = self._ort.RunOptions()
        how.add_run_config_entry("disable_synchronize_execution_providers", "1")
        how.add_run_config_entry("gpu_graph_id", str(self._numbers.get(self._state(), _NOT_RECORDED)))
        try:
            self._session.run_with_iobinding(self._binding, how)
        except Exception as error:
            remedy = f"; {self._backend.remedy}" if _is_about_memory(error) else ""
            told = f"{self._where} failed on {self.backend} with {dims}: {first_line(error)}{remedy}"
            raise BackendError(told) from error
        self._start_feedback()

    def _bind(self) -> None:
        number = self._number
        for name, buffer in self._inputs.items():
            self._binding.bind_input(name, "cuda", number, buffer.dtype, list(buffer.shape), buffer.address)
        for name, buffer in self._outputs.items():
            self._binding.bind_output(name, "cuda", number, buffer.dtype, list(buffer.shape), buffer.address)

    def _state(self) -> tuple[tuple[int, ...], ...]:
        """What a recorded run depends on: the thread, which ONNX Runtime keeps it for, the sizes, and the addresses."""
        buffers = [*self._inputs.values(), *self._outputs.values()]
        sizes, addresses = tuple(self._require_dims().values()), tuple(buffer.address for buffer in buffers)
        return (threading.get_ident(),), sizes, addresses

    def _forget(self) -> None:
        self._numbers.clear()

    def _release(self) -> None:
        self._gpu.release(self.graph.nbytes)
        del self._binding, self._session


def _is_about_memory(error: Exception) -> bool:
    """Whether ONNX Runtime, or CUDA below it, found too little memory."""
    said = str(error).lower()
    return any(words in said for words in ("failed to allocate memory", "out of memory", "available memory"))


class CudaBackend(DeviceBackend):
    """ONNX Runtime on one GPU, with one stream for all its sessions."""

    name = "cuda"
    remedy = "ask for fewer images at once, or smaller ones"

    def _load(self) -> Any:
        module = import_onnxruntime("gpu")
        if PROVIDER not in module.get_available_providers():
            raise missing_extra("onnxruntime-gpu", "gpu", "the backend 'cuda'")
        if hasattr(module, "preload_dlls"):
            module.preload_dlls()  # CUDA and cuDNN from their own packages
        return module

    def session(self, graph: GraphSpec, bundle: Bundle | None = None) -> CudaSession:
        return CudaSession(graph, self, Limits.of_captures(graph, bundle))
