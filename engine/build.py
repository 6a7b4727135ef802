"""From a graph to a plan: parse, profile, compile. One module for both flavours of TensorRT.

Networks are strongly typed: the arithmetic is what the ONNX file says, there is no precision flag. Weights are read
by the parser from the path, so graphs beyond 2 GB of weights are nothing special.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from dnp.engine import cuda
from dnp.engine.background import in_background
from dnp.engine.bundle import Bundle
from dnp.engine.errors import BackendError, BundleError, Cancelled, DnpError, OutputError, SettingsError
from dnp.engine.files import write_together
from dnp.engine.flavour import Flavour, flavour_of, listening, logger
from dnp.engine.manifest import GraphSpec
from dnp.engine.plan import FOLDER, BuildProgress, Plan, PlanSpec, Progress, Report, cost, tell
from dnp.engine.processor import free_memory
from dnp.engine.profile import Profile, Range, buffer_bytes, default_profile, from_dict, to_dict
from dnp.engine.schema import REMEDY, shown
from dnp.engine.store import PlanStore

_log = logging.getLogger("dnp.engine")
_FACTS: Final = {
    "activation_bytes": "Total Activation Memory:",
    "weights_bytes": "Total Weights Memory:",
    "scratch_bytes": "Max Scratch Memory:",
}
_MEMORY_PER_WEIGHT: Final = 3.6  # bytes a build takes for each byte of weights, and what it takes without any
_MEMORY_BESIDE: Final = 500 << 20


@dataclass(frozen=True)
class BuildSettings:
    """What the compiler is told. Raises SettingsError for what it would refuse.

    Attributes:
        sm: the architectures to compile for, as 89 for SM 8.9; the present GPU's when empty.
        optimization_level: 0 (fast build) to 5 (fast plan); the compiler's own choice when ``None``.
        workspace: bytes of scratch memory that a kernel may use; no limit when ``None``.
        weight_streaming: let weights stay in host memory where the GPU's does not hold them all.
        refit: let weights be exchanged without a build. It costs fusions, and needs a GPU to build.
    """

    sm: tuple[int, ...] = ()
    optimization_level: int | None = None
    workspace: int | None = None
    weight_streaming: bool = False
    refit: bool = False

    def __post_init__(self) -> None:
        level, workspace = self.optimization_level, self.workspace
        if level is not None and level not in range(6):
            raise SettingsError(f"the optimisation level must be a whole number from 0 to 5, not {shown(level)}")
        if workspace is not None and not (isinstance(workspace, int) and workspace > 0):
            raise SettingsError(f"the workspace limit must be a number of bytes, not {shown(workspace)}")
        if len(set(self.sm)) != len(self.sm):
            raise SettingsError(f"an architecture is named twice: {', '.join(map(str, self.sm))}")

    @property
    def flags(self) -> dict[str, Any]:
        """What changes a plan, apart from the architectures."""
        return {name: value for name, value in asdict(self).items() if name != "sm"}


@dataclass(frozen=True)
class Target:
    """What plans are compiled for: a flavour, its version, and the architectures."""

    flavour: Flavour
    version: str
    sm: tuple[int, ...]
    architecture: str
    device: int = 0


def target(flavour: Flavour, sm: Sequence[int] = (), device: int = 0) -> Target:
    """What to compile for: the architectures named, the present GPU's when none is.

    Raises BackendError when there is no GPU and none was named, when it is too old, or for what the flavour does not
    compile for.
    """
    module = flavour.load()
    if sm and not flavour.portable:
        raise BackendError(f"{flavour.title} compiles for the GPU that is present; --sm is for tensorrt-rtx")
    if sm:
        for number in sm:
            if number not in flavour.architectures:
                raise BackendError(f"{flavour.title} does not compile for SM {number}; {_known(flavour)}")
        return Target(flavour, module.__version__, tuple(sm), ",".join(f"sm{number}" for number in sorted(sm)))
    try:
        gpu = cuda.open_cuda(device).properties(device)
    except BackendError as error:
        other = "; name the architectures to compile for, e.g. --sm 89,120" if flavour.portable else ""
        raise BackendError(f"{flavour.title} compiles for the GPU that is present, but {error}{other}") from error
    gpu.check_age()
    if flavour.portable and gpu.sm not in flavour.architectures:
        raise BackendError(
            f"{gpu.name} (SM {gpu.sm}) is none of those that {flavour.title} compiles for; {_known(flavour)}; "
            "use the backend 'tensorrt' on this card"
        )
    architecture = f"sm{gpu.sm}" if flavour.portable else f"sm{gpu.sm} {gpu.name}"
    return Target(flavour, module.__version__, (gpu.sm,) if flavour.portable else (), architecture, device)


def build_plans(
    bundle: Bundle,
    flavour: str = "tensorrt-rtx",
    *,
    graphs: Sequence[str] = (),
    ranges: Mapping[str, Range] | None = None,
    settings: BuildSettings | None = None,
    folder: Path | None = None,
    force: bool = False,
    device: int = 0,
    report: Report | None = None,
    progress: Progress | None = None,
) -> list[Plan]:
    """Compile a plan for each of the bundle's graphs, or those named, unless there is one already.

    What was asked for is kept beside the plans, and is what opening a session looks for.

    Args:
        ranges: see ``default_profile``.
        folder: where plans are kept; ``engines/`` in the bundle when ``None``.
        force: build also where there is a plan.

    Raises:
        BackendError: the compiler is not there, or cannot compile a graph.
        SettingsError: ranges or settings that cannot be had.
        OutputError: the folder cannot be written.
        Cancelled: ``progress`` returned ``False``. Plans that were complete by then are kept, and none is half.
    """
    wanted = settings or BuildSettings()
    goal = target(flavour_of(flavour), wanted.sm, device)
    store = PlanStore(folder or bundle.path / FOLDER)
    chosen = [bundle.graph(name) for name in graphs] or list(bundle.graphs.values())
    kept = store.settings(flavour)
    profiles = []
    for graph in chosen:
        before, _ = _asked(store, kept, graph, flavour)
        asked = {**before, **(ranges or {})}  # sizes that were asked for before stay, unless others are asked for
        profiles.append(default_profile(bundle, graph, asked))
        kept[graph.name] = {"ranges": to_dict(asked), "settings": asdict(wanted)}
    plans = [
        obtain(bundle, graph, profile, wanted, goal, store, force=force, report=report, progress=progress)
        for graph, profile in zip(chosen, profiles, strict=True)
    ]
    store.keep_settings(flavour, kept)
    return plans


def _asked(
    store: PlanStore, kept: Mapping[str, Any], graph: GraphSpec, flavour: str
) -> tuple[dict[str, Range], BuildSettings]:
    """What ``dnp build`` was asked for, for one graph. Raises BackendError when it cannot be read."""
    entry = kept.get(graph.name, {})
    try:
        settings = entry.get("settings", {})
        return from_dict(entry.get("ranges", {})), BuildSettings(**{**settings, "sm": tuple(settings.get("sm", ()))})
    except (TypeError, AttributeError, SettingsError) as error:
        raise store.damaged(flavour, error) from error


def wanted_plan(
    bundle: Bundle, graph: GraphSpec, flavour: Flavour, store: PlanStore, device: int = 0
) -> tuple[Profile, BuildSettings, Target]:
    """What ``dnp build`` was last asked for, as far as it fits the present GPU; the defaults otherwise.

    Raises what ``target`` raises, and BackendError when what was asked for cannot be read.
    """
    ranges, settings = _asked(store, store.settings(flavour.name), graph, flavour.name)
    try:
        profile = default_profile(bundle, graph, ranges)
    except SettingsError as error:
        raise store.damaged(flavour.name, error) from error
    here = target(flavour, (), device)
    if flavour.portable and set(here.sm) <= set(settings.sm):
        return profile, settings, target(flavour, settings.sm, device)
    return profile, replace(settings, sm=here.sm), here


def obtain(
    bundle: Bundle,
    graph: GraphSpec,
    profile: Profile,
    settings: BuildSettings,
    goal: Target,
    store: PlanStore,
    *,
    force: bool = False,
    report: Report | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The plan in ``store``, verified, or a new one where there is none that can be used. Raises as ``build_plans``."""
    spec = PlanSpec(
        graph=graph.name,
        graph_sha256=bundle.graph_sha256(graph.name),
        flavour=goal.flavour.name,
        version=goal.version,
        architecture=goal.architecture,
        precision=bundle.precision,
        profile=to_dict(profile),
        flags=settings.flags,
    )

    def make() -> Plan:
        cache_file = store.folder / f".timing-{goal.version}-{spec.architecture.replace(' ', '-')}.cache"
        timings = None if goal.flavour.portable else cache_file
        data, facts = compile_plan(graph, profile, settings, goal, timings=timings, progress=progress)
        return store.write(spec, data, facts)

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


def compile_plan(
    graph: GraphSpec,
    profile: Profile,
    settings: BuildSettings,
    goal: Target,
    *,
    timings: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The plan as a buffer, and the facts: bytes of weights, activations, scratch and, at the largest sizes, buffers;
    layers, seconds, peak memory.

    The compiler runs in a thread of its own, so that this one can tell how it goes and answer a Ctrl-C.
    Raises as ``build_plans``.
    """
    build = _Build(graph, profile, settings, goal, timings)

    def tick() -> None:
        tell(progress, build.state())

    return in_background(build.compile, name=f"build-{graph.name}", tick=tick, cancel=build.cancel)


class _Build:
    """One run of the compiler, for a thread of its own."""

    def __init__(
        self, graph: GraphSpec, profile: Profile, settings: BuildSettings, goal: Target, timings: Path | None
    ) -> None:
        self.graph, self.profile, self.settings, self.goal, self.timings = graph, profile, settings, goal, timings
        self.cancelled = False
        self.phases: dict[str, tuple[int, int]] = {}  # steps done, steps in all; innermost last
        self._started = time.perf_counter()

    def state(self) -> BuildProgress:
        """Where it is: the outermost phase that has steps."""
        name, (done, total) = next(iter([*self.phases.items()]), ("parsing", (0, 1)))
        return BuildProgress(self.graph.name, name, done, total, time.perf_counter() - self._started)

    def cancel(self) -> None:
        """Let TensorRT stop at its next step."""
        self.cancelled = True

    def compile(self) -> tuple[Any, dict[str, Any]]:
        """See ``compile_plan``."""
        try:
            return self._compile()
        except DnpError:
            raise
        except Exception as error:
            raise BackendError(f"compiling {self.graph.name!r} failed: {error}") from error

    def _compile(self) -> tuple[Any, dict[str, Any]]:
        trt = self.goal.flavour.load()
        if not self.goal.flavour.portable:
            cuda.open_cuda(self.goal.device).activate()  # each thread has a device of its own
        with listening(trt) as log:
            builder = trt.Builder(logger(trt))
            network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            parser = trt.OnnxParser(network, logger(trt))
            if not parser.parse_from_file(str(self.graph.path)):
                raise self._parse_error(parser)
            config = self._config(trt, builder)
            data = builder.build_serialized_network(network, config)
            if data is None:
                raise self._build_error(log.errors())
            if self.timings is not None:
                self._keep_timings(self.timings, config.get_timing_cache())
            return data, {
                **_facts(log.messages()),
                "buffer_bytes": buffer_bytes(self.graph, self.profile),
                "layers": network.num_layers,
                **cost(self._started),
            }

    def _config(self, trt: Any, builder: Any) -> Any:
        settings, flavour = self.settings, self.goal.flavour
        config = builder.create_builder_config()
        if settings.optimization_level is not None:
            config.builder_optimization_level = settings.optimization_level
        if settings.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
        if settings.weight_streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        if settings.refit:
            config.set_flag(trt.BuilderFlag.REFIT)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names for `dnp inspect --layers`
        if flavour.portable:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # stream capture wants it
            config.num_compute_capabilities = len(self.goal.sm)
            for index, number in enumerate(self.goal.sm):
                config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), index)
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
        if self.timings is not None:
            blob = self.timings.read_bytes() if self.timings.exists() else b""
            cache = config.create_timing_cache(blob)
            if cache is None or not config.set_timing_cache(cache, False):  # damaged, or of another driver
                config.set_timing_cache(config.create_timing_cache(b""), False)
        config.progress_monitor = _monitor_class(trt)(self)
        profile = builder.create_optimization_profile()
        for name, tensor in self.graph.inputs.items():
            if tensor.symbols:
                sizes = [{s: getattr(r, which) for s, r in self.profile.items()} for which in ("low", "best", "high")]
                profile.set_shape(name, *(tensor.resolve(dims) for dims in sizes))
        config.add_optimization_profile(profile)
        return config

    def _keep_timings(self, path: Path, cache: Any) -> None:
        """For the next build; that it cannot be kept is no reason to lose this one."""
        if cache is None:
            return
        try:
            write_together({path: cache.serialize()})
        except OutputError as error:
            _log.warning("the timing cache is not kept: %s", error)

    def _parse_error(self, parser: Any) -> BundleError:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = "; ".join(f"{e.node_operator() or 'the file'}: {e.code().name} {e.desc()}" for e in errors[:3])
        return BundleError(
            f"{self.graph.path}: {self.goal.flavour.title} cannot read it: {said or 'no reason given'}; {REMEDY}"
        )

    def _build_error(self, said: str) -> Exception:
        if self.cancelled:
            return Cancelled(f"the build of {self.graph.name!r} was stopped")
        hints = ""
        if self.settings.refit and self.goal.flavour.portable:
            hints = "; a plan that can be refitted needs a GPU to build: leave --refit out"
        elif "OutOfMemory" in said or "out of memory" in said.lower():
            hints = "; lower the largest sizes of the profile (--batch, --height, --width), or raise --workspace"
        return BackendError(
            f"{self.goal.flavour.title} {self.goal.version} cannot compile {self.graph.name!r} "
            f"for {self.goal.architecture}: {said}{hints}"
        )


@cache
def _monitor_class(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """TensorRT calls it from threads of its own; an answer of False ends the build."""

        def __init__(self, build: _Build) -> None:
            trt.IProgressMonitor.__init__(self)
            self._build = build

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._build.phases[phase_name] = 0, num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._build.phases[phase_name] = step + 1, self._build.phases.get(phase_name, (0, step + 1))[1]
            return not self._build.cancelled

        def phase_finish(self, phase_name: str) -> None:
            self._build.phases.pop(phase_name, None)

    return Monitor


def _facts(messages: Any) -> dict[str, int]:
    found = {}
    for message in messages:
        for name, opening in _FACTS.items():
            number = message.removeprefix(opening).split()
            if message.startswith(opening) and number and number[0].isdigit():
                found[name] = int(number[0])
    return found


def _known(flavour: Flavour) -> str:
    return f"it knows {', '.join(map(str, flavour.architectures))}"
