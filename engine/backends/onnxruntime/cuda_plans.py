"""Plans of the backend ``cuda``: graphs rewritten for the kernels that ONNX Runtime has on CUDA, made on any machine.

A plan is for one image size, and takes every batch. Making one computes nothing and needs no GPU, but ``onnx-ir``; the
passes are in ``passes/``. It lies in an ONNX file, with the weights beside it, which plans for other sizes share.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from dnp.engine.backends.onnxruntime.passes import BEAMS
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.bundle.contract import symbols
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.tensors import TensorSpec
from dnp.engine.errors import OutputError, SettingsError
from dnp.engine.plans.plan import (
    FOLDER,
    BuildMessageCallback,
    BuildProgress,
    BuildProgressCallback,
    Plan,
    PlanSpec,
    cost,
    tell,
)
from dnp.engine.plans.profile import Range, asked_for, default_profile, to_dict
from dnp.engine.plans.store import PlanStore
from dnp.engine.system.imports import load
from dnp.engine.system.processor import free_memory

NAME: Final = "cuda"
REVISION: Final = 2  # of the passes: raised whenever they make another graph of the same one
SIZES: Final = ("height", "width", "image_height", "image_width", "windows")  # what `dnp build` can be asked for here
_SMALL: Final = 1024  # bytes; smaller constants stay in the graph's own file
_MEMORY, _BESIDE = 2.5, 300 << 20  # bytes that making a plan takes for each byte of the graph, and besides


def plan_spec(bundle: Bundle, graph: GraphSpec, sizes: Mapping[str, int]) -> PlanSpec:
    """What a plan is that has these sizes fixed, and takes all others."""
    return PlanSpec(
        graph=graph.name,
        graph_sha256=bundle.graph_sha256(graph.name),
        backend=NAME,
        version=f"revision {REVISION}",
        architecture="every GPU",
        precision=bundle.precision,
        profile=to_dict({symbol: Range(size, size, size) for symbol, size in sizes.items()}),
        flags={},
    )


def fixed_sizes(bundle: Bundle, graph: GraphSpec, ranges: Mapping[str, Range] | None = None) -> dict[str, int]:
    """The sizes that a plan of ``graph`` has fixed, by symbol: those of images; of the bundle's own unless asked for.

    Raises SettingsError for a range of them, or for one that cannot be had.
    """
    for name, asked in (ranges or {}).items():
        if name not in SIZES:
            raise SettingsError(f"a plan of the backend {NAME!r} takes every {name}; fixed are {', '.join(SIZES)}")
        if isinstance(asked, Range) and asked.low != asked.high:
            raise SettingsError(
                f"a plan of the backend {NAME!r} is for one image size, and {name} is {asked}; build one for each size"
            )
    profile = default_profile(bundle, graph, ranges)
    fixed = {symbol: range_.low for symbol, range_ in profile.items() if range_.low == range_.high}
    return {**fixed, BEAMS: 1} if BEAMS in with_beams(dict.fromkeys(graph.symbols, 1)) else fixed


def with_beams(dims: Mapping[str, int]) -> dict[str, int]:
    """The sizes, and how many sequences each image has, where there are any: a plan is for one, greedy search."""
    beams = {BEAMS: dims["sequences"] // dims["images"]} if {"sequences", "images"} <= set(dims) else {}
    return {**dims, **beams}


def at_sizes(graph: GraphSpec, sizes: Mapping[str, int]) -> GraphSpec:
    """The graph with these sizes fixed: what its plan takes and gives."""

    def fixed(tensor: TensorSpec) -> TensorSpec:
        known = [entry for entry in tensor.shape if set(TensorSpec((entry,)).symbols) <= set(sizes)]
        shape = (TensorSpec((entry,)).resolve(sizes)[0] if entry in known else entry for entry in tensor.shape)
        return replace(tensor, shape=tuple(shape))

    inputs = {name: fixed(tensor) for name, tensor in graph.inputs.items()}
    outputs = {name: fixed(tensor) for name, tensor in graph.outputs.items()}
    return replace(graph, inputs=inputs, outputs=outputs)


def plans_for(bundle: Bundle, graph: GraphSpec, store: PlanStore) -> dict[tuple[tuple[str, int], ...], PlanSpec]:
    """What plans of ``graph`` there are, by their fixed sizes, the newest first; not verified."""
    found: dict[tuple[tuple[str, int], ...], PlanSpec] = {}
    for plan in store.newest(graph.name, NAME):
        sizes = {symbol: numbers[0] for symbol, numbers in plan.spec.profile.items()}
        if plan.spec == plan_spec(bundle, graph, sizes):
            found.setdefault(tuple(sizes.items()), plan.spec)
    return found


def build_command(bundle: Bundle, graph: GraphSpec, dims: Mapping[str, int], folder: Path | None) -> str:
    """The ``dnp build`` that makes the plan for ``dims``."""
    words = ["dnp", "build", str(bundle.path), "--backend", NAME]
    words += ["--plans", str(folder)] if folder else []
    usual = fixed_sizes(bundle, graph)
    other = {
        name: Range(*[dims[name]] * 3) for name, size in usual.items() if name != BEAMS and dims.get(name, size) != size
    }
    for option, asked in asked_for(other, symbols(bundle)).items():
        words += [f"--{option.replace('_', '-')}", str(asked)]
    return shlex.join(words)


def build_cuda_plans(
    bundle: Bundle,
    *,
    graphs: Sequence[str] = (),
    ranges: Mapping[str, Range] | None = None,
    folder: Path | None = None,
    force: bool = False,
    report: BuildMessageCallback | None = None,
    progress: BuildProgressCallback | None = None,
) -> list[Plan]:
    """A plan for each of the bundle's graphs, or those named, unless there is one already.

    Args:
        ranges: the image size, as in ``default_profile``; the bundle's own when left out.
        folder: where plans are kept; ``plans/`` in the bundle when ``None``.
        force: build also where there is a plan.

    Raises:
        BackendError: ``onnx-ir`` is not installed.
        BundleError: a graph is not in the bundle, or does not hold together at this size.
        SettingsError: sizes that cannot be had.
        OutputError: the folder cannot be written.
        Cancelled: ``progress`` returned ``False``. Plans that were complete by then are kept, and none is half.
    """
    load("onnx_ir", "onnx", package="onnx-ir", extra="build", purpose=f"building plans of the backend {NAME!r}")
    store = PlanStore(folder or bundle.path / FOLDER)
    chosen = bundle.chosen(graphs)
    asked = [(graph, fixed_sizes(bundle, graph, ranges)) for graph in chosen]

    def obtain(graph: GraphSpec, sizes: Mapping[str, int]) -> Plan:
        spec = plan_spec(bundle, graph, sizes)
        return store.obtain(
            spec,
            lambda: _build(bundle, graph, sizes, store, progress),
            needs=lambda: _needs(graph),
            force=force,
            report=report,
            progress=progress,
        )

    return [obtain(graph, sizes) for graph, sizes in asked]


def _build(
    bundle: Bundle, graph: GraphSpec, sizes: Mapping[str, int], store: PlanStore, progress: BuildProgressCallback | None
) -> Plan:
    import onnx_ir as ir

    from dnp.engine.backends.onnxruntime.passes.plan import PASSES, rewrite

    started = time.perf_counter()

    def step(done: int, phase: str) -> None:
        tell(progress, BuildProgress(graph.name, phase, done, len(PASSES) + 2, time.perf_counter() - started))

    spec = plan_spec(bundle, graph, sizes)
    step(0, "fixing sizes")
    model = ir.load(graph.path)
    found = rewrite(model, sizes, step)
    step(len(PASSES) + 1, "writing")
    with store.room(spec) as (path, weights):
        try:
            ir.save(model, path, format="protobuf", external_data=weights.name, size_threshold_bytes=_SMALL)
            shared = _share(path, weights, store.weights_of(spec))
        except OSError as error:
            raise OutputError(
                f"the plan of {graph.name!r} cannot be kept in {store.folder}: {error.strerror or error}; name "
                "another folder"
            ) from error
        file = shared or weights
        statistics = {"weights_bytes": file.stat().st_size if file.exists() else 0, "rewritten": found, **cost(started)}
        return store.take(spec, path, weights, statistics, shared)


def _share(path: Path, weights: Path, there: Sequence[Path]) -> Path | None:
    """Have the plan in ``path`` use the weights of a plan for another size, where they are the same as its own."""
    import onnx

    for other in there:
        if weights.exists() and other.stat().st_size == weights.stat().st_size and _same(other, weights):
            model = onnx.load(path, load_external_data=False)
            for tensor in model.graph.initializer:
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = other.name
            onnx.save(model, path, format="protobuf")
            return other
    return None


def _same(one: Path, other: Path, block: int = 16 << 20) -> bool:
    """Whether two files of one size hold the same."""
    with one.open("rb") as first, other.open("rb") as second:
        while chunk := first.read(block):
            if chunk != second.read(block):
                return False
    return True


def _needs(graph: GraphSpec) -> str:
    """What making the plan will take, and what is there; in words."""
    memory = _MEMORY * graph.nbytes + _BESIDE
    less = " (less is free than that)" if free_memory() < memory else ""
    return f"rewriting {graph.nbytes / 1e6:.0f} MB, about {memory / 1e9:.1f} GB of memory{less}"
