"""From a graph to a plan: parse, profile, compile. One module for both products of TensorRT.

Networks are strongly typed: the arithmetic is what the ONNX file says, there is no precision flag. Weights are read
by the parser from the path, so graphs beyond 2 GB of weights are nothing special.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from pathlib import Path
from typing import Any, Final

from dnp.engine.bundle.manifest import GraphSpec
from dnp.engine.bundle.schema import REMEDY
from dnp.engine.errors import BackendError, BundleError, Cancelled, DnpError, OutputError
from dnp.engine.plans.plan import BuildProgress, BuildProgressCallback, cost, tell
from dnp.engine.plans.product import listening, logger
from dnp.engine.plans.profile import Profile, buffer_bytes
from dnp.engine.plans.settings import BuildSettings, Target
from dnp.engine.system import cuda
from dnp.engine.system.background import in_background
from dnp.engine.system.files import write_together

_log = logging.getLogger("dnp.engine")
REVISION: Final = 1  # of what is told to the compiler without being asked for; a change makes other plans
_STATISTICS: Final = {
    "activation_bytes": "Total Activation Memory:",
    "weights_bytes": "Total Weights Memory:",
    "scratch_bytes": "Max Scratch Memory:",
}


def compile_plan(
    graph: GraphSpec,
    profile: Profile,
    settings: BuildSettings,
    target: Target,
    *,
    timings: Path | None = None,
    progress: BuildProgressCallback | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The plan as a buffer, and its statistics: bytes of weights, activations, scratch and, at the largest sizes,
    buffers; layers, seconds, peak memory.

    The compiler runs in a thread of its own, so that this one can tell how it goes and answer a Ctrl-C.
    Raises as ``build_plans``.
    """
    build = _Build(graph, profile, settings, target, timings)

    def tick() -> None:
        tell(progress, build.state())

    def cancel() -> None:
        build.cancelled = True
        if progress is not None:
            progress(build.state())

    return in_background(build.compile, name=f"build-{graph.name}", tick=tick, cancel=cancel)


class _Build:
    """One run of the compiler, for a thread of its own."""

    def __init__(
        self, graph: GraphSpec, profile: Profile, settings: BuildSettings, target: Target, timings: Path | None
    ) -> None:
        self.graph, self.profile, self.settings, self.target, self.timings = graph, profile, settings, target, timings
        self.cancelled = False
        self.phases: dict[str, tuple[int, int]] = {}  # steps done, steps in all; innermost last
        self._started = time.perf_counter()

    def state(self) -> BuildProgress:
        """Where it is: the outermost phase that has steps. TensorRT stops only between two steps of any phase."""
        name, (done, total) = next(iter([*self.phases.items()]), ("parsing", (0, 1)))
        if self.cancelled:
            name = f"stopping at the compiler's next step; {name}"
        return BuildProgress(self.graph.name, name, done, total, time.perf_counter() - self._started)

    def compile(self) -> tuple[Any, dict[str, Any]]:
        try:
            return self._compile()
        except DnpError:
            raise
        except Exception as error:
            raise BackendError(f"compiling {self.graph.name!r} failed: {error}") from error

    def _compile(self) -> tuple[Any, dict[str, Any]]:
        trt = self.target.product.load()
        if not self.target.product.portable:
            cuda.open_cuda(self.target.device).activate()  # each thread has a device of its own
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
        settings, product = self.settings, self.target.product
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
        if product.portable:
            if not settings.weight_streaming:  # the two exclude each other
                config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # capturing runs wants it
            config.num_compute_capabilities = len(self.target.sm)
            for index, number in enumerate(self.target.sm):
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
        if config.add_optimization_profile(profile) < 0:
            raise BackendError(f"{product.title} takes no such sizes for {self.graph.name!r}: {dict(self.profile)}")
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
            f"{self.graph.path}: {self.target.product.title} cannot read it: {said or 'no reason given'}; {REMEDY}"
        )

    def _build_error(self, said: str) -> Exception:
        if self.cancelled:
            return Cancelled(f"the build of {self.graph.name!r} was stopped")
        hints = ""
        if "OutOfMemory" in said or "out of memory" in said.lower():
            hints = "; lower the largest sizes of the profile (--batch, --height, --width), or raise --workspace"
        return BackendError(
            f"{self.target.product.title} {self.target.version} cannot compile {self.graph.name!r} "
            f"for {self.target.architecture}: {said}{hints}"
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
        for name, opening in _STATISTICS.items():
            number = message.removeprefix(opening).split()
            if message.startswith(opening) and number and number[0].isdigit():
                found[name] = int(number[0])
    return found
