"""The C++ library beside Python's ``dnp`` and stable-diffusion.cpp: start, memory, time outside the network.

``python benchmarks/native.py`` runs each contender's processes in turn, round by round, and writes
benchmarks/results/native.json and the table in docs/embedding.md. It wants ``cmake --preset release`` built. The model
is the shipped one; ``--sd15`` adds Stable Diffusion 1.5's architecture with random weights at 256×256 pixels, which
stable-diffusion.cpp knows too, by its package for Python; it does not know the shipped model's. Getting all that ready
takes the better part of an hour, and some gigabytes in build/bench.

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

from measure import rotated  # noqa: E402
from prepare import MODELS, REPOSITORY, Model, prepare_environment, prepare_model, python_of  # noqa: E402

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
    result = pipeline(**settings)
    seconds = time.perf_counter() - started
peak = re.search(r"^VmHWM:\\s*(\\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
step = result.seconds["final"] / result.request.steps
print(json.dumps({"outside": seconds - inside, "step": step, "memory_bytes": int(peak[1]) << 10}))
"""
CPP = """
import json, re, sys, time
from pathlib import Path
from stable_diffusion_cpp import StableDiffusion
model, settings, threads = json.loads(sys.argv[1])
marks = []
def mark(step, steps, seconds):
    if step and steps == settings["steps"]:
        marks.append(time.perf_counter())
pipeline = StableDiffusion(model_path=model, n_threads=threads, rng_type="cpu", vae_decode_only=True, verbose=False)
pipeline.generate_image(
    prompt=settings["prompt"], cfg_scale=settings["guidance"], sample_steps=settings["steps"], seed=settings["seed"],
    sample_method="ddim_trailing", width=settings["width"], height=settings["height"], progress_callback=mark,
)
peak = re.search(r"^VmHWM:\\s*(\\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
print(json.dumps({"step": (marks[-1] - marks[0]) / (len(marks) - 1), "memory_bytes": int(peak[1]) << 10}))
"""

Figures = dict[str, float]
FIGURES = "seconds", "memory_bytes", "step"
SD15_STEPS, SD15_ROUNDS = 4, 3


def native(bundle: Path, plans: Path, settings: Mapping[str, Any], threads: int) -> Figures:
    """One process of ``dnp-native``: seconds outside the network, without those of opening, of a step, peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "told.json")
        options = {**settings, "plans": plans, "threads": threads, "out": folder, "json": told}
        words = [word for name, value in options.items() for word in (f"--{name}", _text(value)) if name != "prompt"]
        _run([str(COMMAND), "generate", str(bundle), settings["prompt"], *words])
        found = json.loads(told.read_text())
    seconds = found["seconds"]
    outside = seconds["total"] - seconds["open"] - found["inside"]
    step = seconds["final"] / found["request"]["steps"]
    return {"outside": outside, "step": step, "memory_bytes": found["peak_memory_bytes"]}


def python(bundle: Path, plans: Path, settings: Mapping[str, Any], threads: int) -> Figures:
    """The same of Python's ``dnp``."""
    found: Figures = json.loads(
        _run([sys.executable, "-c", PYTHON, json.dumps([str(bundle), str(plans), settings, threads])])
    )
    return found


def cpp(model: Path, _: Path, settings: Mapping[str, Any], threads: int) -> Figures:
    """The same of stable-diffusion.cpp, but for what is outside; a step is between two of its calls of progress."""
    found: Figures = json.loads(
        _run([str(python_of(SD_CPP)), "-c", CPP, json.dumps([str(model), settings, threads])]).splitlines()[-1]
    )
    return found


SD_CPP = "stable-diffusion-cpp"
CONTENDERS: Mapping[str, Callable[[Path, Path, Mapping[str, Any], int], Figures]] = {
    "dnp-native": native,
    "dnp": python,
    SD_CPP: cpp,
}
OURS = ["dnp-native", "dnp"]


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


def measure(
    model: Model, names: list[str], works: Mapping[str, Mapping[str, Any]], rounds: int, threads: int
) -> list[dict[str, Any]]:
    """Every work by every contender in every round: a process each."""
    runs = []
    for turn in range(rounds):
        for name in rotated(names, turn):
            for work, settings in works.items():
                weights = model.source if name == SD_CPP else model.bundle
                started = time.perf_counter()
                figures = CONTENDERS[name](weights, model.plans, {"prompt": PROMPT, "seed": 0, **settings}, threads)
                seconds = time.perf_counter() - started
                runs.append({"contender": name, "work": work, "round": turn, "seconds": seconds, **figures})
                click.echo(f"{turn + 1}/{rounds} {name}, {work}: {seconds:.3f} s", err=True)
    return runs


def pinned_of(environment: str) -> str:
    """The package that an environment is made for, with its version."""
    lines = (SPEED / "requirements" / f"{environment}.txt").read_text().splitlines()
    return next(line for line in lines if not line.startswith("#"))


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
    for name in OURS:
        memory = max(median(runs, name, work, "memory_bytes") for work in ("image", "dnp"))
        outside = step_outside(runs, name, tuple(report["steps"])) * 1e3
        seconds = [median(runs, name, work, "seconds") for work in ("image", "dnp")]
        lines.append(f"| `{name}` | {seconds[0]:.2f} | {seconds[1]:.2f} | {memory / 1e6:.0f} | {outside:.2f} |")
    if large := report.get("sd15"):
        lines += [
            "",
            f"| Stable Diffusion 1.5, 256×256, {SD15_STEPS} steps | process with one plain image, s | most memory, MB "
            "| a step, s |",
            "| --- | --- | --- | --- |",
        ]
        for name in CONTENDERS:
            seconds, memory, step = (median(large, name, "image", figure) for figure in FIGURES)
            lines.append(f"| `{name}` | {seconds:.1f} | {memory / 1e6:.0f} | {step:.2f} |")
        lines += [
            "",
            f"All on {machine['cores']} threads, medians of {SD15_ROUNDS} processes each, of the same random weights. "
            "Ours compute in float32, from plans whose weights are mapped files; stable-diffusion.cpp (of "
            f"`{report['sd_cpp']}`) takes the weights in float16, as they are stored. Its memory has Python's in it, "
            "our steps have the text encoder's. It does not know the default model's architecture.",
        ]
    return "\n".join(lines)


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Processes of each contender.")
@click.option("--threads", type=click.IntRange(1), help="Threads of each; all physical cores if left out.")
@click.option("--sd15", is_flag=True, help="Also Stable Diffusion 1.5's size, beside stable-diffusion.cpp.")
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
    if sd15 and (reason := prepare_environment(SD_CPP)):
        raise click.ClickException(f"{SD_CPP}: {reason}")
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
        "default": measure(MODELS["default"], OURS, works, rounds, threads),
    }
    if sd15:
        settings = {**plain, "steps": SD15_STEPS, "guidance": 4.0, "height": 256, "width": 256}
        report["sd_cpp"] = pinned_of(SD_CPP)
        report["sd15"] = measure(MODELS["sd15"], list(CONTENDERS), {"image": settings}, SD15_ROUNDS, threads)
    write_together({out: (json.dumps(report, indent=1) + "\n").encode()})
    click.echo(table(report))
    if out == RESULTS:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        PAGE.write_text(f"{before}{MARKS[0]}\n{table(report)}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
