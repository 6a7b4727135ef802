"""The ``openvino`` backend: OpenVINO's CPU plugin on our buffers, in a precision that is always stated.

Left to itself, OpenVINO computes in bf16 wherever the processor can, and says nothing about it.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from dnp.engine.backends.host import HostSession, check_signature, first_line
from dnp.engine.backends.session import Array, Backend, BackendOptions
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.schema import REMEDY, nearest
from dnp.engine.errors import BackendError, BundleError
from dnp.engine.system.imports import install_line, load
from dnp.engine.system.processor import core_count, processor_name

if TYPE_CHECKING:
    import openvino

    from dnp.engine.bundle.bundle import Bundle

DEVICE: Final = "CPU"
PRECISIONS: Final = ("f32", "bf16")
# What the versions before 2026.1, and those since, say of operators that they do not know.
_LACKING: Final = re.compile(r"(?:following ONNX operations|conversion rule found for operations): *(\S.*)")


def import_openvino() -> Any:
    """The openvino module. Raises BackendError with the line that installs it, or that repairs it."""
    return load("openvino", "openvino.frontend", package="openvino", extra="openvino", purpose="the backend 'openvino'")


@cache
def _core() -> Any:
    """One core for the process, never freed.

    Each loads the CPU plugin anew, which installs an alternative signal stack and, when the core goes, puts the one
    before it back: cores that are not freed in the reverse order leave a stack that is unmapped, and the next Ctrl-C is
    a segmentation fault.
    """
    return import_openvino().Core()


def precisions(core: Any) -> tuple[str, ...]:
    """The precisions that this processor computes in by itself, f32 first."""
    able = core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    return tuple(precision for precision in PRECISIONS if precision == "f32" or precision.upper() in able)


class OpenVinoSession(HostSession):
    """A graph on OpenVINO's CPU plugin, with its inputs and outputs set to our buffers."""

    def __init__(self, graph: GraphSpec, options: BackendOptions) -> None:
        ov = import_openvino()
        precision = "f32" if options.precision is None else options.precision
        if precision not in PRECISIONS:
            raise BackendError(
                f"the backend 'openvino' has no precision {precision!r}, {nearest(precision, PRECISIONS)}"
            )
        core = _core()
        if precision not in precisions(core):
            raise BackendError(f"this processor ({processor_name()}) has no {precision}; use f32")
        try:
            # The ONNX front end by itself: `read_model` tries every other one on a file that it cannot read.
            front_end = ov.frontend.FrontEndManager().load_by_framework("onnx")
            model = front_end.convert(front_end.load(str(graph.path)))
        except Exception as error:
            if lacking := _LACKING.search(str(error)):
                raise BackendError(
                    f"{graph.path}: OpenVINO {_version(ov)} lacks the operator {lacking[1]}; take 2026.3 or newer: "
                    f"{install_line('openvino')}"
                ) from error
            weights = graph.path.with_name(f"{graph.path.name}.data")
            if weights.is_symlink():
                raise BackendError(
                    f"{weights} is a link, which OpenVINO does not follow; copy the bundle with what its links lead to "
                    "(cp -rL), or use the backend 'cpu'"
                ) from error
            raise BundleError(
                f"{graph.path}: no graph that OpenVINO can load: {first_line(error)}; {REMEDY}"
            ) from error
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": options.threads or core_count(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            compiled: openvino.CompiledModel = core.compile_model(model, DEVICE, settings)
        except Exception as error:
            raise BackendError(f"{graph.path}: OpenVINO cannot compile it: {first_line(error)}") from error
        devices = compiled.get_property("EXECUTION_DEVICES")
        runs_in = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        if devices != [DEVICE] or runs_in != precision:
            raise BackendError(
                f"OpenVINO was asked for {DEVICE} in {precision} and runs {', '.join(devices)} in {runs_in}"
            )
        check_signature(graph, {"inputs": _tensors(compiled.inputs), "outputs": _tensors(compiled.outputs)})
        self._tensor = ov.Tensor
        self._request = compiled.create_infer_request()
        self._results: dict[str, Any] = {}
        super().__init__(graph, f"openvino (OpenVINO {_version(ov)}, {devices[0]}, {runs_in}, threads: {threads})")

    def _bind(self, name: str, array: Array, is_input: bool) -> None:
        tensor = self._tensor(array, shared_memory=True)
        self._request.set_tensor(name, tensor)
        if not is_input:
            self._results[name] = tensor

    def _execute(self) -> None:
        self._request.start_async()  # `infer` would copy every output once more
        self._request.wait()
        # OpenVINO shrinks an output tensor that is too large for the result, where others raise an error.
        for name, tensor in self._results.items():
            if tuple(tensor.shape) != self._outputs[name].shape:
                raise RuntimeError(
                    f"output {name!r} has shape {list(tensor.shape)}, not {list(self._outputs[name].shape)}"
                )

    def _release(self) -> None:
        self._results.clear()
        del self._request


class OpenVinoBackend(Backend):
    """OpenVINO on the processor; its sessions share one core."""

    name = "openvino"

    def session(self, graph: GraphSpec, bundle: Bundle | None = None) -> OpenVinoSession:
        return OpenVinoSession(graph, self.options)


def _version(ov: Any) -> str:
    return str(ov.get_version().split("-")[0])


def _tensors(ports: Any) -> dict[str, tuple[str, tuple[Any, ...]]]:
    return {
        port.any_name: (
            str(port.element_type.to_dtype()),
            tuple(None if d.is_dynamic else d.get_length() for d in port.partial_shape),
        )
        for port in ports
    }
