"""fp16 graphs on a processor, with fp16's rounding and overflow.

ONNX Runtime's and OpenVINO's CPU kernels compute an fp16 graph in float32 and drop the casts in between, so they give
finite numbers where a GPU overflows (microsoft/onnxruntime issue 8787). A graph in *simulated fp16* is the float32
reference with an explicit rounding of every value that is fp16: each node sums in float32 and stores fp16, as GPUs do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from dnp.engine.backends.onnxruntime.session import OrtSession, cpu_settings, import_onnxruntime
from dnp.engine.backends.session import Backend, BackendOptions, Session
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.tensors import TensorSpec
from dnp.export.fp16.float32 import HALF, SINGLE, half_values, widen
from dnp.export.passes.attention import read_model
from dnp.export.passes.onnx_file import write_model


def simulated_graph(graph: GraphSpec, folder: Path) -> GraphSpec:
    """Write an fp16 graph in simulated fp16 into ``folder``, with float32 inputs and outputs; ``graph`` itself when it
    has no fp16 value.
    """
    model = read_model(graph.path)
    names = half_values(model)
    if not names:
        return graph
    names += [str(value.name) for value in model.graph.inputs if value.dtype == HALF]
    widen(model)
    round_values(model, names)
    return write_reference(model, graph, folder / f"{graph.name}-simulated.onnx")


@contextmanager
def open_simulated(graph: GraphSpec) -> Iterator[Session]:
    """A session of ``graph`` on the processor, an fp16 graph in simulated fp16, in little memory.

    Its file lies beside the graph meanwhile, so that both have the same weights beside them; they are read as nodes
    ask for them, which takes longer than to hold them as ONNX Runtime would lay them out, in float32.
    """
    simulated = simulated_graph(graph, graph.path.parent)
    options = BackendOptions()
    ort = import_onnxruntime()
    settings = cpu_settings(ort, options)
    if simulated is not graph:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        with OrtSession(simulated, options, settings=settings) as session:
            yield session
    finally:
        if simulated is not graph:
            simulated.path.unlink()


def write_reference(model: ir.Model, graph: GraphSpec, path: Path) -> GraphSpec:
    """Write ``model``, made of ``graph`` with float32 in the place of fp16, to ``path``."""
    write_model(model, path)
    return replace(graph, path=path, inputs=_wide(graph.inputs), outputs=_wide(graph.outputs))


def round_values(model: ir.Model, names: list[str]) -> None:
    """Have whoever takes one of the named float32 values take it rounded to fp16; outputs of the graph too."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    values |= {value.name: value for value in model.graph.inputs}
    for name in names:
        value = values[name]
        to_half = ir.node("Cast", [value], {"to": HALF}, name=f"{name}.round")
        back = ir.node("Cast", to_half.outputs, {"to": SINGLE}, name=f"{name}.back")
        (rounded,) = back.outputs
        rounded.type, rounded.shape = ir.TensorType(SINGLE), value.shape
        for user, index in list(value.uses()):
            if user is not to_half:
                user.replace_input_with(index, rounded)
        producer = value.producer()
        if producer is None:
            rounded.name = f"{name}.rounded"
            model.graph.insert_before(model.graph[0], [to_half, back])
            continue
        model.graph.insert_after(producer, [to_half, back])
        for index, output in enumerate(model.graph.outputs):
            if output is value:
                model.graph.outputs[index] = rounded
        value.name, rounded.name = f"{name}.exact", name


class SimulatedBackend(Backend):
    """Runs whole requests as a GPU would run the fp16 graphs of a bundle; the rounded graphs are put in ``folder``."""

    name = "cpu"

    def __init__(self, folder: Path, options: BackendOptions | None = None) -> None:
        super().__init__(options)
        self._folder = folder

    def session(self, graph: GraphSpec, bundle: Bundle | None = None) -> OrtSession:
        return OrtSession(simulated_graph(graph, self._folder), self.options)


def _wide(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {n: replace(t, dtype="float32") if t.dtype == "float16" else t for n, t in tensors.items()}
