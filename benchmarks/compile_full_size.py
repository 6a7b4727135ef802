"""Stable Diffusion 1.5 and BLIP base at full size, random weights: exported in fp16 and compiled, with no GPU.

``python benchmarks/compile_full_size.py --work FOLDER`` takes some 15 GB of disk, 14 GB of memory and half an hour on
two cores. What is there in FOLDER is not made again. Each graph is compiled in a process of its own, so that the peak
memory is its own, too.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

from random_models import make_models

# The most bytes of activations at batches up to 8. Attention that is not fused makes a matrix of all tokens by all
# tokens: with it, all but the decoder were seen to take 20.6 MB, 13.4 GB, 285 MB and 408 MB. The decoder's convolutions
# at 512x512 pixels hide its one attention; `tests/test_plans.py` holds it to a bound where they do not.
BOUNDS = {
    "encode_text": 19.6e6,
    "denoise": 1.25e9,
    "decode_latents": 7.2e9,
    "encode_image": 257e6,
    "caption_step": 340e6,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="models, bundle and plans")
    parser.add_argument("--sm", default="86,89,120", help="architectures, as for `dnp build`")
    parser.add_argument("--batch", default="1:8", help="batches, as for `dnp build`")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compile-full-size.json")
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    if not (work / "blip").exists():
        make_models(work)
    if not (work / "bundle").exists():
        run("export", work / "sd15", work / "bundle", "--captioner", work / "blip", "--precision", "fp16")
    stray = float32_outside_regions(work / "bundle")
    rows = []
    for name in BOUNDS:
        plans = work / "plans" / name
        sizes = ["--sm", chosen.sm, "--batch", chosen.batch, "--plans", plans, "--graph", name]
        (plan,) = json.loads(run("build", work / "bundle", *sizes, "--json"))["plans"]
        rows.append(plan)
        print(line(plan), flush=True)
    report = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": processor(),
        "python": platform.python_version(),
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
        "float32 outside the stated regions": stray,
        "bounds on activation_bytes": BOUNDS,
        "plans": [
            {"spec": plan["spec"], "statistics": plan["statistics"], "plan_bytes": plan["bytes"]} for plan in rows
        ],
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {chosen.out}")
    beyond = [p["spec"]["graph"] for p in rows if p["statistics"]["activation_bytes"] > BOUNDS[p["spec"]["graph"]]]
    if stray or beyond:
        sys.exit(
            f"float32 outside the stated regions: {stray or 'none'}; activations beyond their bound: {beyond or 'none'}"
        )


def float32_outside_regions(bundle: Path) -> dict[str, list[str]]:
    """The nodes of each graph that compute in float32 and should not; nothing for graphs without any."""
    import onnx_ir as ir

    from dnp.engine import Bundle
    from dnp.export.fp16.regions import REGIONS, outside_regions

    graphs = Bundle.open(bundle).graphs
    found = {name: outside_regions(ir.load(graph.path), REGIONS[name]) for name, graph in graphs.items()}
    return {name: nodes for name, nodes in found.items() if nodes}


def run(*arguments: object) -> str:
    """The ``dnp`` of this environment; its messages are shown, its output returned."""
    command = [str(Path(sys.executable).with_name("dnp")), *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def line(plan: dict) -> str:
    statistics = plan["statistics"]
    return (
        f"{plan['spec']['graph']:<15} {statistics['seconds']:6.1f} s, plan {plan['bytes'] / 1e6:7.1f} MB, weights "
        f"{statistics['weights_bytes'] / 1e6:7.1f} MB, activations {statistics['activation_bytes'] / 1e6:7.1f} MB, "
        f"peak memory {statistics['peak_memory_bytes'] / 1e9:.2f} GB"
    )


def processor() -> str:
    from dnp.engine.system.processor import core_count, processor_name

    return f"{processor_name()}, {core_count()} cores"


if __name__ == "__main__":
    main()
