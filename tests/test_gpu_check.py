"""``make gpu-check`` and its program: what is refused first, and that each check fails for what it is about.

Nothing here ran on a GPU, see ``fake_gpu``. Whole runs on the fake are in ``test_gpu_sessions``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import dnp
from dnp.engine.backends import device
from dnp.engine.backends.onnxruntime import cuda as ort_cuda
from dnp.engine.backends.session import BackendOptions
from dnp.engine.errors import BackendError
from dnp.engine.system import cuda as cuda_module

REPOSITORY = Path(__file__).parents[1]
NO_DRIVER = "there is no NVIDIA driver here: install one"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_check = load(REPOSITORY / "benchmarks" / "gpu_check.py")


@pytest.fixture
def gpu(gpu, monkeypatch):
    """The fake device, with one batch size to warm up."""
    monkeypatch.setattr(device, "BATCH", 1)
    return gpu


@pytest.fixture
def no_gpu(monkeypatch):
    def refuse(device=0):
        raise BackendError(NO_DRIVER)

    monkeypatch.setattr(cuda_module, "open_cuda", refuse)


@pytest.fixture
def unreached(monkeypatch):
    """What takes long must not be reached."""
    for name in ("check", "Bundle"):
        monkeypatch.setattr(gpu_check, name, None)


@pytest.fixture
def quick(default_bundle):
    """The default bundle with few steps."""
    defaults = default_bundle.defaults
    few = {name: replace(getattr(defaults, name), steps=3) for name in ("final", "dns")}
    return replace(default_bundle, defaults=replace(defaults, **few))


def refused(capsys, *arguments):
    """The exit code of the program, and what it said, which is one sentence."""
    code = gpu_check.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    assert not told.out
    assert told.err.startswith("gpu-check: ")
    assert told.err.count("\n") == 1
    return code, told.err


@pytest.mark.parametrize("backend", ["cpu", "openvino", "tensort"])
def test_a_backend_that_needs_no_gpu_is_refused_before_the_gpu_is_looked_for(capsys, no_gpu, unreached, backend):
    code, told = refused(capsys, "--backend", backend)
    assert code == 2
    assert repr(backend) in told
    assert "tensorrt, tensorrt-rtx, cuda" in told


@pytest.mark.parametrize("batches", [0, -1, 9])
def test_batches_that_no_pipeline_samples_are_refused_first(capsys, no_gpu, unreached, batches):
    code, told = refused(capsys, "--batches", batches)
    assert code == 2
    assert f"from 1 to 8, not {batches}" in told


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--bundle", "/nope"]])
def test_the_gpu_is_looked_for_before_anything_that_takes_long(capsys, no_gpu, unreached, tmp_path, more):
    code, told = refused(capsys, "--out", tmp_path / "new" / "out.json", *more)
    assert code == 4
    assert told == f"gpu-check: {NO_DRIVER}\n"
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_too_old_is_found_first_too(capsys, gpu, unreached):
    gpu.sm = 61
    code, told = refused(capsys, "--dry-run")
    assert code == 4
    assert "too old" in told


def test_a_dry_run_on_a_gpu_ends_well_and_touches_nothing(capsys, gpu, unreached, tmp_path):
    assert gpu_check.main(["--dry-run", "--bundle", "/nope", "--out", str(tmp_path / "new" / "out.json")]) == 0
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["file/out.json", "folder", "x" * 300])
def test_a_report_that_cannot_be_written_is_refused_before_the_run(capsys, gpu, unreached, tmp_path, where):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    code, told = refused(capsys, "--out", tmp_path / where)
    assert code == 6
    assert str(tmp_path) in told
    assert "name another" in told


def test_a_report_that_cannot_be_written_in_the_end_is_printed(capsys, gpu, monkeypatch, tmp_path):
    out = tmp_path / "out.json"

    def check(*_):
        out.mkdir()  # somebody else's, meanwhile
        return {"passed": True, "steps": []}

    monkeypatch.setattr(gpu_check, "check", check)
    monkeypatch.setattr(gpu_check, "table", lambda report: "the table")
    assert gpu_check.main(["--out", str(out)]) == 6
    told = capsys.readouterr()
    table, report = told.out.split("\n", 1)
    assert table == "the table"
    assert json.loads(report) == {"passed": True, "steps": []}
    assert told.err.startswith(f"gpu-check: cannot write {out}: ")


def test_what_there_is_is_kept_after_every_part(gpu, monkeypatch, tmp_path, default_bundle):
    """A part that ends the process, as an abort in a library does, loses nothing of those before it."""
    out = tmp_path / "out.json"
    monkeypatch.setattr(gpu_check, "compare_requests", lambda *_: ({"passed": True, "stages": {}}, {"cold": {}}))
    monkeypatch.setattr(gpu_check, "compare_graphs", lambda *_: {"passed": True})
    monkeypatch.setattr(gpu_check, "captured", lambda *_: pytest.exit("the process ended"))
    with pytest.raises(pytest.exit.Exception):
        gpu_check.check(default_bundle, gpu.properties(), "cuda", tmp_path / "engines", 1, out)
    kept = json.loads(out.read_text())
    assert set(kept["checks"]) == {"request", "graphs"}
    assert not kept["passed"]
    assert {plan["graph"] for plan in kept["plans"]} == set(default_bundle.graphs)


def test_sessions_are_closed_in_many_ways(gpu, monkeypatch, default_bundle):
    monkeypatch.setattr(gpu_check, "CLOSINGS", 1)
    assert gpu_check.close_often(default_bundle, "cuda", BackendOptions()) == {"passed": True, "sessions": 4}
    assert not gpu.device
    assert not gpu.ort.aborts


def spoilt_plain(call, **settings):
    result = call(**settings)
    return replace(result, plain_arrays=255 - result.plain_arrays)


def spoilt_dns(call, **settings):
    """Another DNS image; what follows is right for it, another n* included."""
    return call(**settings, dns_seed=1)


def spoilt_caption(call, **settings):
    """Another n*; what follows is right for it."""
    found, follows = call(**settings), call(**settings, negative="a small green star on a plain blue background")
    return replace(follows, dns_arrays=found.dns_arrays)


def spoilt_dnp(call, **settings):
    result = call(**settings)
    return replace(result, arrays=255 - result.arrays)


@pytest.mark.parametrize(
    ("wrong", "stage"),
    [(None, None), (spoilt_plain, "plain"), (spoilt_dns, "dns"), (spoilt_caption, "n*"), (spoilt_dnp, "dnp")],
)
def test_a_stage_that_is_wrong_fails_alone(monkeypatch, quick, wrong, stage):
    class Wrong(dnp.Pipeline):
        """The cpu backend under another name, with a stage that goes wrong."""

        def __call__(self, prompt, **settings):
            call = super().__call__
            if wrong is None or not settings.get("compare"):
                return call(prompt, **settings)
            return wrong(lambda **changed: call(prompt, **changed), **settings)

    def open_one(bundle, backend, options=None):
        return (dnp.Pipeline if backend == "cpu" else Wrong)(bundle, "cpu")

    monkeypatch.setattr(gpu_check, "Pipeline", open_one)
    found, start = gpu_check.compare_requests(quick, "cuda", BackendOptions())
    assert {name for name, entry in found["stages"].items() if not entry["passed"]} == {stage} - {None}
    assert found["passed"] == (stage is None)
    assert start.keys() == {"cold", "warm"}
    if wrong is spoilt_dns:
        n = found["stages"]["n*"]
        assert n["found"] == n["cpu_of_the_same_image"] != n["cpu_of_its_own_image"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("left_out", [None, "denoise", "encode_image"])
def test_a_graph_that_is_not_captured_is_named(gpu, monkeypatch, quick, left_out):
    capture = ort_cuda.CudaSession.capture

    def capture_some(session, **dims):
        if session.graph.name != left_out:
            capture(session, **dims)

    monkeypatch.setattr(ort_cuda.CudaSession, "capture", capture_some)
    found = gpu_check.captured(quick, "cuda", BackendOptions())
    assert found["passed"] == (left_out is None)
    for name in quick.graphs:
        captured = name != left_out
        assert found[name] == {"captured": captured, "captured_when_eager": False, "passed": captured}
    assert found["images"]["repeats"] and found["images"]["same"] and found["images"]["passed"]


def test_the_table_shows_every_stage_and_every_loop():
    image = {"psnr": 50.0, "bound": 40.0, "passed": True}
    n = {"found": "a cat", "cpu_of_the_same_image": "a dog", "cpu_of_its_own_image": "a cow", "passed": False}
    stages = {"plain": image, "dns": image | {"psnr": 30.0, "passed": False}, "n*": n, "dnp": image}
    loop = {"passed": True}
    report = {
        "backend": "cuda", "gpu": {"name": "FAKE", "sm": 89}, "bundle": {"precision": "fp32"}, "plans": [],
        "start": {}, "steps": [], "passed": False,
        "checks": {
            "graphs": {"passed": True},
            "request": {"passed": False, "runs_on": "fake", "stages": stages},
            "capture": {"passed": False, "denoise": loop, "caption_step": {"passed": False},
                        "images": {**image, "repeats": False, "same": False}},
            "closing": {"passed": False, "sessions": 4},
        },
    }  # fmt: skip
    lines = gpu_check.table(report).splitlines()
    assert "plain   50.0 dB (40)  ok" in lines
    assert "dns     30.0 dB (40)  FAILED" in lines
    assert "n*      'a cat'; cpu of the same image: 'a dog'; cpu of its own image: 'a cow'  FAILED" in lines
    assert "dnp     50.0 dB (40)  ok" in lines
    assert "captured as CUDA graphs: denoise ok, caption_step FAILED" in lines
    assert "as eager runs: 50.0 dB (40), where two captured ones are not the same in every bit either  ok" in lines
    assert "4 sessions closed with work under way: FAILED" in lines


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def make(folder, *arguments, goal="gpu-check"):
    """Make's exit code, and what it wrote to stderr; as from a shell of its own, also under ``make test``."""
    ours = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "BACKEND", "BUNDLE"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        ["make", goal, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.fixture
def workshop(tmp_path):
    """A folder with our Makefile, where the environments are there already, with programs that only note their names.

    Returns the folder, and what reads those notes.
    """
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    for name in (
        "pyproject.toml",
        "setup.py",
        "tests/constraints.txt",
        "dnp/a",
        "engine/a",
        "runtime/a",
        "export/a",
        "serving/a",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    python, export = tmp_path / ".venv-cuda/bin/python", tmp_path / ".venv-test/bin/dnp"
    for program, does in ((python, "test ! -e no-gpu || exit 4"), (export, "mkdir -p $3; touch $3/bundle.json")):
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\necho "$@" >> notes\n{does}\n')
        program.chmod(0o755)
        (program.parents[1] / "installed").touch()
    return tmp_path, lambda: (tmp_path / "notes").read_text().splitlines()


@needs_make
def test_make_looks_for_the_gpu_then_exports_then_checks(workshop):
    folder, notes = workshop
    assert make(folder, "BACKEND=cuda") == (0, "")
    first, export, check = notes()
    assert first == "benchmarks/gpu_check.py --backend cuda --dry-run"
    assert export.startswith("export models/tiny/stable-diffusion build/fp16 ")
    assert check == "benchmarks/gpu_check.py --backend cuda --bundle build/fp16"


@needs_make
def test_make_without_a_gpu_exports_nothing(workshop):
    folder, notes = workshop
    (folder / "no-gpu").touch()
    code, told = make(folder, "BACKEND=cuda")
    assert code == 2
    assert "Error 4" in told
    assert notes() == ["benchmarks/gpu_check.py --backend cuda --dry-run"]


@needs_make
def test_make_takes_a_bundle_that_is_there(workshop):
    folder, notes = workshop
    (folder / "mine").mkdir()
    (folder / "mine" / "bundle.json").touch()
    assert make(folder, "BACKEND=cuda", "BUNDLE=mine") == (0, "")
    assert notes()[1:] == ["benchmarks/gpu_check.py --backend cuda --bundle mine"]


@needs_make
@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("BACKEND=tensort", "BACKEND=tensort is none that runs on a GPU; choose one of tensorrt, tensorrt-rtx, cuda"),
        ("BACKEND=tensorrt cuda", "choose one of tensorrt, tensorrt-rtx, cuda"),
        ("BACKEND=", "choose one of tensorrt, tensorrt-rtx, cuda"),
        ("BUNDLE=/nope", "BUNDLE=/nope holds no bundle.json; name the folder of a bundle, or leave BUNDLE out"),
    ],
)
def test_make_refuses_at_once_what_it_does_not_know(workshop, argument, sentence):
    folder, _ = workshop
    code, told = make(folder, argument)
    assert code == 2
    assert sentence in told
    assert not (folder / "notes").exists()


@needs_make
def test_make_minds_the_backend_only_where_one_is_meant(workshop):
    folder, _ = workshop
    assert make(folder, "--dry-run", "BACKEND=tensort", goal="lint") == (0, "")
