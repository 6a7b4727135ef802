"""The speed on a GPU beside PyTorch: ``make gpu-bench``, or ``python benchmarks/gpu_bench/bench.py``.

Stable Diffusion 1.5 and BLIP base at full size, random weights, fp16. Every contender is a process of its own, which
is opened, warmed up and looked at alone; then their requests alternate. Writes benchmarks/results/gpu-NAME.json after
every answer, and from it a table and a plot.
"""

from __future__ import annotations

import json
import os
import platform
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from figures import render
from rivals import CONTENDERS, EAGER, installed

from dnp.engine.errors import DnpError
from dnp.engine.system.cuda import open_cuda
from dnp.engine.system.files import write_together

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
WORK = REPOSITORY / "build" / "gpu-bench"
PIXELS, STEPS, TOKENS = 512, 25, 20
BATCHES = (1, 2, 4, 8)
FEWER = {"diffusers-compiled": (1, 8), "cuda-plain": (1,)}  # batches of those that compile for minutes, or take 40 GB
MANY = 8  # images of the request for many
PATIENCE = 420.0  # seconds for one answer; compiling is part of some


class FailedError(Exception):
    """A contender that gave no answer, with the reason."""


class Contender:
    """A worker process: ``ask`` sends a command and waits for the answer."""

    def __init__(self, name: str, log: Path) -> None:
        self.name, self._log = name, log.open("ab")
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True, env={**os.environ, **quiet},
        )  # fmt: skip

    def ask(self, do: str, **settings: Any) -> dict[str, Any]:
        """The answer to a command. Raises FailedError when there is none."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **settings}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise FailedError(f"ended with {self._process.wait()} before {do!r}") from None
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        if not ready:
            raise FailedError(f"no answer to {do!r} after {PATIENCE:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise FailedError(f"ended with {self._process.wait()} at {do!r}; see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise FailedError(answer["failed"])
        return answer

    def close(self) -> None:
        """End the process, in good order where it can be."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=WORK, help="Models, bundle, plans; made if missing.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Where the results go.")
@click.option("--name", default="sd15", help="Of the results: gpu-NAME.json and so on.")
@click.option("--only", "names", type=click.Choice(list(CONTENDERS)), multiple=True, help="Contenders; else all.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=BATCHES, help="Of steps.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Times that everything is measured, in turns.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", help="Of PyTorch; cpu tries the program.")
@click.option("--pixels", type=click.IntRange(8), default=PIXELS)
@click.option("--steps", type=click.IntRange(1), default=STEPS, help="Denoising steps of a pass.")
@click.option("--profile", is_flag=True, help="Also tell the kernels of a step, in gpu-NAME-kernels.json.")
def main(
    work: Path,
    out: Path,
    name: str,
    names: tuple[str, ...],
    batches: tuple[int, ...],
    rounds: int,
    device: str,
    pixels: int,
    steps: int,
    profile: bool,
) -> None:
    """Measure, write the results, and render them."""
    work = work.resolve()
    chosen = [one for one in installed() if not names or one in names]
    job = {
        "model": str(work / "sd15"), "captioner": str(work / "blip"), "bundle": str(work / "bundle"),
        "plans": str(work / "plans"), "device": device, "pixels": pixels, "steps": steps, "tokens": TOKENS,
    }  # fmt: skip
    try:
        report = {"machine": machine(device), "command": command(), "settings": {**job, "rounds": rounds}}
        prepare(work)
    except DnpError as error:
        click.echo(f"gpu-bench: {error}", err=True)
        sys.exit(error.exit_code)
    out.mkdir(parents=True, exist_ok=True)
    files = {kind: out / f"gpu-{name}{kind}" for kind in (".json", "-kernels.json", ".log")}

    kernels: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> None:
        kernels.update({one: facts.pop("kernels") for one, facts in found["contenders"].items() if "kernels" in facts})
        texts = {files[".json"]: {**report, **found}}
        if kernels:
            texts[files["-kernels.json"]] = kernels
        write_together({path: (json.dumps(text, indent=1) + "\n").encode() for path, text in texts.items()})

    measure(chosen, job, sorted(set(batches)), rounds, profile, files[".log"], work, keep)
    render(files[".json"])


def measure(
    names: Sequence[str],
    job: dict[str, Any],
    batches: Sequence[int],
    rounds: int,
    profile: bool,
    log: Path,
    pictures: Path,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Open every contender by itself, then have their requests alternate; ``keep`` gets what there is so far."""
    contenders: dict[str, Contender] = {}
    told: dict[str, dict[str, Any]] = {}
    found: list[dict[str, Any]] = []

    def failing(name: str, work: Any) -> None:
        try:
            work(contenders[name])
        except FailedError as error:
            told[name]["failed"] = str(error)
            say(f"{name}: {error}")
            contenders.pop(name).close()
        keep({"contenders": told, "measured": found})

    def tasks(name: str) -> list[dict[str, Any]]:
        mine = [batch for batch in batches if batch in FEWER.get(name, batches)]
        steps = [{"do": "step", "batch": batch} for batch in mine]
        one = [{"do": kind, "images": 1} for kind in ("plain", "dnp")]
        return [*one, *steps, *({"do": "dnp", "images": batch} for batch in mine if batch == max(batches) > 1)]

    def prepared(name: str) -> Any:
        def work(contender: Contender) -> None:
            before = device_memory()
            told[name] |= contender.ask("open", contender=name, **job)
            say(f"{name}: {told[name]['seconds']}")
            if name == EAGER:
                told[name]["ceiling"] = contender.ask("ceiling")
            for task in tasks(name):
                images = task.get("images", task.get("batch"))
                if images == 1:
                    contender.ask(**task, **({} if task["do"] == "step" else {"seed": 1}))
            contender.ask("plain", images=1, seed=7)
            contender.ask("picture", path=str(pictures / f"{name}.npy"))
            told[name]["picture"] = likeness(pictures / f"{name}.npy", pictures / f"{EAGER}.npy")
            told[name]["memory"] = {"1": held(before)}
            for task in tasks(name):
                if task.get("images", task.get("batch")) > 1:
                    contender.ask(**task, **({} if task["do"] == "step" else {"seed": 1}))
            if max(batches) > 1:
                told[name]["memory"][str(max(batches))] = held(before)
            if profile:
                told[name]["kernels"] = {
                    batch: contender.ask("profile", batch=batch)["kernels"]
                    for batch in (1, max(batches))
                    if {"do": "step", "batch": batch} in tasks(name)
                }

        return work

    def measured(name: str, task: dict[str, Any], turn: int) -> Any:
        def work(contender: Contender) -> None:
            seed = {} if task["do"] == "step" else {"seed": 100 + turn}
            found.append({"contender": name, "round": turn, **task, **contender.ask(**task, **seed)})

        return work

    try:
        for name in names:
            say(f"opening {name}")
            told[name], contenders[name] = {}, Contender(name, log)
            failing(name, prepared(name))
        for turn in range(rounds):
            everything = {json.dumps(task): task for name in contenders for task in tasks(name)}
            for task in everything.values():
                order = list(contenders)
                for name in [*order[turn % max(1, len(order)) :], *order[: turn % max(1, len(order))]]:
                    if task in tasks(name):
                        failing(name, measured(name, task, turn))
            say(f"round {turn + 1} of {rounds}: done")
    finally:
        for contender in contenders.values():
            contender.close()


def likeness(one: Path, other: Path) -> float | None:
    """How near a picture is to another, as PSNR in dB, at most 99; None where there is no other."""
    if not other.exists():
        return None
    error = float(((np.load(one).astype(float) - np.load(other)) ** 2).mean())
    return min(99.0, 10 * float(np.log10(255**2 / error))) if error else 99.0


def device_memory() -> int | None:
    """Bytes of the GPU's memory that are in use, by all processes; None where nobody tells."""
    try:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return int(told.split()[0]) << 20


def held(before: int | None) -> int | None:
    """Bytes that are in use beyond those of ``before``: one contender's, as no other does anything meanwhile."""
    now = device_memory()
    return None if before is None or now is None else now - before


def prepare(work: Path) -> None:
    """The models, the bundle and its plans, where they are missing."""
    dnp = Path(sys.executable).with_name("dnp")
    runs: dict[Path, list[object]] = {
        work / "blip": [sys.executable, HERE.parent / "random_models.py", work],
        work / "bundle": [
            dnp, "export", work / "sd15", work / "bundle", "--captioner", work / "blip", "--precision", "fp16",
        ],
        work / "plans": [dnp, "build", work / "bundle", "--backend", "cuda", "--plans", work / "plans"],
    }  # fmt: skip
    for made, words in runs.items():
        if not made.exists():
            say(f"making {made}")
            subprocess.run(list(map(str, words)), check=True)


def machine(device: str) -> dict[str, Any]:
    """What it runs on. Raises BackendError where there is no GPU to run on."""
    facts: dict[str, Any] = {"gpu": "none, a trial of the program", "driver": ""}
    if device == "cuda":
        facts = {"gpu": open_cuda().properties().name}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        **facts,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def command() -> str:
    """The command line, as one would type it in the repository."""
    return " ".join(["python benchmarks/gpu_bench/bench.py", *map(shlex.quote, sys.argv[1:])])


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
