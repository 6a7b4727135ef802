"""Stable Diffusion 1.5, 2.1 and XL with BLIP base at full size, random weights: exported in fp16, compiled with no GPU.

``python benchmarks/compile_full_size.py --work FOLDER NAME...`` does it for each of ``sd15``, ``sd21`` and ``sdxl``; of
those that are not named, the results stay. What is there in FOLDER is not made again. Each graph is compiled in a
process of its own, so that the peak memory is its own, too. To export XL takes some 17 GB
of memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from random_models import make_models

NAMES = ("sd15", "sd21", "sdxl")
GRAPHS = ("encode_text", "denoise", "decode_latents", "encode_image", "caption_step")

# The most bytes of activations at batches up to 8: what was measured, and up to a third more. Attention that is not
# fused makes a matrix of all tokens by all tokens: with it, `sd15` was seen to take 13.4 GB for the denoiser. A
# decoder's convolutions hide its one attention; `tests/test_plans.py` holds it to a bound where they do not.
BLIP: Mapping[str, float] = {"encode_image": 307e6, "caption_step": 340e6}
BOUNDS: Mapping[str, Mapping[str, float]] = {
    "sd15": {"encode_text": 19.6e6, "denoise": 1.25e9, "decode_latents": 7.2e9, **BLIP},
    "sd21": {"encode_text": 25e6, "denoise": 2.9e9, "decode_latents": 16.2e9, **BLIP},
    "sdxl": {"encode_text": 32e6, "denoise": 4.65e9, "decode_latents": 34.7e9, **BLIP},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=NAMES, help="the models")
    parser.add_argument("--work", type=Path, required=True, help="models, bundles and plans")
    parser.add_argument("--sm", default="86,89,120", help="architectures, as for `dnp build`")
    parser.add_argument("--batch", default="1:8", help="batches, as for `dnp build`")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compile-full-size.json")
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    report = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    failed = []
    for name in chosen.names:
        report[name] = made = compiled(name, work, chosen.sm, chosen.batch)
        chosen.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name} is in {chosen.out}", flush=True)
        taken = {plan["spec"]["graph"]: plan["statistics"]["activation_bytes"] for plan in made["plans"]}
        beyond = [graph for graph, bound in made["bounds on activation_bytes"].items() if taken[graph] > bound]
        stray = made["float32 outside the stated regions"]
        if stray or beyond:
            failed.append(f"{name}: float32 outside the stated regions: {stray or 'none'}; activations: {beyond}")
    if failed:
        sys.exit("\n".join(failed))


def compiled(name: str, work: Path, sm: str, batch: str) -> dict[str, Any]:
    """Make the model, its bundle and its plans in ``work``: what that took."""
    make_models(work, [each for each in (name, "blip") if not (work / each).exists()])
    bundle, exported = work / f"{name}-bundle", work / f"{name}-export.json"
    if not bundle.exists():
        options = ["--captioner", work / "blip", "--precision", "fp16", "--json"]
        exported.write_text(run("export", work / name, bundle, *options))
    export = json.loads(exported.read_text())
    stray = float32_outside_regions(bundle)
    plans = []
    for graph in GRAPHS:
        options = ["--sm", sm, "--batch", batch, "--plans", work / f"{name}-plans" / graph, "--graph", graph, "--json"]
        (plan,) = json.loads(run("build", bundle, *options))["plans"]
        plans.append({"spec": plan["spec"], "statistics": plan["statistics"], "plan_bytes": plan["bytes"]})
        print(line(plans[-1]), flush=True)
    return {
        "command": f"compile_full_size.py --work FOLDER --sm {sm} --batch {batch} {name}",
        "processor": processor(),
        "python": platform.python_version(),
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
        "export": {
            **{key: export[key] for key in ("bytes", "seconds", "peak_memory")},
            "graphs": [
                {key: graph[key] for key in ("name", "nodes", "bytes", "seconds", "peak_memory", "parity")}
                for graph in export["graphs"]
            ],
        },
        "float32 outside the stated regions": stray,
        "bounds on activation_bytes": BOUNDS[name],
        "plans": plans,
    }


def float32_outside_regions(bundle: Path) -> dict[str, list[str]]:
    """The nodes of each graph that compute in float32 and should not; nothing for graphs without any.

    A decoder that is float32 in every precision is no fp16 graph.
    """
    import onnx_ir as ir

    from dnp.engine import Bundle
    from dnp.export.fp16.float32 import half_values
    from dnp.export.fp16.regions import REGIONS, outside_regions

    models = {name: ir.load(graph.path) for name, graph in Bundle.open(bundle).graphs.items()}
    found = {name: outside_regions(model, REGIONS[name]) for name, model in models.items() if half_values(model)}
    return {name: nodes for name, nodes in found.items() if nodes}


def run(*arguments: object) -> str:
    """The ``dnp`` of this environment; its messages are shown, its output returned."""
    command = [str(Path(sys.executable).with_name("dnp")), *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def line(plan: Mapping[str, Any]) -> str:
    statistics = plan["statistics"]
    return (
        f"{plan['spec']['graph']:<15} {statistics['seconds']:6.1f} s, plan {plan['plan_bytes'] / 1e6:7.1f} MB, weights "
        f"{statistics['weights_bytes'] / 1e6:7.1f} MB, activations {statistics['activation_bytes'] / 1e6:7.1f} MB, "
        f"peak memory {statistics['peak_memory_bytes'] / 1e9:.2f} GB"
    )


def processor() -> str:
    from dnp.engine.system.processor import core_count, processor_name

    return f"{processor_name()}, {core_count()} cores"


if __name__ == "__main__":
    main()
