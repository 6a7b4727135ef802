"""What is written to disk: a graph without its history, weights as small as they can be without loss."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dnp.engine.errors import ExportError

EXTERNAL_ABOVE = 1 << 30  # bytes of weights; protobuf itself ends at 2 GiB
COMPACT_FROM = 64  # elements; below, the Cast node takes more room than it saves

_log = logging.getLogger(__name__)


def save_graph(model: ir.Model, path: Path, shapes: Mapping[str, tuple[int | str, ...]]) -> None:
    """Compact the weights of ``model`` and write it to ``path``.

    ``shapes`` gives the inputs and outputs the symbols that the manifest uses. Weights beyond 1 GiB go beside
    it, to ``<name>.onnx.data``. The model is changed in place.
    """
    if model.functions:
        raise ExportError(f"{path.name}: not every function was inlined: {[str(f) for f in model.functions]}")
    compact(model)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.name is None or value.name not in shapes:
            raise ExportError(f"{path.name}: unexpected input or output {value.name!r}")
        value.shape = ir.Shape(shapes[value.name])
    if any(node.op_type == "Attention" for node in model.graph.all_nodes()):
        raise ExportError(f"{path.name}: attention was not translated")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_model(model, path)
    _log.debug("%s: %d nodes, %d bytes", path, *file_statistics(path))


def write_model(model: ir.Model, path: Path) -> None:
    """Clean ``model`` and write it to ``path``, weights beyond 1 GiB beside it; those that lie there already stay."""
    clean(model)
    beside = any(isinstance(t, ir.ExternalTensor) and Path(t.path).parent == path.parent for t in _weights(model))
    weights = sum(tensor.nbytes for tensor in _weights(model))
    external = f"{path.name}.data" if weights > EXTERNAL_ABOVE and not beside else None
    ir.save(model, path, external_data=external)


def file_statistics(path: Path) -> tuple[int, int]:
    """The nodes of the graph at ``path``, and the bytes on disk, weights beside it included."""
    beside = path.with_name(f"{path.name}.data")
    size = path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)
    return sum(1 for _ in ir.load(path).graph.all_nodes()), size


def clean(model: ir.Model) -> None:
    """Drop what tells of the machine and source behind the graph, and shapes that readers infer anyway."""
    model.producer_name, model.producer_version, model.domain = "dnp-engine", None, None
    model.doc_string = model.graph.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    ends = {id(value) for value in [*model.graph.inputs, *model.graph.outputs]}
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        _forget(value, keep_type=id(value) in ends)  # a weight knows its own type
    for node in model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            _forget(value, keep_type=id(value) in ends)


def compact(model: ir.Model) -> None:
    """Store a float32 weight that fp16 holds exactly as fp16 and a ``Cast`` back, which engines fold."""
    casts = []
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < COMPACT_FROM:
            continue
        exact = tensor.numpy()
        with np.errstate(over="ignore"):
            half = exact.astype(np.float16)
        if not np.array_equal(half, exact):
            continue
        stored = ir.Value(
            name=f"{name}.fp16",
            shape=ir.Shape(exact.shape),
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.tensor(half, name=f"{name}.fp16"),
        )
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=f"{name}.cast")
        value.replace_all_uses_with(cast.outputs[0])
        del model.graph.initializers[name]
        model.graph.register_initializer(stored)
        cast.outputs[0].name = name
        casts.append(cast)
    if casts:
        model.graph.insert_before(model.graph[0], casts)


def _weights(model: ir.Model) -> list[ir.TensorProtocol]:
    return [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]


def _forget(value: ir.Value, *, keep_type: bool) -> None:
    value.doc_string = None
    value.metadata_props.clear()
    if not keep_type:
        value.type = value.shape = None
