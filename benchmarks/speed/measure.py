"""Workers, interleaved: every round runs each contender once, in a process of its own, so a drift hits all alike."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contenders import CONTENDERS, FIRST
from job import Job, Point
from prepare import HERE, Model, prepare_contender, prepare_environment, python_of, quiet_environment
from tqdm import tqdm

TIMEOUT = 3600.0  # seconds for one worker, which at full size loads, makes some images and may compile
CAPPED_STEPS = 3  # of a contender whose arithmetic the processor does not have


@dataclass(frozen=True)
class Plan:
    """What is measured: the job of every contender but for its name, and how often.

    Attributes:
        points: the sizes that the contenders which scale are timed at in the first round.
        rounds: how often each contender's process is run.
    """

    model: Model
    job: Job
    rounds: int
    points: tuple[Point, ...] = ()


def measure(plan: Plan, names: Sequence[str], keep: Callable[[dict[str, Any]], None]) -> None:
    """Run the plan; who cannot run is in the report with the reason.

    ``keep`` gets ``contenders`` and ``runs`` of the report so far after every run, so that a run of an hour which is
    stopped leaves what it had.
    """
    told: dict[str, dict[str, Any]] = {}
    jobs: dict[str, Job] = {}
    for name in names:
        job, reason = job_of(plan, name)
        reason = reason or prepare_environment(CONTENDERS[name].environment) or prepare_contender(name, job)
        told[name] = {"works": list(job.works), "steps": job.steps, "reason": reason, "agreement": None}
        if not reason:
            jobs[name] = job
    runs: list[dict[str, Any]] = []
    with tqdm(total=plan.rounds * len(jobs), unit="run", disable=None) as bar:
        for turn in range(plan.rounds):
            for name in rotated(list(jobs), turn):
                bar.set_description(f"{plan.model.name}: {name}")
                job = jobs[name] if turn == 0 else jobs[name].with_(points=(), picture="")
                found = run_worker(python_of(CONTENDERS[name].environment), job, TIMEOUT)
                runs.append({"contender": name, "round": turn, "events": found})
                if reason := failure(found):
                    told[name]["reason"] = reason
                    del jobs[name]
                bar.update()
                if FIRST in told:  # else what lies there is of another time
                    told[name]["agreement"] = agreement(picture(plan.job, name), picture(plan.job, FIRST))
                keep({"contenders": told, "runs": runs})
    keep({"contenders": told, "runs": runs})


def job_of(plan: Plan, name: str) -> tuple[Job, str]:
    """The job of one contender, and the reason why it is left out, empty when it is not."""
    entry = CONTENDERS[name]
    job = plan.job.with_(
        contender=name,
        works=tuple(work for work in plan.job.works if work in entry.works) or entry.works,
        points=plan.points if entry.scales else (),
    )
    path = picture(plan.job, name)
    path.unlink(missing_ok=True)
    if "image" in entry.works:
        job = job.with_(picture=str(path))
    if plan.model.name not in entry.sizes:
        return job, "cannot run this model: it knows the published architectures only"
    if entry.needs and not set(entry.needs) & processor_flags():
        lacking = f"this processor has none of {', '.join(entry.needs)}"
        if plan.model.name != FAST_ENOUGH:
            return job, f"left out: {lacking}"
        job = job.with_(works=("steps",), steps=CAPPED_STEPS, repeats=1, picture="")
    return job, ""


FAST_ENOUGH = "default"  # the model on which even arithmetic that is emulated ends in time


def run_worker(python: Path, job: Job, timeout: float) -> list[dict[str, Any]]:
    """The events of one worker; the last one is ``failed`` with the reason when it did not come to its end."""
    command = [str(python), str(HERE / "worker.py")]
    variables = {**quiet_environment(), "OMP_NUM_THREADS": str(job.threads)}
    try:
        done = subprocess.run(
            command, input=job.to_json(), capture_output=True, text=True, errors="replace", timeout=timeout,
            env=variables,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [{"event": "failed", "reason": f"not done after {timeout:.0f} s"}]
    except OSError as error:
        return [{"event": "failed", "reason": f"cannot be started: {error}"}]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode and not failure(found):
        signal = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        last = [line.strip() for line in done.stderr.splitlines() if line.strip()][-1:]
        found.append({"event": "failed", "reason": ": ".join([signal, *last])[:300]})
    return found


def failure(found: Sequence[Mapping[str, Any]]) -> str:
    """Why a worker stopped before its end; empty when it did not."""
    return next((event["reason"] for event in found if event["event"] == "failed"), "")


def rotated(names: list[str], turn: int) -> list[str]:
    """Each round starts one contender later, so that nobody always follows the same one."""
    start = turn % len(names) if names else 0
    return names[start:] + names[:start]


def picture(job: Job, name: str) -> Path:
    """Where a contender leaves its plain image, for comparing."""
    return Path(job.converted) / f"picture-{name}.npy"


def agreement(one: Path, first: Path) -> dict[str, Any] | None:
    """How far two pictures are apart: the largest difference in grey levels and the PSNR in dB, None when equal."""
    if not (one.exists() and first.exists()):
        return None
    a, b = np.load(one).astype(np.float64), np.load(first).astype(np.float64)
    if a.shape != b.shape:
        return {"levels": None, "psnr": None, "shape": list(a.shape)}
    squared = float(((a - b) ** 2).mean())
    return {"levels": float(np.abs(a - b).max()), "psnr": 10 * math.log10(255**2 / squared) if squared else None}


def processor_flags() -> set[str]:
    """What the processor says it can do; empty where the system does not tell."""
    try:
        match = re.search(r"^flags\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return set()
    return set(match[1].split()) if match else set()


def settings(plan: Plan) -> dict[str, Any]:
    """What decides the work, for the report."""
    kept = ("prompt", "pixels", "steps", "seed", "guidance", "dns_guidance", "caption_tokens", "threads", "warmups")
    job = asdict(plan.job)
    return {**{name: job[name] for name in kept}, "sampler": "ddim", "repeats": plan.job.repeats, "rounds": plan.rounds}
