"""benchmarks/gpu_bench: our contender on a stand-in for a GPU, the turns, and the tables. No time is judged."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest

from dnp.engine.backends import device
from dnp.engine.backends.onnxruntime.cuda_plans import build_cuda_plans

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "benchmarks" / "gpu_bench"
sys.path.append(str(FOLDER))  # its files are scripts, and import each other as such

import figures  # noqa: E402


def load(name):
    spec = importlib.util.spec_from_file_location(f"gpu_bench_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench, worker = load("bench"), load("worker")


@pytest.fixture
def gpu(gpu, monkeypatch):
    """The fake device, with two batch sizes."""
    monkeypatch.setattr(device, "BATCH", 2)
    return gpu


def answers(*commands):
    """What the worker says to each command, and its exit code."""
    out = io.StringIO()
    code = worker.serve(io.StringIO("".join(json.dumps(command) + "\n" for command in commands)), out)
    return [json.loads(line) for line in out.getvalue().splitlines()], code


def test_our_contender_does_every_command_on_captured_runs(gpu, default_bundle, tmp_path):
    build_cuda_plans(default_bundle, folder=tmp_path / "plans")
    job = {"bundle": str(default_bundle.path), "plans": str(tmp_path / "plans"), "pixels": 64, "steps": 2, "tokens": 12}
    picture = tmp_path / "picture.npy"
    found, code = answers(
        {"do": "open", "contender": "cuda", **job},
        {"do": "plain", "images": 1, "seed": 1},
        {"do": "picture", "path": str(picture)},
        {"do": "dnp", "images": 2, "seed": 1},
        {"do": "step", "batch": 2},
    )
    assert code == 0
    opened, plain, _, dnp, step = found
    assert opened["seconds"].keys() == {"import", "open", "first"}
    assert "FAKE" in opened["runs_on"]
    assert plain["seconds"] > 0.0
    assert picture.exists()
    assert dnp["negative"]
    assert dnp["phases"].keys() >= {"dns", "caption", "final"}
    assert len(step["ms"]) == worker.BLOCKS
    assert len(step["host_ms"]) == worker.BLOCK
    runs = 4 + worker.BLOCKS * worker.BLOCK + worker.BLOCK
    assert len(set(gpu.ort.captured[-runs:])) == 1  # every one of them is the one that was captured
    assert not gpu.ort.aborts


def test_what_fails_is_answered_with_its_reason():
    found, code = answers({"do": "open", "contender": "cuda", "bundle": "/nope", "plans": "/nope"})
    assert code == 1
    assert found[0]["failed"].startswith("BundleError: ")


class Stub:
    """A worker that answers with numbers of its own name's length; ``cuda-plain`` ends at its second request."""

    asked: list = []  # noqa: RUF012

    def __init__(self, name, log):
        self.name, self.log = name, log
        self.closed = False

    def ask(self, do, **settings):
        Stub.asked.append((self.name, do, settings.get("images", settings.get("batch"))))
        if self.name == "cuda-plain" and do == "dnp":
            raise bench.FailedError("no memory")
        value = float(len(self.name))
        if do == "step":
            return {"ms": [value * settings["batch"]] * 3, "host_ms": [0.05] * 3}
        if do == "open":
            return {"seconds": {"import": 1.0, "open": 2.0, "first": 3.0}, "versions": {"a": "1"}, "runs_on": "a stub"}
        return {"seconds": value} if do in ("plain", "dnp") else {"operations": 1e12, "per_second": 5e14}

    def close(self):
        self.closed = True


@pytest.fixture
def report(monkeypatch, tmp_path):
    """Three rounds of stubs, and the machine that a report names."""
    Stub.asked = []
    monkeypatch.setattr(bench, "Contender", Stub)
    monkeypatch.setattr(bench, "likeness", lambda one, other: 40.0)
    monkeypatch.setattr(bench, "device_memory", iter(range(0, 10**12, 10**9)).__next__)
    found: dict = {}
    names = ["diffusers", "diffusers-compiled", "cuda", "cuda-plain"]
    bench.measure(names, {}, [1, 2, 8], 3, False, tmp_path / "log", tmp_path, found.update)
    machine = {"gpu": "FAKE", "driver": "1", "cores": 1, "python": "3", "made": "2026-01-01"}
    return {
        "machine": machine,
        "command": "x",
        "settings": {"pixels": 8, "steps": 2, "tokens": 3, "rounds": 3},
        **found,
    }


def test_contenders_are_opened_alone_and_measured_in_turns(report):
    order = [name for name, do, _ in Stub.asked if do == "open"]
    assert order == list(report["contenders"])
    rounds = [m for m in report["measured"] if m["do"] == "plain"]
    assert [m["contender"] for m in rounds] == [
        *["diffusers", "diffusers-compiled", "cuda"],
        *["diffusers-compiled", "cuda", "diffusers"],
        *["cuda", "diffusers", "diffusers-compiled"],
    ]
    steps = {(m["contender"], m["batch"]) for m in report["measured"] if m["do"] == "step"}
    assert ("cuda", 2) in steps
    assert ("diffusers-compiled", 2) not in steps  # it compiles for minutes at each
    assert report["contenders"]["cuda-plain"]["failed"] == "no memory"
    assert report["contenders"]["cuda"]["memory"].keys() == {"1", "8"}


def test_the_page_has_medians_ratios_starts_and_what_failed(report, tmp_path):
    path = tmp_path / "gpu-x.json"
    path.write_text(json.dumps(report))
    figures.render(path)
    page = path.with_suffix(".md").read_text()
    assert "| step, batch 8, ms | 72 (72–72) | 0.50 | 144 (144–144) | 1.00 | 32 (32–32) | 0.22 |" in page
    assert "| dnp-engine, `cuda` with plans | 1.00 | 2.00 | 3.00 | 6.00 |" in page
    assert "FAILED: no memory" in page
    assert "25% of 8.0 ms" not in page
    assert "1.00 TFLOP a step and image, at 500 TFLOP/s" in page
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
