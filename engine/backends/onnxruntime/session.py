"""Sessions on ONNX Runtime's CPU provider, bound to our buffers; the backend itself is in ``cpu.py``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dnp.engine.backends.host import HostSession, check_signature, first_line
from dnp.engine.backends.session import Array, BackendOptions
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.schema import REMEDY
from dnp.engine.errors import BackendError, BundleError
from dnp.engine.system.imports import load
from dnp.engine.system.processor import core_count

if TYPE_CHECKING:
    import onnxruntime

PROVIDER: Final = "CPUExecutionProvider"
PRECISIONS: Final = ("f32",)
FATAL: Final = 4  # log nothing less: an error comes back as an exception, once
_DTYPES: Final = {"tensor(float)": "float32"}  # the others have numpy's names


def import_onnxruntime(extra: str = "cpu") -> Any:
    """The onnxruntime module. Raises BackendError with the line that installs it, or that repairs it."""
    purpose = "the backend 'cpu'" if extra == "cpu" else "the backend 'cuda'"
    package = "onnxruntime" if extra == "cpu" else "onnxruntime-gpu"
    module = load("onnxruntime", package=package, extra=extra, purpose=purpose, has="InferenceSession")
    module.disable_telemetry_events()  # for a caller who imported it before this package
    module.set_default_logger_severity(FATAL)  # which is not the sessions' own, and writes to stderr by itself
    return module


class OrtSession(HostSession):
    """A graph on ONNX Runtime's CPU provider, with IO binding: a run allocates no input or output.

    ``plan`` is the graph as ONNX Runtime optimised it before, and taken as it is. ``settings`` are the library's, those
    of ``cpu_settings`` when ``None``.
    """

    def __init__(
        self, graph: GraphSpec, options: BackendOptions, plan: Path | None = None, settings: Any = None
    ) -> None:
        ort = import_onnxruntime()
        if options.precision not in (None, *PRECISIONS):
            other = ", or use the backend 'openvino'" if options.precision == "bf16" else ""
            raise BackendError(
                f"the backend 'cpu' has no precision {options.precision!r}; known: {', '.join(PRECISIONS)}{other}"
            )
        if settings is None:
            settings = cpu_settings(ort, options)
        if plan is not None:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        path = plan or graph.path
        try:
            self._session: onnxruntime.InferenceSession = ort.InferenceSession(
                str(path), settings, providers=[PROVIDER]
            )
        except Exception as error:
            if type(error).__name__ == "NotImplemented":
                raise BackendError(
                    f"{path}: ONNX Runtime {ort.__version__} lacks an operator: {first_line(error)}"
                ) from error
            raise BundleError(f"{path}: no graph that ONNX Runtime can load: {first_line(error)}; {REMEDY}") from error
        running = self._session.get_providers()
        if running != [PROVIDER]:
            raise BackendError(f"ONNX Runtime was asked for {PROVIDER} and runs {', '.join(running)}")
        check_session(graph, self._session)
        self._value = ort.OrtValue.ortvalue_from_numpy
        self._binding = self._session.io_binding()
        details = f"{running[0]}, f32, threads: {settings.intra_op_num_threads}{', plan' if plan else ''}"
        super().__init__(graph, f"cpu (ONNX Runtime {ort.__version__}, {details})")

    def _bind(self, name: str, array: Array, is_input: bool) -> None:
        bind = self._binding.bind_ortvalue_input if is_input else self._binding.bind_ortvalue_output
        bind(name, self._value(array))

    def _execute(self) -> None:
        # An output whose shape is not the bound one is an error in ONNX Runtime itself.
        self._session.run_with_iobinding(self._binding)

    def _release(self) -> None:
        del self._binding, self._session


def check_session(graph: GraphSpec, session: onnxruntime.InferenceSession) -> None:
    """``check_signature`` for what ONNX Runtime found in the file, on whichever provider."""
    sides = {"inputs": session.get_inputs(), "outputs": session.get_outputs()}
    found = {side: {v.name: (_dtype(v.type), tuple(v.shape)) for v in values} for side, values in sides.items()}
    check_signature(graph, found)


def cpu_settings(ort: Any, options: BackendOptions) -> Any:
    """ONNX Runtime's session options for the processor."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads or core_count()
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = FATAL
    # A plan of where each tensor lies, made for each shape, takes as much memory again as tensors that are placed as
    # they come, and no less time.
    settings.enable_mem_pattern = False
    # Threads that wait by spinning take the cores from the next graph, and from everyone else. On free cores a
    # step takes as long without; on cores shared with other work, spinning took up to 5 times as long.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return settings


def _dtype(name: str) -> str:
    """ONNX Runtime's ``tensor(uint8)`` as numpy's ``uint8``."""
    return _DTYPES.get(name, name.removeprefix("tensor(").removesuffix(")"))
