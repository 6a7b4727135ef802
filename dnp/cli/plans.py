"""The command about compiled plans: build. And how ``dnp inspect`` lists them."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from dnp.cli.options import MB, PATH, given_options, json_option, say

_PARTS: Final = ("weights_bytes", "buffer_bytes", "activation_bytes")  # of what a plan takes on a GPU

if TYPE_CHECKING:
    from dnp.engine.bundle.bundle import Bundle
    from dnp.engine.plans.plan import BuildProgress, Plan
    from dnp.engine.plans.profile import Range


@click.command()
@click.argument("bundle", required=False, type=PATH)
@click.option(
    "--backend",
    help="tensorrt, tensorrt-rtx, cuda or cpu. When left out: tensorrt-rtx with --sm, else the TensorRT that is "
    "installed and takes the GPU that is here, else cpu.",
)
@click.option("--sm", help="Architectures to compile for (tensorrt-rtx), e.g. 89,120; that of the GPU when left out.")
@click.option("--batch", help="Images at once, as largest, smallest:largest or smallest:best:largest. [default: 1:8]")
@click.option("--height", help="Of images, in pixels: one size, or a range; the bundle's default when left out.")
@click.option("--width", help="Of images, in pixels, in the same form; the bundle's default when left out.")
@click.option("--image-height", help="Of images to caption, in pixels; that of --height when left out.")
@click.option("--image-width", help="Of images to caption, in pixels; that of --width when left out.")
@click.option("--steps", help="Network runs of a sampler, in the same form. [default: 1:25:128]")
@click.option("--windows", help="Windows of a prompt, of as many tokens as the model reads at once. [default: 1]")
@click.option("--optimization-level", type=int, help="0 (fast build) to 5 (fast plan); the compiler's own by default.")
@click.option("--workspace", type=int, metavar="MB", help="Most scratch memory of a kernel; no limit when left out.")
@click.option("--weight-streaming", is_flag=True, help="Let weights stay in host memory where the GPU's is too small.")
@click.option("--refit", is_flag=True, help="Let weights be exchanged later; slower plans, and needs a GPU to build.")
@click.option("--graph", "graphs", multiple=True, help="Only this graph; may be given several times.")
@click.option("--device", type=click.IntRange(0), default=0, help="Number of the GPU to build for. [default: 0]")
@click.option("--plans", type=PATH, help="Folder for the plans; plans/ in BUNDLE by default.")
@click.option("--force", is_flag=True, help="Build also where there is a plan.")
@click.option("--prune", is_flag=True, help="Afterwards remove all other plans of the same graphs and backend.")
@json_option
def build(
    bundle: Path | None,
    backend: str | None,
    sm: str | None,
    graphs: tuple[str, ...],
    device: int,
    plans: Path | None,
    force: bool,
    prune: bool,
    as_json: bool,
    optimization_level: int | None,
    workspace: int | None,
    weight_streaming: bool,
    refit: bool,
    **sizes: str | None,
) -> None:
    """Compile BUNDLE, the shipped default when none is named, to plans of a backend, by default of one that is here.

    tensorrt-rtx compiles for any of its architectures on a machine with no GPU; tensorrt for the GPU that is there.
    The arithmetic is the bundle's: export it with --precision fp16. A plan that is there already is not built again.
    What runs later takes the newest plan of each graph that fits, and never builds one.

    cpu keeps what ONNX Runtime makes of the graphs on this processor, with the weights in the form that it computes
    with: a large bundle opens in seconds, and its processes share one copy in memory. Its plans take every size, and
    computing takes as long as without; the options about sizes, the GPU and the compiler are TensorRT's.

    cuda rewrites the graphs for the kernels that ONNX Runtime has for GPUs, on any machine, in seconds. A plan is for
    one image size and every batch; build one for each size.
    """
    from dnp.engine.backends.onnxruntime import cpu, cuda_plans
    from dnp.engine.backends.registry import compiles_here
    from dnp.engine.bundle.bundle import Bundle
    from dnp.engine.bundle.contract import BATCH
    from dnp.engine.plans.build import build_plans
    from dnp.engine.plans.product import PRODUCTS, TENSORRT_RTX
    from dnp.engine.plans.settings import BuildSettings

    opened = Bundle.default() if bundle is None else Bundle.open(bundle)
    if backend is None:
        backend = TENSORRT_RTX.name if sm else compiles_here(device)
        click.echo(f"dnp: building plans of the backend {backend!r}; --backend names another", err=True)
    if backend == cpu.NAME:
        _refuse_compiler_options("plans of the backend 'cpu' take every size")
        with closing(_Bar()) as bar:
            built = cpu.build_cpu_plans(opened, graphs=graphs, folder=plans, force=force, report=bar.say, progress=bar)
        _tell(built, prune, as_json)
        return
    if backend == cuda_plans.NAME:
        _refuse_compiler_options(
            "plans of the backend 'cuda' take every batch, and are for every GPU", *cuda_plans.SIZES
        )
        _recommend_fp16(opened)
        images = {name: _range(name, text) for name, text in sizes.items() if text is not None}
        with closing(_Bar()) as bar:
            built = cuda_plans.build_cuda_plans(
                opened, graphs=graphs, ranges=images, folder=plans, force=force, report=bar.say, progress=bar
            )
        _tell(built, prune, as_json)
        return
    settings = BuildSettings(
        sm=_architectures(sm),
        optimization_level=optimization_level,
        workspace=None if workspace is None else workspace * MB,
        weight_streaming=weight_streaming,
        refit=refit,
    )
    if backend in PRODUCTS:
        _recommend_fp16(opened)
    ranges = {name: _range(name, text) for name, text in sizes.items() if text is not None}
    if "batch" in ranges and ranges["batch"].high > BATCH:
        click.echo(
            f"dnp: a pipeline samples {BATCH} images at once at most; larger batches only serve captions by many beams",
            err=True,
        )
    with closing(_Bar()) as bar:
        built = build_plans(
            opened,
            backend,
            graphs=graphs,
            ranges=ranges,
            settings=settings,
            folder=plans,
            force=force,
            device=device,
            report=bar.say,
            progress=bar,
        )
    _tell(built, prune, as_json)


def _recommend_fp16(bundle: Bundle) -> None:
    if bundle.precision == "fp32":
        click.echo(f"dnp: {bundle.name} computes in fp32; an export with --precision fp16 is faster on a GPU", err=True)


def _refuse_compiler_options(reason: str, *understood: str) -> None:
    """Raises UsageError for an option that only TensorRT understands; ``understood`` are those that are not."""
    for name, option in given_options().items():
        if name not in ("bundle", "backend", "graphs", "plans", "force", "prune", "as_json", *understood):
            raise click.UsageError(f"{option} is for TensorRT; {reason}; leave it out, or name TensorRT by --backend")


def _tell(plans: list[Plan], prune: bool, as_json: bool) -> None:
    from dnp.engine.plans.store import PlanStore

    if prune:
        for path in PlanStore(plans[0].path.parent).prune(plans):
            click.echo(f"dnp: removed {path.name}", err=True)
    listed = [_entry(plan) for plan in plans]
    say({"plans": listed}, as_json, plan_table(listed))


def plans_of(bundle: Bundle, folder: Path | None = None) -> list[dict[str, Any]]:
    """What ``dnp inspect`` tells of the compiled plans of a bundle."""
    from dnp.engine.plans.plan import FOLDER
    from dnp.engine.plans.store import PlanStore

    return [_entry(plan) for plan in PlanStore(folder or bundle.path / FOLDER).plans()]


def plan_layers(bundle: Bundle, plan: dict[str, Any]) -> str:
    """What the engine inspector says of a plan. Raises BackendError where there is no GPU to load it on."""
    from dnp.engine.backends.registry import open_backend
    from dnp.engine.backends.session import BackendOptions
    from dnp.engine.errors import BackendError
    from dnp.engine.plans.plan import PlanSpec
    from dnp.engine.plans.product import product_of
    from dnp.engine.plans.store import PlanStore

    spec = PlanSpec(**plan["spec"])
    found, reason = PlanStore(Path(plan["path"]).parent).find(spec)
    if found is None:
        raise BackendError(f"{reason or 'it is gone'}; build it again: dnp build")
    backend: Any = open_backend(product_of(spec.backend).name, BackendOptions(eager=True))
    with closing(backend):
        layers: str = backend.layers(bundle.graph(spec.graph), found)
    return layers


def plan_table(plans: list[dict[str, Any]]) -> str:
    """The plans for people."""
    from dnp.engine.plans.product import PRODUCTS

    lines = []
    for plan in plans:
        spec, statistics = plan["spec"], plan["statistics"]
        sizes = ", ".join(f"{s} {':'.join(map(str, dict.fromkeys(r)))}" for s, r in spec["profile"].items())
        flags = ", ".join(f"{n}={value}" for n, value in spec["flags"].items() if value and n != "revision")
        memory = f"plan {_mb(plan['bytes'])}"
        if spec["backend"] in PRODUCTS:
            memory += (
                f"; on the GPU {_mb(_most(statistics))} at most: weights {_mb(statistics.get('weights_bytes'))}, "
                f"activations {_mb(statistics.get('activation_bytes'))} "
                f"(scratch {_mb(statistics.get('scratch_bytes'))}), buffers {_mb(statistics.get('buffer_bytes'))}"
            )
        else:
            memory += f", weights {_mb(statistics.get('weights_bytes'))}"
            memory += ", mapped into memory" if spec["backend"] == "cpu" else ""
        lines += [
            f"{spec['graph']:<15}{spec['backend']} {spec['version']}, {spec['architecture']}, {spec['precision']}"
            + (f", {flags}" if flags else ""),
            f"{'':<15}profile   {sizes or 'every size'}",
            f"{'':<15}memory    {memory}",
            f"{'':<15}built     in {statistics.get('seconds')} s, {statistics.get('built')}, {plan['file']}",
        ]
    gpu = [plan for plan in plans if plan["spec"]["backend"] in PRODUCTS]
    if len(gpu) > 1 and len({plan["spec"]["graph"] for plan in gpu}) == len(gpu):
        lines += _together([plan["statistics"] for plan in gpu])
    text = "\n".join(lines) or "no plans; make them with: dnp build"
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)  # sidecars can be edited


def _together(statistics: list[dict[str, Any]]) -> list[str]:
    """What all plans of a pipeline take on the GPU: activations share one piece of memory."""
    if any(name not in of_plan for of_plan in statistics for name in _PARTS):
        return []
    weights, buffers, activations = ([int(of_plan[name]) for of_plan in statistics] for name in _PARTS)
    total = sum(weights) + sum(buffers) + max(activations)
    return [
        f"{'together':<15}on the GPU {_mb(total)} at most at the largest sizes: weights {_mb(sum(weights))}, buffers "
        f"{_mb(sum(buffers))}, one piece of {_mb(max(activations))} for the activations of all; CUDA's own comes on top"
    ]


def _entry(plan: Plan) -> dict[str, Any]:
    return {
        "file": plan.path.name,
        "path": str(plan.path),
        "bytes": plan.nbytes,
        "spec": asdict(plan.spec),
        "statistics": dict(plan.statistics),
    }


def _range(name: str, text: str) -> Range:
    from dnp.engine.plans.profile import Range

    found = Range.parse(text)
    # Few mean one batch size alone, or one length of sampler tables or prompts.
    return Range(1, 1, found.high) if name in ("batch", "steps", "windows") and ":" not in text else found


def _architectures(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 89,120", param_hint="--sm") from None


def _most(statistics: dict[str, Any]) -> int | None:
    """Bytes on a GPU while the plan runs at its largest sizes; None where a part of it is not known."""
    parts = [statistics.get(name) for name in _PARTS]
    return None if None in parts else sum(part for part in parts if part is not None)


def _mb(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.1f} MB"


class _Bar:
    """A progress bar for each plan on a terminal; lines of text go above it."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm
        self._bar: Any = None
        self._graph = ""

    def __call__(self, state: BuildProgress) -> None:
        """Move the bar; elapsed time is the bar's own."""
        if state.graph != self._graph:
            self.close()
            self._graph = state.graph
            self._bar = self._tqdm(
                desc=state.graph, total=1, disable=None, file=sys.stderr, bar_format="{desc:<15}{elapsed} {postfix}"
            )
        self._bar.set_postfix_str(f"{state.phase} {state.done}/{state.total}", refresh=True)

    def say(self, line: str) -> None:
        """A line on stderr."""
        self.close()
        self._graph = ""
        click.echo(f"dnp: {line}", err=True)

    def close(self) -> None:
        """End the present bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
