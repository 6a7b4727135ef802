"""The ``cpu`` backend and its plans: what ONNX Runtime makes of a graph when it opens one, made once and kept.

Opening a graph, ONNX Runtime widens weights that are stored in fp16, fuses nodes, and lays the weights out as its
kernels want them: of some gigabytes of weights that takes long, and each process holds a copy of its own. A plan is
the outcome: the optimised graph, and beside it the weights as they are used, which the system maps into memory. It
computes bit for bit what the graph does.
"""

from __future__ import annotations

import logging
import math
import platform
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dnp.engine.backends.host import first_line
from dnp.engine.backends.onnxruntime.session import OrtSession, cpu_settings, import_onnxruntime
from dnp.engine.backends.session import Backend, BackendOptions
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.errors import BackendError, BundleError, OutputError
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
from dnp.engine.plans.store import PlanStore
from dnp.engine.system.background import in_background
from dnp.engine.system.processor import free_memory, processor_features, processor_name

_log = logging.getLogger("dnp.engine")
NAME: Final = "cpu"
_SMALL: Final = 1024  # bytes; smaller constants stay in the graph's own file
# What building takes for each byte of a graph whose weights are stored in fp16, as ours are, and what it takes besides.
_MEMORY, _DISK, _BESIDE = 3.5, 4.0, 100 << 20


class CpuBackend(Backend):
    """ONNX Runtime on the processor, from a plan where there is one; its sessions share nothing else."""

    name = NAME

    def session(self, graph: GraphSpec, bundle: Bundle | None = None) -> OrtSession:
        """A plan that cannot be used is named in a warning, and the graph itself opened."""
        if bundle is None:
            return OrtSession(graph, self.options)
        store = PlanStore(self.options.plans or bundle.path / FOLDER)
        plan, reason = store.find(plan_spec(bundle, graph))
        command = ["dnp", "build", str(bundle.path), "--backend", NAME]
        command += ["--plans", str(store.folder)] if self.options.plans else []
        if plan is not None:
            try:
                return OrtSession(graph, self.options, plan.path)
            except BundleError as error:  # the graph may do well: it needs no file that is mapped
                reason = f"{plan.path.name} does not open: {first_line(error.__cause__ or error)}"
                command += ["--force", "--graph", graph.name]
        if reason:
            _log.warning("%s: opened without its plan: %s; build it again: %s", graph.name, reason, shlex.join(command))
        return OrtSession(graph, self.options)


def plan_spec(bundle: Bundle, graph: GraphSpec) -> PlanSpec:
    """What the plan of ``graph`` is for this processor and the installed ONNX Runtime; it takes every size."""
    units = " ".join(processor_features())
    return PlanSpec(
        graph=graph.name,
        graph_sha256=bundle.graph_sha256(graph.name),
        backend=NAME,
        version=import_onnxruntime().__version__,
        architecture=f"{platform.machine()} {processor_name()} ({units})",
        precision=bundle.precision,
        profile={},
        flags={},
    )


def build_cpu_plans(
    bundle: Bundle,
    *,
    graphs: Sequence[str] = (),
    folder: Path | None = None,
    force: bool = False,
    report: BuildMessageCallback | None = None,
    progress: BuildProgressCallback | None = None,
) -> list[Plan]:
    """A plan for each of the bundle's graphs, or those named, unless there is one already.

    Args:
        folder: where plans are kept; ``plans/`` in the bundle when ``None``.
        force: build also where there is a plan.

    Raises:
        BackendError: ONNX Runtime is not there, or the system does not tell what the processor can do: weights that are
            laid out for one processor may crash another.
        BundleError: a graph is not in the bundle, or none that ONNX Runtime can load.
        OutputError: the folder cannot be written, or its disk is full.
        Cancelled: ``progress`` returned ``False``. Plans that were complete by then are kept, and none is half.
    """
    store = PlanStore(folder or bundle.path / FOLDER)
    if not processor_features():
        raise BackendError(
            f"this system ({platform.system()}) does not tell what its processor can do, and a plan that was made for "
            "one may crash another: the backend 'cpu' opens the graphs themselves here, without plans"
        )

    def obtain(graph: GraphSpec) -> Plan:
        spec = plan_spec(bundle, graph)
        return store.obtain(
            spec,
            lambda: _build(graph, spec, store, progress),
            needs=lambda: _needs(graph, store.folder),
            force=force,
            report=report,
            progress=progress,
        )

    return [obtain(graph) for graph in bundle.chosen(graphs)]


def _build(graph: GraphSpec, spec: PlanSpec, store: PlanStore, progress: BuildProgressCallback | None) -> Plan:
    ort = import_onnxruntime()
    started = time.perf_counter()

    def tick() -> None:
        tell(progress, BuildProgress(graph.name, "optimising", 0, 1, time.perf_counter() - started))

    with store.room(spec) as (path, weights):
        settings = cpu_settings(ort, BackendOptions())
        settings.optimized_model_filepath = str(path)
        for entry, value in (
            ("optimized_model_external_initializers_file_name", weights.name),
            ("optimized_model_external_initializers_min_size_in_bytes", str(_SMALL)),
            ("save_external_prepacked_constant_initializers", "1"),
        ):
            settings.add_session_config_entry(f"session.{entry}", value)

        def work() -> None:
            try:
                OrtSession(graph, BackendOptions(), settings=settings).close()
                OrtSession(graph, BackendOptions(), path).close()  # what cannot be opened again must not be kept
            except BundleError as error:
                # ONNX Runtime does not always name the file that it could not write.
                if str(path.parent) not in str(error) and _free_disk(store.folder) >= _DISK * graph.nbytes:
                    raise
                raise _unwritable(graph, store.folder, error) from error

        def cancel() -> None:
            settings.set_load_cancellation_flag(True)

        in_background(work, name=f"build-{graph.name}", tick=tick, cancel=cancel)
        size = weights.stat().st_size if weights.exists() else 0
        return store.take(spec, path, weights, {"weights_bytes": size, **cost(started)})


def _unwritable(graph: GraphSpec, folder: Path, error: BundleError) -> OutputError:
    """The error for a plan that ONNX Runtime could not write, or not read back."""
    free = _free_disk(folder)
    room = f"its disk has {free / 1e6:.0f} MB left: make room, or " if free < _DISK * graph.nbytes else ""
    said = first_line(error.__cause__ or error)
    return OutputError(f"the plan of {graph.name!r} cannot be kept in {folder}: {said}; {room}name another folder")


def _needs(graph: GraphSpec, folder: Path) -> str:
    """What building the plan will take, and what is there; in words."""
    memory, disk = _MEMORY * graph.nbytes + _BESIDE, _DISK * graph.nbytes
    less = " (less is free than that)"
    memory_less = less if free_memory() < memory else ""
    disk_less = less if _free_disk(folder) < disk else ""
    return (
        f"optimising {graph.nbytes / 1e6:.0f} MB, about {memory / 1e9:.1f} GB of memory{memory_less} "
        f"and {disk / 1e9:.2f} GB of disk{disk_less}"
    )


def _free_disk(folder: Path) -> float:
    """Bytes that can be written there; infinite where the system does not tell."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.inf
