"""One graph, from a torch module to a checked ONNX file: ``GraphExport`` in, ``GraphRecord`` out."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from dnp.engine.bundle.contract import Signature
from dnp.engine.bundle.manifest import GraphSpec, Parity, Ranges
from dnp.engine.errors import ExportError
from dnp.export.fp16.precision import Precision, in_precision
from dnp.export.fp16.simulation import open_simulated
from dnp.export.memory import PeakMemory
from dnp.export.passes import attention, resize
from dnp.export.passes.attention import fuse_attention
from dnp.export.passes.onnx_file import file_statistics, save_graph, write_model
from dnp.export.passes.shapes import settle_shapes

Array = npt.NDArray[Any]
Dims = Mapping[str, int]
OPSET = 20  # from 23 on, scaled_dot_product_attention becomes the operator Attention, see docs/architecture.md


@dataclass(frozen=True)
class GraphExport:
    """Everything needed to export one graph and to check it.

    Attributes:
        name: the graph's name in the bundle; its file is ``graphs/<name>.onnx``.
        module: called with the inputs by position, in the signature's order; returns one tensor, or a tuple
            in the order of the outputs. In evaluation mode, and float32 until ``write_graph`` puts it in ``precision``.
        signature: the tensors by name, from ``contract.signatures``. Symbols in input shapes become the graph's
            dynamic axes.
        fresh_inputs: makes random inputs for given sizes, numpy arrays of the declared dtypes and shapes.
        example: the sizes to trace with. No symbol may be 1 here, torch takes a 1 for a constant.
        checks: the sizes at which the file is compared with PyTorch; at least one differs from ``example``.
        bounds: the largest error allowed, per output: absolute for integers; for floats relative to the
            largest value that PyTorch gives, or to 1 if that is larger.
        precision: the arithmetic of the graph.
        reference: what outputs are compared with, when not ``module``; float32.
        multiples: symbols that only take multiples of a number, such as ``{"height": 4}``.
        traced: the smallest and largest size to promise torch for a symbol, where code branches on it without need.
            It is no limit of the graph: ONNX holds no such assertion.
    """

    name: str
    module: nn.Module
    signature: Signature
    fresh_inputs: Callable[[np.random.Generator, Dims], dict[str, Array]]
    example: Dims
    checks: Sequence[Dims]
    bounds: Mapping[str, float]
    precision: Precision = "fp32"
    reference: nn.Module | None = None
    multiples: Mapping[str, int] = field(default_factory=dict)
    traced: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphRecord:
    """What became of one graph: its manifest entry and what making it cost.

    Attributes:
        manifest: the graph's entry in ``bundle.json``.
        parity: the largest difference from PyTorch, and the bound it was held to, per output.
        nodes: nodes in the ONNX graph.
        bytes: size on disk, external data included.
        seconds: for export, saving and comparison.
        peak_memory: the process's largest resident size meanwhile, in bytes.
        ranges: what whole requests needed of fp16's range, where that was checked.
    """

    name: str
    manifest: dict[str, Any]
    parity: dict[str, Parity]
    nodes: int
    bytes: int
    seconds: float
    peak_memory: int
    ranges: Ranges | None = None


def export_graph(spec: GraphExport, folder: Path) -> GraphRecord:
    """Export ``spec`` to ``folder/graphs/<name>.onnx`` and compare the file with PyTorch.

    Raises ExportError when torch cannot export the module, or when an output differs by more than its bound.
    """
    return finish_graph(expect(spec), folder, write_graph(spec, folder))


@dataclass(frozen=True)
class WrittenGraph:
    """A graph's file in plain nodes, compared with nothing yet: its manifest entry so far, and what writing it cost."""

    manifest: dict[str, Any]
    seconds: float
    peak_memory: int


def write_graph(spec: GraphExport, folder: Path) -> WrittenGraph:
    """The first half of ``export_graph``: the file in plain nodes, which is compared with nothing yet.

    The module is used up: it is put in the graph's precision, and left without weights.
    """
    started = time.perf_counter()
    file = f"graphs/{spec.name}.onnx"
    with PeakMemory() as memory:
        in_precision(spec.module, spec.precision)
        program = _trace(spec)
        settle_shapes(program.model)
        shapes = {
            name: tensor.shape for name, tensor in [*spec.signature.inputs.items(), *spec.signature.outputs.items()]
        }
        save_graph(program.model, folder / file, shapes)
        # torch's exporter keeps the module's graph and weights, so they are emptied: the next model needs the room.
        for value in program.model.graph.initializers.values():
            value.const_value = None
        for weight in spec.module.parameters():
            weight.data = weight.new_empty(0)
    manifest = {
        "file": file,
        "inputs": {name: tensor.to_dict() for name, tensor in spec.signature.inputs.items()},
        "outputs": {name: tensor.to_dict() for name, tensor in spec.signature.outputs.items()},
    }
    return WrittenGraph(manifest, time.perf_counter() - started, memory.peak)


@dataclass(frozen=True)
class Case:
    """One comparison: sizes, the inputs of a graph, and the outputs that PyTorch gives for them."""

    dims: Dims
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Expected:
    """What a graph is held to, without the modules that it comes from: so their memory can be given back before."""

    name: str
    signature: Signature
    bounds: Mapping[str, float]
    cases: Sequence[Case]


def expect(spec: GraphExport) -> Expected:
    """What PyTorch computes for each of ``spec.checks``, in float32."""
    reference = spec.module if spec.reference is None else spec.reference
    rng, cases = np.random.default_rng(1), []
    for dims in spec.checks:
        arrays = spec.fresh_inputs(rng, dims)
        _check_inputs(spec, arrays, dims)
        with torch.inference_mode():
            result = reference(*(_wide(arrays[name]) for name in spec.signature.inputs))
        tensors = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        outputs = {name: one.numpy() for name, one in zip(spec.signature.outputs, tensors, strict=True)}
        cases.append(Case(dims, arrays, outputs))
    return Expected(spec.name, spec.signature, spec.bounds, cases)


def finish_graph(expected: Expected, folder: Path, written: WrittenGraph) -> GraphRecord:
    """The second half of ``export_graph``, which may come later: fuse attention in the file, as it is by then, and
    compare it with what PyTorch computed.
    """
    started = time.perf_counter()
    path = folder / written.manifest["file"]
    with PeakMemory() as memory:
        _fuse(path)
        parity = _compare(expected, path)
    for name, found in parity.items():
        if not found.max_abs_error <= found.bound:  # also when the error is NaN
            raise ExportError(
                f"graph {expected.name!r} differs from PyTorch: output {name!r} by {found.max_abs_error:.3g}, allowed "
                f"is {found.bound:.3g}. If this is precision fp16, export fp32: the model may need it"
            )
    manifest = {**written.manifest, "parity": {name: asdict(found) for name, found in parity.items()}}
    nodes, size = file_statistics(path)
    seconds = written.seconds + time.perf_counter() - started
    return GraphRecord(expected.name, manifest, parity, nodes, size, seconds, max(written.peak_memory, memory.peak))


def _fuse(path: Path) -> None:
    model = ir.load(path)
    if fuse_attention(model):
        write_model(model, path)


def _trace(spec: GraphExport) -> torch.onnx.ONNXProgram:
    arrays = spec.fresh_inputs(np.random.default_rng(0), spec.example)
    _check_inputs(spec, arrays, spec.example)
    dims: dict[str, Any] = {}
    for symbol in dict.fromkeys(s for tensor in spec.signature.inputs.values() for s in tensor.symbols):
        multiple = spec.multiples.get(symbol, 1)
        least, largest = spec.traced.get(symbol, (1, 1 << 16))
        if multiple > 1:
            dims[symbol] = multiple * torch.export.Dim(f"{symbol}_{multiple}", min=1, max=largest // multiple)
        else:
            dims[symbol] = torch.export.Dim(symbol, min=least, max=largest)
    dynamic = tuple(
        {axis: dims[entry] for axis, entry in enumerate(tensor.shape) if isinstance(entry, str)}
        for tensor in spec.signature.inputs.values()
    )
    try:
        with torch.inference_mode(), _quiet():
            program = torch.onnx.export(
                spec.module,
                tuple(torch.from_numpy(arrays[name]) for name in spec.signature.inputs),
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=list(spec.signature.inputs),
                output_names=list(spec.signature.outputs),
                opset_version=OPSET,
                custom_translation_table={**attention.translations(), **resize.translations()},
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"torch could not export graph {spec.name!r}: {error}") from error
    assert program is not None
    return program


def _compare(expected: Expected, path: Path) -> dict[str, Parity]:
    """The largest absolute error of each output over all cases; NaN where any value is NaN.

    An fp16 graph is compared in simulated fp16: the ``cpu`` backend itself would hide what overflows.
    """
    outputs = expected.signature.outputs
    errors, largest = dict.fromkeys(outputs, 0.0), dict.fromkeys(outputs, 1.0)
    graph = GraphSpec(expected.name, path, *expected.signature)
    with open_simulated(graph) as session:
        for case in expected.cases:
            session.reshape(**case.dims)
            for name, array in case.inputs.items():
                session.inputs[name].write(array.astype(session.inputs[name].dtype, copy=False))
            session.run()
            for name, want in case.outputs.items():
                got = session.outputs[name].read()
                # np.maximum keeps a NaN, max() may lose it
                error = np.max(np.abs(got.astype(np.float64) - want.astype(np.float64)), initial=0.0)
                errors[name] = float(np.maximum(errors[name], error))
                if want.dtype.kind == "f":
                    largest[name] = max(largest[name], float(np.abs(want).max()))
    return {name: Parity(errors[name], expected.bounds[name] * largest[name]) for name in outputs}


def _wide(array: Array) -> torch.Tensor:
    """An input as the float32 reference takes it: key/value caches in float32, too."""
    tensor = torch.from_numpy(array)
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _check_inputs(spec: GraphExport, arrays: Mapping[str, Array], dims: Dims) -> None:
    declared = {name: (tensor.resolve(dims), tensor.dtype) for name, tensor in spec.signature.inputs.items()}
    made = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    if made != declared:
        raise ValueError(f"{spec.name}: fresh_inputs gives {made}, declared are {declared}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's own exporter says and its caller can do nothing about."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # "torchvision is not installed": none of its operators are used
    try:
        with warnings.catch_warnings():
            # torch copies its own tree specifications in a way that it deprecates.
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
            # An axis that several inputs share is named once for each of them.
            warnings.filterwarnings("ignore", message="# The axis name: .* will not be used")
            yield
    finally:
        registration.setLevel(level)
