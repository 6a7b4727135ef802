"""The C++ library beside Python's ``dnp`` and stable-diffusion.cpp: start, memory, time outside the network.

``python benchmarks/native.py`` runs each contender's processes in turn, round by round, and writes
benchmarks/results/native.json and the table in docs/embedding.md. It wants ``cmake --preset release`` built. The model
is the shipped one; ``--sd15`` adds Stable Diffusion 1.5's architecture with random weights at 256×256 pixels, which
stable-diffusion.cpp knows too. That takes minutes, and some gigabytes in build/bench.

A process is timed from its start to its end, so that it holds the opening and one plain image. What a step costs
outside the network is a slope: one process takes few steps, one many, and what they differ by outside ONNX Runtime's
runs is divided by the steps that they differ by. Tokenizing, drawing noise and decoding are the same in both.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

SPEED = Path(__file__).parent / "speed"
sys.path.insert(0, str(SPEED))

from job import Job  # noqa: E402
from measure import failure, rotated, run_worker  # noqa: E402
from prepare import (  # noqa: E402
    MODELS,
    REPOSITORY,
    Model,
    prepare_contender,
    prepare_environment,
    prepare_model,
    python_of,
)

from dnp.engine.system.files import write_together  # noqa: E402
from dnp.engine.system.processor import core_count, processor_name  # noqa: E402

COMMAND = REPOSITORY / "build" / "native" / "native" / "dnp-native"
RESULTS = REPOSITORY / "benchmarks" / "results" / "native.json"
PAGE = REPOSITORY / "docs" / "embedding.md"
MARKS = "<!-- measured -->", "<!-- end of measured -->"
PROMPT = "a large red circle left of a small blue square on a plain yellow background"
PYTHON = """
import json, re, sys, time
from pathlib import Path
from dnp import Pipeline
folder, plans, settings, threads = json.loads(sys.argv[1])
with Pipeline.open(folder, threads=threads, plans=Path(plans)) as pipeline:
    inside = 0.0
    pipeline.warm_up(captioner=settings["dnp"])
    for session in pipeline.sessions.values():
        def timed(run=session.run):
            global inside
            started = time.perf_counter()
            run()
            inside += time.perf_counter() - started
        session.run = timed
    started = time.perf_counter()
    pipeline(**settings)
    seconds = time.perf_counter() - started
peak = re.search(r"^VmHWM:\\s*(\\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
print(json.dumps({"outside": seconds - inside, "memory_bytes": int(peak[1]) << 10}))
"""

Figures = dict[str, float]


def native(bundle: Path, plans: Path, settings: Mapping[str, Any], threads: int) -> Figures:
    """One process of ``dnp-native``: seconds outside the network, without those of opening, and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "told.json")
        options = {**settings, "plans": plans, "threads": threads, "out": folder, "json": told}
        words = [word for name, value in options.items() for word in (f"--{name}", _text(value)) if name != "prompt"]
        _run([str(COMMAND), "generate", str(bundle), settings["prompt"], *words])
        found = json.loads(told.read_text())
    seconds = found["seconds"]
    outside = seconds["total"] - seconds["open"] - found["inside"]
    return {"outside": outside, "memory_bytes": found["peak_memory_bytes"]}


def python(bundle: Path, plans: Path, settings: Mapping[str, Any], threads: int) -> Figures:
    """The same of Python's ``dnp``."""
    found: Figures = json.loads(
        _run([sys.executable, "-c", PYTHON, json.dumps([str(bundle), str(plans), settings, threads])])
    )
    return found


CONTENDERS: Mapping[str, Callable[[Path, Path, Mapping[str, Any], int], Figures]] = {
    "dnp-native": native,
    "dnp": python,
}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str).strip('"')


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise click.ClickException(f"{command[0]}: {done.stderr.strip()[-300:]}")
    return done.stdout


def _environment() -> dict[str, str]:
    import onnxruntime

    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1.*")
    return {**os.environ, "DNP_ONNXRUNTIME": str(library)}


def measure(model: Model, works: Mapping[str, Mapping[str, Any]], rounds: int, threads: int) -> list[dict[str, Any]]:
    """Every work by every contender in every round: a process each."""
    runs = []
    for turn in range(rounds):
        for name in rotated(list(CONTENDERS), turn):
            for work, settings in works.items():
                started = time.perf_counter()
                figures = CONTENDERS[name](
                    model.bundle, model.plans, {"prompt": PROMPT, "seed": 0, **settings}, threads
                )
                seconds = time.perf_counter() - started
                runs.append({"contender": name, "work": work, "round": turn, "seconds": seconds, **figures})
                click.echo(f"{turn + 1}/{rounds} {name}, {work}: {seconds:.3f} s", err=True)
    return runs


def measure_cpp(model: Model, steps: int, pixels: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """stable-diffusion.cpp by its Python package: opening and one image; its memory includes Python's and PyTorch's."""
    name = "stable-diffusion-cpp"
    job = Job(
        contender=name, model=str(model.source), captioner=str(model.captioner), converted=str(model.folder),
        bundle=str(model.bundle), plans=str(model.plans), threads=threads, prompt=PROMPT, pixels=pixels, steps=steps,
        works=("image",), repeats=0,
    )  # fmt: skip
    if reason := prepare_environment(name) or prepare_contender(name, job):
        raise click.ClickException(f"{name}: {reason}")
    runs = []
    for turn in range(rounds):
        events = run_worker(python_of(name), job, 3600)
        if reason := failure(events):
            raise click.ClickException(f"{name}: {reason}")
        found = {event["event"]: event for event in events}
        seconds = found["open"]["seconds"] + found["first"]["seconds"]
        memory = found["memory"]["bytes"]
        runs.append({"contender": name, "work": "image", "round": turn, "seconds": seconds, "memory_bytes": memory})
        click.echo(f"{turn + 1}/{rounds} {name}: {seconds:.3f} s", err=True)
    return runs


def median(runs: list[dict[str, Any]], contender: str, work: str, figure: str) -> float:
    """Of all rounds."""
    return statistics.median(run[figure] for run in runs if (run["contender"], run["work"]) == (contender, work))


def step_outside(runs: list[dict[str, Any]], contender: str, steps: tuple[int, int]) -> float:
    """Seconds of a step outside the network."""
    few, many = (median(runs, contender, work, "outside") for work in ("few", "many"))
    return (many - few) / (steps[1] - steps[0])


def table(report: Mapping[str, Any]) -> str:
    """The section of docs/embedding.md."""
    machine, runs = report["machine"], report["default"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, load before "
        f"{machine['load_before']:.1f}, {machine['made']}: `{report['command']}`, medians of {report['rounds']} "
        "processes each. A process is timed from its start to its end.",
        "",
        "| the default model | process with one plain image, s | process with one DNP request, s | most memory, MB "
        "| a step outside the network, ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in CONTENDERS:
        memory = max(median(runs, name, work, "memory_bytes") for work in ("image", "dnp"))
        outside = step_outside(runs, name, tuple(report["steps"])) * 1e3
        seconds = [median(runs, name, work, "seconds") for work in ("image", "dnp")]
        lines.append(f"| `{name}` | {seconds[0]:.2f} | {seconds[1]:.2f} | {memory / 1e6:.0f} | {outside:.2f} |")
    if large := report.get("sd15"):
        lines += ["", "| Stable Diffusion 1.5, 256×256, 2 steps | open and one image, s | most memory, MB |"]
        lines += ["| --- | --- | --- |"]
        for name in (*CONTENDERS, "stable-diffusion-cpp"):
            seconds, memory = (median(large, name, "image", figure) for figure in ("seconds", "memory_bytes"))
            lines.append(f"| `{name}` | {seconds:.1f} | {memory / 1e6:.0f} |")
        lines += [
            "",
            "stable-diffusion.cpp is measured through its package for Python, which brings PyTorch's memory here.",
        ]
    return "\n".join(lines)


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Processes of each contender.")
@click.option("--threads", type=click.IntRange(1), help="Threads of each; all physical cores if left out.")
@click.option("--sd15", is_flag=True, help="Also Stable Diffusion 1.5's size, beside stable-diffusion.cpp; 2 rounds.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Where the results go.")
def main(rounds: int, threads: int | None, sd15: bool, out: Path) -> None:
    """Measure, write the results, and render them."""
    if not COMMAND.exists():
        raise click.ClickException(f"{COMMAND} is not built: cmake --preset release && cmake --build --preset release")
    load, threads = os.getloadavg()[0], threads or core_count()
    if load > 0.5:
        click.echo(f"the load average is {load:.1f}: what is measured beside other work says little", err=True)
    steps = 10, 110
    plain = {"dnp": False, "sampler": "ddim"}
    for model in MODELS["default"], *([MODELS["sd15"]] if sd15 else []):
        prepare_model(model)
    works = {
        "image": {"dnp": False},
        "dnp": {"dnp": True},
        "few": {**plain, "steps": steps[0]},
        "many": {**plain, "steps": steps[1]},
    }
    report: dict[str, Any] = {
        "command": " ".join(["python benchmarks/native.py", *sys.argv[1:]]),
        "machine": {
            "processor": processor_name(),
            "cores": threads,
            "system": re.sub(r"-with.*", "", platform.platform()),
            "python": platform.python_version(),
            "load_before": load,
            "made": time.strftime("%Y-%m-%d", time.gmtime()),
        },
        "rounds": rounds,
        "steps": steps,
        "default": measure(MODELS["default"], works, rounds, threads),
    }
    if sd15:
        model, pixels = MODELS["sd15"], 256
        settings = {**plain, "steps": 2, "height": pixels, "width": pixels}
        report["sd15"] = measure(model, {"image": settings}, 2, threads)
        report["sd15"] += measure_cpp(model, 2, pixels, 2, threads)
    write_together({out: (json.dumps(report, indent=1) + "\n").encode()})
    click.echo(table(report))
    if out == RESULTS:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        PAGE.write_text(f"{before}{MARKS[0]}\n{table(report)}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
