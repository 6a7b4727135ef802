"""README.md and docs/, taken at their word: their programs are executed, their commands are run, their files exist."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from dnp.cli import run
from dnp.engine import Bundle, open_session, seal
from dnp.engine.backends import registry
from dnp.runtime.sampling import grids, samplers, settings, solvers

REPOSITORY = Path(__file__).parent.parent
PAGES = ["README.md", "models/README.md", *sorted(f"docs/{page.name}" for page in (REPOSITORY / "docs").glob("*.md"))]
BUNDLE = "my-bundle"

# Commands that are not run here, by how they begin, with what they need.
NOT_RUN = {
    "source .venv/bin/activate": "a shell, after `make demo`",
    "pip install": "the package index; the extras are compared with those there are",
    "make": "minutes; the targets are compared with those there are",
    ".venv-test/bin/pytest": "what runs this",
    "dnp export": "the published models, tested on models of random weights in tests/test_export.py",
    f"dnp build {BUNDLE} --backend tensorrt-rtx": "its compiler and minutes: tests/test_plans.py",
    f"dnp build {BUNDLE} --backend cuda": "a bundle of 512 pixels: tests/test_cuda_plans.py",
    f'dnp generate "an astronaut riding a horse" --bundle {BUNDLE} --backend tensorrt-rtx': "a GPU",
    "dnp serve": "a process that stays: tests/test_serve_command.py",
    "serve run": "Ray and a process that stays: tests/test_ray.py runs what it runs",
    "dnp bench-serve": "a server: tests/test_load.py",
    "apt-get install": "root",
    "native/get-headers.sh": "the network",
    "git clone": "the network",
    "ldconfig": "root",
    "cmake": "minutes, and tests/test_native.py, which builds",
    "dnp-native": "a build: tests/test_native.py",
    "python benchmarks/quality/quality.py": "a CLIP model: tests/test_quality.py runs it with one of random weights",
}


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """The commands of a page's shell blocks, each on one line, without comments."""
    lines = "\n".join(blocks(read(page), "sh")).replace("\\\n", " ").splitlines()
    found = (shlex.join(shlex.split(line, comments=True)) for line in lines)
    return [re.sub(r"(?<= )'([^'\"]+)'(?= |$)", r'"\1"', line) for line in found if line]


def reason_not_run(command: str) -> str | None:
    plain = shlex.split(command)
    fits = [
        start for start in NOT_RUN if plain[: len(words := shlex.split(start))] == words or command.startswith(start)
    ]
    return max(fits, key=len) if fits else None


@pytest.fixture(scope="module")
def quick_bundle(tmp_path_factory) -> Bundle:
    """The default bundle with passes of two steps: the same model, in a fraction of the time."""
    folder = tmp_path_factory.mktemp("docs") / BUNDLE
    shutil.copytree(Bundle.default().path, folder, ignore=shutil.ignore_patterns("plans"))
    manifest = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    for of_pass in manifest["defaults"].values():
        of_pass["steps"] = 2
    del manifest["files"]
    seal(folder, manifest)
    return Bundle.open(folder)


@pytest.fixture
def work(tmp_path, quick_bundle, monkeypatch) -> Path:
    """An empty folder to run in, but for ``my-bundle``, which is also the default bundle meanwhile."""
    shutil.copytree(quick_bundle.path, tmp_path / BUNDLE)
    monkeypatch.setattr(Bundle, "default", classmethod(lambda cls: quick_bundle))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_is_short():
    prose = re.sub(r"^```.*?^```", "", read("README.md"), flags=re.DOTALL | re.MULTILINE)
    assert len(prose.split()) <= 1000  # as `wc -w` counts


@pytest.mark.parametrize("page", [page for page in PAGES if not all(map(reason_not_run, commands(page)))])
def test_the_commands_run(page, work, capsys):
    for command in commands(page):
        if reason_not_run(command):
            continue
        program, *arguments = shlex.split(command)
        assert program == "dnp", command
        if pictures := sorted(work.glob("out/*-dnp.png")):
            arguments = [str(pictures[0]) if a == "out/PICTURE.png" else a for a in arguments]
        assert run(arguments) == 0, f"{command}\n{capsys.readouterr().err}"


def test_every_command_that_is_not_run_is_there():
    there = {reason_not_run(command) for page in PAGES for command in commands(page)}
    assert set(NOT_RUN) <= there


@pytest.mark.parametrize(
    "page",
    [  # those of the other two stand in something else: tests of their own run them
        page
        for page in PAGES
        if page not in ("docs/contributing.md", "docs/serving.md") and blocks(read(page), "python")
    ],
)
def test_the_programs_run(page, work, capsys):
    for number, program in enumerate(blocks(read(page), "python")):
        exec(compile(program, f"{page}, program {number}", "exec"), {})


def test_make_has_the_targets_that_are_named():
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    for page in PAGES:
        named = {command.split()[1] for command in commands(page) if command.startswith("make ")}
        named |= set(re.findall(r"`make ([\w-]+)", read(page)))
        assert named <= targets, page


def test_the_extras_that_are_named_are_there():
    declared = read("pyproject.toml").split("\n[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", declared, re.MULTILINE))
    table = re.findall(r"^\| `([\w-]+)` \|", section("README.md", "Install"), re.MULTILINE)
    assert extras == set(table)
    for page in PAGES:
        named = {name for group in re.findall(r"\.\[([\w,-]+)\]", read(page)) for name in group.split(",")}
        assert named <= extras, page


def test_the_samplers_that_are_named_are_there():
    listed = read("docs/requests.md").split("Samplers: ")[1].split(". ")[0]
    assert tuple(re.findall(r"`(\w+)`", listed)) == samplers.sampler_names()


def test_the_guidance_methods_that_are_named_are_there():
    listed = read("docs/requests.md").split("| `--method NAME=VALUE` |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", listed, re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(samplers.METHODS)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page):
    text = read(page)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = ((REPOSITORY / page).parent / path) if path else REPOSITORY / page
        assert file.exists(), target
        if heading:
            assert heading in anchors(file.read_text(encoding="utf-8")), target
    for target in re.findall(
        r"`((?:tests|benchmarks|engine|runtime|export|serving|deploy|dnp|docs|models)/[\w./-]+\.\w+)`", text
    ):
        assert (REPOSITORY / target).exists() or target == "engine/backends/reference.py", target


def test_the_index_has_every_page():
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", read("docs/README.md")))
    assert {f"docs/{page}" for page in linked} == {page for page in PAGES if page.startswith("docs/")} - {
        "docs/README.md"
    }


def test_architecture_shows_the_manifest_and_the_table_as_they_are(default_bundle):
    from dnp.engine.bundle.bundle import MANIFEST
    from dnp.engine.bundle.columns import ROW
    from dnp.engine.bundle.contract import signatures

    page = read("docs/architecture.md")
    shown = json.loads(re.sub(r"//.*", "", blocks(page, "jsonc")[0]))
    real = json.loads((default_bundle.path / MANIFEST).read_text(encoding="utf-8"))
    assert list(shown) == list(real) or set(shown) == set(real)
    for part in ("text", "conditioning", "guidance", "latents", "caption", "defaults"):
        assert shown[part].keys() == real[part].keys(), part
    assert f"`[P, S, {ROW}]`" in page and f", {ROW} of them" in page
    for name, (inputs, outputs) in signatures(default_bundle).items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` | `"))
        assert all(f"`{tensor}`" in row for tensor in (*inputs, *outputs)), name


def section(page: str, title: str) -> str:
    """The text under a heading, up to the next one of its kind."""
    return read(page).split(f"\n## {title}\n")[1].split("\n## ")[0]


def anchors(text: str) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def entry(text: str, room: object) -> dict:
    """A line of a table in the contributor's page, evaluated where it would stand."""
    return eval("{" + text + "}", dict(vars(room)))


# diffusers mixes numpy and torch in a way that numpy 2 warns about.
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_the_sampler_of_the_contributor_s_page_is_diffusers_own(monkeypatch):
    import torch
    from diffusers import KDPM2DiscreteScheduler

    from dnp.engine.bundle import columns as c
    from dnp.runtime.sampling.noise import TorchNoise
    from dnp.runtime.sampling.samplers import sampler_table
    from dnp.runtime.sampling.schedule import NoiseSchedule

    algorithm, honoured, named = blocks(section("docs/contributing.md", "Add a sampler"), "python")
    exec(algorithm, vars(solvers))
    monkeypatch.setitem(settings.SCHEDULERS, *entry(honoured, settings).popitem())
    monkeypatch.setitem(grids.SAMPLERS, *entry(named, grids).popitem())
    monkeypatch.delattr(solvers, "dpm2")  # not left behind
    shape, mix = (4, 3, 3), np.random.default_rng(0).normal(0, 0.5, (4, 4)).astype(np.float32)

    def network(x: np.ndarray, t: float) -> np.ndarray:
        return np.tanh(np.tensordot(mix, x, 1) + np.float32(np.sin(t / 100)))

    declared = inspect.signature(KDPM2DiscreteScheduler.__init__).parameters.keys() - {"self"}
    assert declared == {*settings.SCHEDULERS["KDPM2DiscreteScheduler"], *settings.SCHEDULE_KEYS} & declared
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    for prediction in ("epsilon", "v_prediction"):
        theirs = KDPM2DiscreteScheduler(**config, prediction_type=prediction)
        schedule = NoiseSchedule.from_config({**config, "prediction_type": prediction})
        for steps in (1, 2, 7):
            theirs.set_timesteps(steps)
            noise = TorchNoise(5).randn(shape)
            latents = torch.from_numpy(noise) * theirs.init_noise_sigma
            for t in theirs.timesteps:
                o = network(theirs.scale_model_input(latents, t).numpy(), t.item())
                latents = theirs.step(torch.from_numpy(o), t, latents).prev_sample
            table = sampler_table(schedule, "dpm2", steps, 1.0)
            state = np.zeros((c.SLOTS, *shape), np.float32)
            state[0] = noise * np.float32(table.init_noise_sigma)
            for row in table.rows:
                o = network(np.tensordot(row[c.INPUT], state, 1), row[c.TIMESTEP])
                state = np.tensordot(row[c.STATE].reshape(c.SLOTS, -1), state, 1) + np.multiply.outer(row[c.OUTPUT], o)
            np.testing.assert_allclose(state[0], latents.numpy(), rtol=1e-4, atol=1e-4)


def test_the_family_of_the_contributor_s_page_is_read(tmp_path, monkeypatch):
    import families

    from dnp.export.families import source

    (line,) = blocks(section("docs/contributing.md", "Add a family"), "python")
    monkeypatch.setattr(source, "FAMILIES", {**source.FAMILIES, **entry(line, source)})
    folder = families.build("lcm", tmp_path / "lcm")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "LatentConsistencyModelPipeline"}))
    found = source.read_source(folder)
    assert found.family.name == "latent-consistency" and found.embedded


def test_the_backend_of_the_contributor_s_page_computes(default_bundle, tmp_path, monkeypatch):
    code, line = blocks(section("docs/contributing.md", "Add a backend"), "python")
    name = "dnp.engine.backends.reference"
    (tmp_path / "reference.py").write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, tmp_path / "reference.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(registry._BACKENDS, *entry(line, registry).popitem())

    ids = np.random.default_rng(0).integers(0, 500, (2, default_bundle.text.length))
    found = {}
    for backend in ("cpu", "reference"):
        with open_session(default_bundle, "encode_text", backend) as session:
            session.reshape(batch=2, tokens=ids.shape[1])
            session.inputs["ids"].write(ids)
            session.run()
            found[backend] = session.outputs["embeddings"].read()
    np.testing.assert_allclose(found["reference"], found["cpu"], atol=1e-4)
    report = next(report for report in registry.doctor() if report.name == "reference")
    assert report.works, asdict(report)
