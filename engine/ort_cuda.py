"""The ``cuda`` backend: ONNX Runtime's CUDA provider on our buffers and our stream; no plans, no fixed sizes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from dnp.engine import cuda
from dnp.engine.device import Device, DeviceSession
from dnp.engine.errors import BackendError, BundleError, missing_extra
from dnp.engine.host import check_border, first_line
from dnp.engine.manifest import GraphSpec
from dnp.engine.ort import dtype_name, import_onnxruntime
from dnp.engine.profile import BATCH, ROWS
from dnp.engine.schema import REMEDY
from dnp.engine.session import Backend, BackendOptions

if TYPE_CHECKING:
    from dnp.engine.bundle import Bundle

_log = logging.getLogger("dnp.engine")
PROVIDER: Final = "CUDAExecutionProvider"
_NOT_RECORDED: Final = -1  # ONNX Runtime's number for "neither record nor replay this run"
_RUNS_TO_RECORD: Final = 2  # one as it comes, one that is recorded
_FATAL: Final = 4


class CudaSession(DeviceSession):
    """A graph on ONNX Runtime's CUDA provider.

    ONNX Runtime records a run under a number that it is given, and replays it when it meets the number again: sizes
    that were prepared have one each, as long as no buffer moves.
    """

    def __init__(self, graph: GraphSpec, backend: CudaBackend) -> None:
        ort, device = backend.module, backend.device
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        settings = {
            "device_id": str(backend.options.device),
            "user_compute_stream": str(int(device.stream)),
            "do_copy_in_default_stream": "1",
            "use_tf32": "0",
            "enable_cuda_graph": "0" if backend.eager else "1",
            "cudnn_conv_algo_search": "HEURISTIC",  # by measuring, two sessions may choose differently
            "arena_extend_strategy": "kSameAsRequested",
        }
        try:
            self._session = ort.InferenceSession(str(graph.path), options, providers=[(PROVIDER, settings)])
        except Exception as refused:
            try:  # it opens no session that records when a node has to run on the processor
                settings["enable_cuda_graph"] = "0"
                self._session = ort.InferenceSession(str(graph.path), options, providers=[(PROVIDER, settings)])
            except Exception as error:
                raise BundleError(
                    f"{graph.path}: no graph that ONNX Runtime can load on CUDA: {first_line(error)}; {REMEDY}"
                ) from error
            backend.without_recording(graph, first_line(refused))
        running = self._session.get_providers()
        if running[:1] != [PROVIDER]:
            raise BackendError(
                f"ONNX Runtime was asked for {PROVIDER} and runs {', '.join(running)}; it needs CUDA 13 and cuDNN 9: "
                "pip install 'dnp-engine[gpu]'"
            )
        sides = {"inputs": self._session.get_inputs(), "outputs": self._session.get_outputs()}
        check_border(
            graph,
            {side: {v.name: (dtype_name(v.type), tuple(v.shape)) for v in values} for side, values in sides.items()},
        )
        gpu = device.properties
        where = f"cuda (ONNX Runtime {ort.__version__}, {running[0]}, {gpu.name}, SM {gpu.sm}, {device.name})"
        super().__init__(graph, where, device)
        self._ort, self._backend = ort, backend
        self._numbers: dict[tuple[tuple[int, ...], ...], int] = {}
        self._binding = self._session.io_binding()

    def bucket(self, symbol: str, size: int) -> int:
        """See ``Session.bucket``: sampler tables of usual lengths are run at one length, or longer ones as they are."""
        usual = symbol in ("rows", "draws") and size <= ROWS and (symbol, size) != ("draws", 1)
        return ROWS if usual else size

    def prepare(self) -> None:
        """See ``Session.prepare``: have the run at the present sizes recorded."""
        self._require_dims()
        if self._backend.eager or self._state() in self._numbers:
            return
        self._numbers[self._state()] = self._backend.next_number()
        for _ in range(_RUNS_TO_RECORD):
            self.run()
        self._cuda.synchronize(self._device.stream)

    def run(self) -> None:
        """See ``Session.run``. Starts the work and does not wait for it."""
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
            raise BackendError(f"{self._where} failed on {self.backend} with {dims}: {first_line(error)}") from error
        self._start_carrying()

    def _bind(self) -> None:
        number = self._backend.options.device
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
        del self._binding, self._session


class CudaBackend(Backend):
    """ONNX Runtime on one GPU, with one stream for all its sessions."""

    name = "cuda"

    def __init__(self, options: BackendOptions) -> None:
        if options.precision is not None:
            raise BackendError(
                f"the backend 'cuda' computes in what the graph says, not in {options.precision!r}; export the "
                "model in the precision you want: dnp export --precision fp16"
            )
        if options.memory_limit is not None:
            raise BackendError("ONNX Runtime keeps memory of its own on a GPU; leave --memory-limit out with 'cuda'")
        self.options, self.eager = options, options.eager
        self.module: Any = import_onnxruntime("gpu")
        if PROVIDER not in self.module.get_available_providers():
            raise missing_extra("onnxruntime-gpu", "gpu", "the backend 'cuda'")
        if hasattr(self.module, "preload_dlls"):
            self.module.preload_dlls()  # CUDA and cuDNN from their own packages
        self.device = Device(cuda.open_cuda(options.device), options.device, options.memory_limit)
        self._last = 0

    def session(self, graph: GraphSpec, bundle: Bundle | None = None) -> CudaSession:
        """See ``Backend.session``."""
        return CudaSession(graph, self)

    @property
    def batches(self) -> Sequence[int]:  # type: ignore[override]
        """See ``Backend.batches``. From the largest, so that buffers have grown before anything is recorded."""
        return () if self.eager else range(BATCH, 0, -1)

    def without_recording(self, graph: GraphSpec, reason: str) -> None:
        """Run eagerly from now on, and say so once."""
        if not self.eager:
            self.eager = True
            _log.warning("graph %r: runs without CUDA graphs from now on: %s", graph.name, reason)

    def next_number(self) -> int:
        """A number for a run to be recorded under, never 0."""
        self._last += 1
        return self._last

    def close(self) -> None:
        """See ``Backend.close``."""
        self.device.close()
