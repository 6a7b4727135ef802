"""Which plans TensorRT is asked for: for what GPUs, sizes and settings. ``compiler.py`` makes them.

One module for both products.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from dnp.engine.bundle.bundle import Bundle
from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.errors import BackendError
from dnp.engine.plans.compiler import REVISION, compile_plan
from dnp.engine.plans.plan import FOLDER, BuildMessageCallback, BuildProgressCallback, Plan, PlanSpec
from dnp.engine.plans.product import PRODUCTS, Product, product_of
from dnp.engine.plans.profile import Profile, Range, buffer_bytes, default_profile, to_dict
from dnp.engine.plans.settings import BuildSettings, Target
from dnp.engine.plans.store import PlanStore
from dnp.engine.system import cuda
from dnp.engine.system.processor import free_memory

_MEMORY_PER_WEIGHT: Final = 3.6  # bytes a build takes for each byte of weights, and what it takes without any
_MEMORY_BESIDE: Final = 500 << 20


def target_for(product: Product, sm: Sequence[int] = (), device: int = 0) -> Target:
    """What to compile for: the architectures named, the present GPU's when none is.

    Raises BackendError when there is no GPU and none was named, when it is too old, or for what the product does not
    compile for.
    """
    module = product.load()
    if sm and not product.portable:
        raise BackendError(f"{product.title} compiles for the GPU that is present; --sm is for tensorrt-rtx")
    if sm:
        for number in sm:
            if number not in product.architectures:
                raise BackendError(f"{product.title} does not compile for SM {number}; {_known(product)}")
        return Target(product, module.__version__, tuple(sm), ",".join(f"sm{number}" for number in sorted(sm)))
    other = "; name the architectures to compile for, e.g. --sm 89,120" if product.portable else ""
    gpu = _require_gpu(device, f"{product.title} compiles for the GPU that is present", other)
    gpu.check_age()
    product.check_gpu(gpu)
    architecture = f"sm{gpu.sm}" if product.portable else f"sm{gpu.sm} {gpu.name}"
    return Target(product, module.__version__, (gpu.sm,) if product.portable else (), architecture, device)


def _require_gpu(device: int, why: str, otherwise: str = "") -> cuda.GpuProperties:
    """The GPU. Raises BackendError when there is none, with what it is for."""
    try:
        return cuda.open_cuda(device).properties(device)
    except BackendError as error:
        raise BackendError(f"{why}, but {error}{otherwise}") from error


def build_plans(
    bundle: Bundle,
    backend: str = "tensorrt-rtx",
    *,
    graphs: Sequence[str] = (),
    ranges: Mapping[str, Range] | None = None,
    settings: BuildSettings | None = None,
    folder: Path | None = None,
    force: bool = False,
    device: int = 0,
    report: BuildMessageCallback | None = None,
    progress: BuildProgressCallback | None = None,
) -> list[Plan]:
    """Compile a plan for each of the bundle's graphs, or those named, unless there is an equal one already.

    Opening a session takes the newest that fits the graph, the compiler and the GPU, see ``choice.py``.

    Args:
        ranges: see ``default_profile``.
        folder: where plans are kept; ``plans/`` in the bundle when ``None``.
        force: build also where there is a plan.
        report: told what is there already, and what is built and why.

    Raises:
        BackendError: the compiler is not there, or cannot compile a graph.
        SettingsError: ranges or settings that cannot be had.
        OutputError: the folder cannot be written.
        Cancelled: ``progress`` returned ``False``. Plans that were complete by then are kept, and none is half.
    """
    wanted = settings or BuildSettings()
    target = target_for(product_of(backend), wanted.sm, device)
    if wanted.refit:
        _require_gpu(device, "plans that can be refitted are built where the GPU is")
    store = PlanStore(folder or bundle.path / FOLDER)
    chosen = bundle.chosen(graphs)
    profiles = [default_profile(bundle, graph, ranges) for graph in chosen]
    plans = [
        obtain(bundle, graph, profile, wanted, target, store, force=force, report=report, progress=progress)
        for graph, profile in zip(chosen, profiles, strict=True)
    ]
    for plan in plans:
        newer = _opened_instead(plan, store)
        if newer is not None and report is not None:
            report(f"{plan.spec.graph}: {newer.path.name} is newer, and opened instead; --prune removes it")
    return plans


def _opened_instead(plan: Plan, store: PlanStore) -> Plan | None:
    """The plan of other sizes or settings that opening a session prefers to this one."""
    same = (
        other
        for other in store.newest(plan.spec.graph, plan.spec.backend)
        if replace(other.spec, profile=plan.spec.profile, flags=plan.spec.flags) == plan.spec
    )
    newest = next(same, plan)
    return None if newest.path == plan.path else newest


def settings_of(spec: PlanSpec) -> BuildSettings:
    """What a plan of TensorRT was built with. Raises SettingsError, ValueError or TypeError for other plans."""
    sm = spec.architecture.split(",") if PRODUCTS[spec.backend].portable else ()
    flags = {name: value for name, value in spec.flags.items() if name != "revision"}
    return BuildSettings(sm=tuple(int(name.removeprefix("sm")) for name in sm), **flags)


def build_command(
    bundle: Bundle, backend: str, settings: BuildSettings, folder: Path | None = None, device: int = 0
) -> str:
    """The ``dnp build`` that makes such plans, up to their sizes.

    ``folder`` is that of the plans where it is not the bundle's own.
    """
    words = ["dnp", "build", str(bundle.path), "--backend", backend]
    words += ["--plans", str(folder)] if folder else []
    words += ["--device", str(device)] if device else []
    words += ["--sm", ",".join(map(str, settings.sm))] if settings.sm else []
    words += [] if settings.optimization_level is None else ["--optimization-level", str(settings.optimization_level)]
    words += [] if settings.workspace is None else ["--workspace", str(math.ceil(settings.workspace / 1e6))]
    words += ["--weight-streaming"] * settings.weight_streaming + ["--refit"] * settings.refit
    return shlex.join(words)


def obtain(
    bundle: Bundle,
    graph: GraphSpec,
    profile: Profile,
    settings: BuildSettings,
    target: Target,
    store: PlanStore,
    *,
    force: bool = False,
    report: BuildMessageCallback | None = None,
    progress: BuildProgressCallback | None = None,
) -> Plan:
    """The plan in ``store``, verified, or a new one where there is none that can be used. Raises as ``build_plans``."""
    spec = PlanSpec(
        graph=graph.name,
        graph_sha256=bundle.graph_sha256(graph.name),
        backend=target.product.name,
        version=target.version,
        architecture=target.architecture,
        precision=bundle.precision,
        profile=to_dict(profile),
        flags={**settings.flags, "revision": REVISION},
    )

    def make() -> Plan:
        cache_file = store.folder / f".timing-{target.version}-{spec.architecture.replace(' ', '-')}.cache"
        timings = None if target.product.portable else cache_file
        data, statistics = compile_plan(graph, profile, settings, target, timings=timings, progress=progress)
        return store.write(spec, data, statistics)

    return store.obtain(
        spec, make, needs=lambda: memory_needed(graph, profile), force=force, report=report, progress=progress
    )


def memory_needed(graph: GraphSpec, profile: Profile) -> str:
    """What building a plan will take and running it, as far as that is known before, and what is there; in words."""
    weights = graph.nbytes
    need = _MEMORY_PER_WEIGHT * weights + _MEMORY_BESIDE
    warning = " (less is free than that)" if free_memory() < need else ""
    buffers = buffer_bytes(graph, profile)
    return (
        f"compiling {weights / 1e6:.0f} MB of weights, about {need / 1e9:.1f} GB of memory{warning}; "
        f"the GPU will hold the weights, {buffers / 1e6:.1f} MB of buffers, and activations, known when it is built"
    )


def _known(product: Product) -> str:
    return f"it knows {', '.join(map(str, product.architectures))}"
