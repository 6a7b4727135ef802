"""The commands about bundles and backends: export, inspect, doctor."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dnp.cli.options import PATH, json_option, say
from dnp.cli.plans import plan_layers, plan_table, plans_of

if TYPE_CHECKING:
    from dnp.engine.backends.registry import BackendReport
    from dnp.engine.bundle.bundle import Bundle
    from dnp.engine.bundle.manifest import PassDefaults, Ranges
    from dnp.engine.bundle.tensors import TensorSpec


@click.command()
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@click.option("--captioner", required=True, type=PATH, help="A BLIP folder (transformers).")
@click.option("--precision", default="fp32", show_default=True, help="Arithmetic of the graphs: fp32 or fp16.")
@click.option("--name", help="Name of the bundle; that of the folder OUT when left out.")
@click.option(
    "--default",
    "defaults",
    multiple=True,
    metavar="NAME=VALUE",
    help="What requests use that say nothing: sampler, steps, guidance, dns_sampler, dns_steps, dns_guidance.",
)
@click.option(
    "--lora", "loras", multiple=True, metavar="FILE[:SCALE]", help="Merge this LoRA (.safetensors) into the weights."
)
@click.option(
    "--guidance-methods",
    is_flag=True,
    help="Give the step graph what guidance methods need: rescaling, projected guidance, CFG-Zero*, norm caps, a third "
    "prompt.",
)
@click.option(
    "--check-ranges",
    is_flag=True,
    help="Of fp16 graphs: run whole DNP requests on the CPU, tell the largest activations and the errors against "
    "float32, and put back to float32 what fp16 cannot hold.",
)
@click.option(
    "--range-prompt", "range_prompts", multiple=True, metavar="TEXT", help="Check the ranges with this prompt too."
)
@click.option("--range-steps", type=int, help="Steps of each pass while the ranges are checked; 5 when left out.")
@click.option("--overwrite", is_flag=True, help="Replace OUT when it exists.")
@json_option
def export(
    source: Path,
    out: Path,
    captioner: Path,
    precision: str,
    name: str | None,
    defaults: tuple[str, ...],
    loras: tuple[str, ...],
    guidance_methods: bool,
    check_ranges: bool,
    range_prompts: tuple[str, ...],
    range_steps: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export SOURCE, a diffusers folder of Stable Diffusion 1.x, 2.x or XL, and a BLIP captioner to the bundle OUT.

    Every graph is compared with PyTorch, and the export fails when one differs. Pickle files are never loaded.
    """
    from tqdm import tqdm

    from dnp.engine.system.interrupts import uninterrupted

    if (range_prompts or range_steps is not None) and not check_ranges:
        raise click.UsageError("--range-prompt and --range-steps say how to check the ranges; add --check-ranges")
    try:
        with uninterrupted():
            from dnp.export.bundle import export_bundle
            from dnp.export.families.lora import Lora
            from dnp.export.fp16.ranges import RangeCheck
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("dnp"):
            raise
        from dnp.engine.system.imports import missing_extra

        raise missing_extra(error.name, "cpu,export", "exporting") from error

    ranges = None
    if check_ranges:
        ranges = RangeCheck(range_prompts) if range_steps is None else RangeCheck(range_prompts, range_steps)
    with tqdm(total=5, unit="graph", disable=None) as bar:

        def progress(stage: str, index: int, total: int) -> None:
            bar.total = total
            bar.set_description(stage)
            bar.update(index - bar.n)

        report = export_bundle(
            source,
            out,
            captioner=captioner,
            precision=precision,
            name=name,
            defaults=dict(map(_setting, defaults)),
            loras=[Lora.parse(text) for text in loras],
            methods=guidance_methods,
            ranges=ranges,
            overwrite=overwrite,
            progress=progress,
        )
    lines = [f"{'graph':<16}{'nodes':>7}{'MB':>10}{'seconds':>9}{'peak MB':>9}  largest error against PyTorch (bound)"]
    for graph in report.graphs:
        errors = ", ".join(
            f"{output} {entry['max_abs_error']:.1e} ({entry['bound']:.0e})"
            for output, entry in graph.manifest["parity"].items()
        )
        lines.append(
            f"{graph.name:<16}{graph.nodes:>7}{graph.bytes / 1e6:>10.2f}{graph.seconds:>9.1f}"
            f"{graph.peak_memory / 1e6:>9.0f}  {errors}"
        )
    checked = {graph.name: graph.ranges for graph in report.graphs if graph.ranges is not None}
    if checked:
        lines += ["", f"{'graph':<16}{'largest activation':>19}{'of fp16':>9}{'error':>9}  put back to float32"]
        lines += [f"{name:<16}{_range_columns(found)}" for name, found in checked.items()]
    lines += report.notes
    lines.append(f"wrote {out} in {report.seconds:.0f} s, peak memory {report.peak_memory / 1e6:.0f} MB")
    say({**asdict(report), "path": str(out)}, as_json, "\n".join(lines))


@click.command()
@click.argument("bundle", required=False, type=PATH)
@click.option("--plans", "folder", type=PATH, help="Folder with the plans; plans/ in BUNDLE by default.")
@click.option("--layers", is_flag=True, help="Also list the layers of TensorRT's plans, which takes a GPU.")
@json_option
def inspect(bundle: Path | None, folder: Path | None, layers: bool, as_json: bool) -> None:
    """Verify BUNDLE, the shipped default when none is named, and show what is in it and in its compiled plans."""
    from dnp.engine.bundle.bundle import Bundle

    opened = Bundle.default() if bundle is None else Bundle.open(bundle)
    plans = plans_of(opened, folder)
    if layers:
        from dnp.engine.plans.product import PRODUCTS

        for plan in plans:
            if plan["spec"]["backend"] in PRODUCTS:
                plan["layers"] = plan_layers(opened, plan)
    page = _bundle_page(opened) + "\n\nplans\n" + plan_table(plans)
    page += "".join(f"\n\nlayers of {plan['file']}\n{plan['layers']}" for plan in plans if "layers" in plan)
    say({**_described(opened), "plans": plans}, as_json, page)


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Try every backend on this machine, and say why one does not work and what to do about it."""
    from dnp.engine.backends.registry import doctor

    reports = doctor()
    say({"backends": [asdict(report) for report in reports]}, as_json, "\n".join(map(_backend_line, reports)))


def _range_columns(found: Ranges) -> str:
    """The largest activation, its share of fp16's range, the error against float32, and what was put back."""
    share = f"{100 * found.share:.2g} %"
    return f"{found.largest:>19.4g}{share:>9}{found.error:>9.1e}  {_put_back(found)}; largest at {found.at}"


def _put_back(found: Ranges) -> str:
    if found.precision == "fp32":
        return "all of it"
    return f"{len(found.float32)} values: {', '.join(found.float32)}" if found.float32 else "nothing"


def _setting(text: str) -> tuple[str, str | int | float]:
    """``steps=25`` as a name and a value of the obvious type."""
    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"{text!r} is no NAME=VALUE, such as steps=25", param_hint="--default")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def _pass(defaults: PassDefaults) -> str:
    return f"{defaults.sampler}, {defaults.steps} steps"


def _backend_line(report: BackendReport) -> str:
    line = f"{report.name:<12} {'works' if report.works else 'does not work'}"
    if report.works:
        line += f": {', '.join(filter(None, [report.version, *report.precisions]))}, on {report.hardware}"
    if report.why_not:
        line += f": {report.why_not}"
    if report.remedy:
        line += f"\n{'':<12} remedy: {report.remedy}"
    return line


def _described(bundle: Bundle) -> dict[str, Any]:
    """The manifest as JSON can hold it, with where the bundle is and its fingerprint."""
    described = {key: value for key, value in asdict(bundle).items() if key != "graphs"}
    graphs = {}
    for name, graph in bundle.graphs.items():
        graphs[name] = {
            "file": graph.path.relative_to(bundle.path).as_posix(),
            "bytes": graph.path.stat().st_size,
            "inputs": {tensor: spec.to_dict() for tensor, spec in graph.inputs.items()},
            "outputs": {tensor: spec.to_dict() for tensor, spec in graph.outputs.items()},
            "parity": {output: asdict(parity) for output, parity in graph.parity.items()},
        }
        if graph.ranges is not None:
            graphs[name]["ranges"] = asdict(graph.ranges)
    return {**described, "path": str(bundle.path), "graphs": graphs}


def _bundle_page(bundle: Bundle) -> str:
    latents, caption, scale = bundle.latents, bundle.caption, bundle.latents.vae_scale_factor
    size = sum(record.size for record in bundle.files.values())
    grain = latents.multiple * scale
    lines = [
        f"{bundle.name}: {bundle.family}, {bundle.precision}, {size / 1e6:.1f} MB, every file verified",
        f"  path         {bundle.path}",
        f"  fingerprint  {bundle.fingerprint}",
        f"  made with    {', '.join(f'{name} {version}' for name, version in bundle.created_with.items())}",
        f"  images       {latents.width * scale} x {latents.height * scale} pixels by default; "
        f"multiples of {grain} up to {latents.max_width * scale} x {latents.max_height * scale}",
        f"  prompts      {bundle.text.length} tokens",
        f"  captions     up to {caption.max_length} tokens, from {caption.image_size} x {caption.image_size} pixels",
        f"  final pass   {_pass(bundle.defaults.final)}, w = {bundle.defaults.final.guidance:g}",
        f"  DNS pass     {_pass(bundle.defaults.dns)}, s = {bundle.defaults.dns.guidance:g}",
    ]
    for name, graph in bundle.graphs.items():
        lines.append(f"\n{name}  ({graph.path.relative_to(bundle.path)}, {graph.path.stat().st_size / 1e6:.2f} MB)")
        lines += [f"  in   {tensor:<16}{_shown(spec)}" for tensor, spec in graph.inputs.items()]
        for tensor, spec in graph.outputs.items():
            parity = graph.parity.get(tensor)
            error = f"   max error {parity.max_abs_error:.1e} (bound {parity.bound:.0e})" if parity else ""
            lines.append(f"  out  {tensor:<16}{_shown(spec)}{error}")
        if graph.ranges is not None:
            found = graph.ranges
            lines.append(
                f"  range {found.largest:.4g} at {found.at}, {100 * found.share:.2g} % of fp16's; "
                f"error against float32 {found.error:.1e}; put back to float32: {_put_back(found)}"
            )
    return "\n".join(lines)


def _shown(spec: TensorSpec) -> str:
    return f"{spec.dtype:<8} [{', '.join(map(str, spec.shape))}]"
