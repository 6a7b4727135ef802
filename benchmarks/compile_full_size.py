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

GRAPHS = ("encode_text", "denoise", "decode_latents", "encode_image", "caption_step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="models, bundle and plans")
    parser.add_argument("--sm", default="89", help="architectures, as for `dnp build`")
    parser.add_argument("--batch", default="1:8", help="batches, as for `dnp build`")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compile-full-size.json")
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    if not (work / "blip").exists():
        make_models(work)
    if not (work / "bundle").exists():
        run("export", work / "sd15", work / "bundle", "--captioner", work / "blip", "--precision", "fp16")
    rows = []
    for name in GRAPHS:
        engines = work / "engines" / name
        sizes = ["--sm", chosen.sm, "--batch", chosen.batch, "--engines", engines, "--graph", name]
        (plan,) = json.loads(run("build", work / "bundle", *sizes, "--json"))["plans"]
        rows.append(plan)
        print(line(plan), flush=True)
    report = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": processor(),
        "python": platform.python_version(),
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
        "plans": [{"spec": plan["spec"], "facts": plan["facts"], "plan_bytes": plan["bytes"]} for plan in rows],
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {chosen.out}")


def run(*arguments: object) -> str:
    """The ``dnp`` of this environment; its messages are shown, its output returned."""
    command = [str(Path(sys.executable).with_name("dnp")), *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def line(plan: dict) -> str:
    facts = plan["facts"]
    return (
        f"{plan['spec']['graph']:<15} {facts['seconds']:6.1f} s, plan {plan['bytes'] / 1e6:7.1f} MB, weights "
        f"{facts['weights_bytes'] / 1e6:7.1f} MB, activations {facts['activation_bytes'] / 1e6:7.1f} MB, peak memory "
        f"{facts['peak_memory_bytes'] / 1e9:.2f} GB"
    )


def processor() -> str:
    from dnp.engine.processor import core_count, processor_name

    return f"{processor_name()}, {core_count()} cores"


if __name__ == "__main__":
    main()
