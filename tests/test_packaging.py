"""The package as a newcomer installs it: in an environment of its own, with the CPU extra only."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PROMPT = "a large red circle left of a small blue square on a plain yellow background"
ROOMS = ["dnp", "engine", "runtime", "export", "serving", "setup.py", "pyproject.toml", "README.md", "LICENSE"]


def run(*command, cwd, code=0):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize(
    ("backend", "extras"), [("tensorrt", "cpu,tensorrt"), ("tensorrt-rtx", "cpu,tensorrt-rtx"), ("cuda", "gpu,build")]
)
def test_gpu_check_installs_the_backend_and_exports_a_bundle_first(backend, extras):
    if shutil.which("make") is None:
        pytest.skip("no make")
    command = ["make", "--dry-run", "--always-make", "gpu-check", f"BACKEND={backend}"]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    export, check = told.index("dnp export"), told.rindex("gpu_check.py")
    assert told.index(f'".[{extras}]" onnx') < told.index("--dry-run") < export < check
    assert f"--backend {backend} --bundle build/fp16" in told


def test_every_extra_exists_and_none_brings_both_onnxruntimes():
    assert set(metadata("dnp-engine").get_all("Provides-Extra")) == {
        "cpu",
        "openvino",
        "export",
        "serve",
        "ray",
        "bench",
        "build",
        "gpu",
        "tensorrt",
        "tensorrt-rtx",
        "dev",
    }
    by_extra: dict[str, set[str]] = {}
    for line in requires("dnp-engine"):
        name = re.match(r"[\w.-]+", line)[0]
        for extra in re.findall(r'extra == "([\w-]+)"', line) or [""]:
            by_extra.setdefault(extra, set()).add(name)
    assert "onnxruntime" in by_extra["cpu"]
    assert "onnxruntime-gpu" in by_extra["gpu"]
    for extra, names in by_extra.items():
        assert not {"onnxruntime", "onnxruntime-gpu"} <= names, extra
    assert not {"onnxruntime", "onnxruntime-gpu", "torch"} & (by_extra[""] | (by_extra["export"] - {"torch"}))


def test_the_wheel_is_typed_and_holds_the_default_bundle():
    import dnp

    package = Path(dnp.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "default" / "bundle.json").is_file()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A copy of the sources, and the ``bin`` folder of a new environment with ``.[cpu]`` installed from it."""
    folder = tmp_path_factory.mktemp("newcomer")
    sources = folder / "sources"
    sources.mkdir()
    for name in ROOMS:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, sources / name)
    venv.create(folder / "venv", with_pip=True)
    bin_folder = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    run(bin_folder / "pip", "install", "--quiet", f"{sources}[cpu]", cwd=folder)
    return sources, bin_folder


@pytest.mark.slow
def test_the_cpu_extra_alone_generates(installed, tmp_path):
    _, bin_folder = installed
    report = json.loads(run(bin_folder / "dnp", "generate", PROMPT, "--compare", "--json", cwd=tmp_path).stdout)
    assert len(report["images"]) == 4
    assert report["negatives"][0]
    packages = {
        p["name"].lower() for p in json.loads(run(bin_folder / "pip", "list", "--format=json", cwd=tmp_path).stdout)
    }
    assert "onnxruntime" in packages
    assert not packages & {"torch", "diffusers", "transformers", "onnx", "onnxruntime-gpu", "openvino", "scipy"}


@pytest.mark.slow
def test_a_missing_extra_names_the_line_that_adds_it(installed, tmp_path):
    _, bin_folder = installed
    done = run(bin_folder / "dnp", "generate", PROMPT, "--backend", "openvino", cwd=tmp_path, code=4)
    assert "pip install 'dnp-engine[openvino]'" in done.stderr
    done = run(bin_folder / "dnp", "export", "source", "out", "--captioner", "blip", cwd=tmp_path, code=4)
    assert "pip install 'dnp-engine[cpu,export]'" in done.stderr
    backends = {
        b["name"]: b for b in json.loads(run(bin_folder / "dnp", "doctor", "--json", cwd=tmp_path).stdout)["backends"]
    }
    assert backends["cpu"]["works"]
    assert not backends["openvino"]["works"]
    assert "dnp-engine[openvino]" in backends["openvino"]["remedy"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--editable"]])
def test_the_rooms_are_found_from_the_root_of_a_checkout(installed, how):
    sources, bin_folder = installed  # where ./dnp hides the package that is installed
    run(bin_folder / "pip", "install", "--quiet", "--no-deps", *how, sources, cwd=sources)
    rooms = "import dnp.engine, dnp.runtime.pipeline.pipeline, dnp.export; print(dnp.engine.__file__)"
    assert run(bin_folder / "python", "-c", rooms, cwd=sources).stdout.startswith(str(sources))
    assert run(bin_folder / "python", "-m", "dnp", "--version", cwd=sources).stdout.startswith("dnp, version")


@pytest.mark.slow
def test_an_editable_install_works_too(installed, tmp_path):
    sources, bin_folder = installed
    run(bin_folder / "pip", "install", "--quiet", "--editable", f"{sources}[cpu]", cwd=tmp_path)
    code = "import dnp.engine.backends, dnp.runtime.pipeline, dnp.cli; print(dnp.engine.backends.__file__)"
    assert run(bin_folder / "python", "-c", code, cwd=tmp_path).stdout.startswith(str(sources))
    run(bin_folder / "dnp", "generate", PROMPT, "--no-dnp", "--steps", "1", cwd=tmp_path)
