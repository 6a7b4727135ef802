"""README.md, taken at its word: its Python is executed, its commands are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dnp.cli import run

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading, up to the next one."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def block(text: str, language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1]


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = block(section("From Python"), "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    assert "final" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"dnp.png", "dns.png"}


def test_the_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in block(section("From the command line"), "sh").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "dnp"
        if pictures := sorted(tmp_path.glob("out/*-dnp.png")):
            arguments = [str(pictures[0]) if a == "out/PICTURE.png" else a for a in arguments]
        assert run(arguments) == 0, f"{line}\n{capsys.readouterr().err}"


def test_samplers_extras_and_folders_are_the_real_ones():
    from dnp.runtime.sampling.samplers import sampler_names

    listed = README.split("Samplers: ")[1].split(".\n")[0]
    assert tuple(re.findall(r"`(\w+)`", listed)) == sampler_names()
    for folder in re.findall(r"^\| `?(\w+/)", section("The repository"), re.MULTILINE):
        assert (REPOSITORY / folder).is_dir(), folder


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/default-model.md", "models/README.md"])
def test_every_file_that_a_page_names_is_there(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")]
    named = re.findall(r"`((?:tests|benchmarks|engine|runtime|export|dnp|docs)/[\w./-]+\.\w+)`", text)
    for target in linked:
        assert ((REPOSITORY / page).parent / target).exists(), target
    for target in named:
        assert (REPOSITORY / target).exists(), target
