"""The ``dnp`` command as its users run it: files, stdout, stderr and exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dnp.cli import run

PROMPT = "a large red circle left of a small blue square on a plain yellow background"
QUICK = ["--steps", "3", "--dns-steps", "2"]
GRAPHS = ["encode_text", "denoise", "decode_latents", "encode_image", "caption_step"]
COMMANDS = ["generate", "dns", "explore", "caption", "export", "build", "inspect", "doctor"]


@pytest.fixture
def dnp(tmp_path, capsys, monkeypatch):
    """Run a command in an empty folder: ``code, stdout, stderr``."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(dnp, command):
    code, out, _ = dnp(command, "--help")
    assert code == 0
    assert "Usage: dnp " + command in out


def test_help_documents_commands_and_exit_codes(dnp):
    code, out, _ = dnp("--help")
    assert code == 0
    for word in [*COMMANDS, "130", "Exit codes"]:
        assert word in out


def test_generate_writes_pictures_and_one_line_of_json(dnp, tmp_path):
    code, out, err = dnp("generate", PROMPT, "--compare", "--json", "--seed", 3, *QUICK)
    assert code == 0, err
    assert out.count("\n") == 1
    report = json.loads(out)
    assert sorted(report["images"]) == files(tmp_path)
    kinds = [Path(p).stem.rsplit("-", 1)[-1] for p in report["images"]]
    assert kinds == ["dnp", "dns", "plain", "compared"]
    assert {"dns", "caption", "plain", "final", "decode", "total"} <= set(report["seconds"])
    assert report["request"]["seed"] == 3
    assert report["negatives"][0]
    assert report["backend"] == "cpu"
    assert report["runs_on"].startswith("cpu (ONNX Runtime")
    for path in report["images"]:
        with Image.open(path) as image:
            image.load()


def test_a_picture_reproduces_itself(dnp, tmp_path):
    _, out, _ = dnp("generate", PROMPT, "--images", 2, "--seed", 5, "--json", *QUICK, "--out", "first")
    picture = json.loads(out)["images"][1]
    code, out, err = dnp("generate", "--from-image", picture, "--out", "second", "--json")
    assert code == 0, err
    assert files(tmp_path / "first") == files(tmp_path / "second")
    for name in files(tmp_path / "first"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_picture_remembers_what_ran_it(dnp, tmp_path):
    """bf16 gives other bits than f32, so that the precision has to come along."""
    arguments = ["--no-dnp", "--steps", 2, "--backend", "openvino", "--precision", "f32", "--json"]
    code, out, err = dnp("generate", PROMPT, *arguments, "--out", "first")
    assert code == 0, err
    code, out, err = dnp("generate", "--from-image", json.loads(out)["images"][0], "--out", "second", "--json")
    assert code == 0, err
    assert "OpenVINO" in json.loads(out)["runs_on"]
    assert (json.loads(out)["backend"], json.loads(out)["precision"]) == ("openvino", "f32")
    (name,) = files(tmp_path / "first")
    assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_from_image_hears_what_is_said_of_the_precision(dnp):
    dnp("generate", PROMPT, "--no-dnp", "--steps", 1)
    code, _, err = dnp("generate", "--from-image", next(Path("out").iterdir()), "--precision", "f8")
    assert code == 4
    assert "f8" in err


def test_from_image_takes_no_other_settings(dnp):
    dnp("generate", PROMPT, "--no-dnp", "--steps", 1)
    picture = next(Path("out").iterdir())
    code, _, err = dnp("generate", "--from-image", picture, "--steps", 7)
    assert code == 2
    assert "steps" in err


@pytest.mark.parametrize("kind", ["missing", "text", "plain png", "foreign settings"])
def test_from_image_refuses_what_is_not_ours(dnp, tmp_path, kind):
    path = tmp_path / "picture.png"
    if kind == "text":
        path.write_text("hello")
    elif kind == "plain png":
        Image.new("RGB", (4, 4)).save(path)
    elif kind == "foreign settings":
        from dnp.runtime.pictures import png

        settings = {"request": {"prompt": "x", "stepz": 3}, "bundle": "0"}
        path.write_bytes(png(Image.new("RGB", (4, 4)), settings))
    code, out, err = dnp("generate", "--from-image", path)
    assert code == 2
    assert not out
    assert "steps" in err if kind == "foreign settings" else "picture.png" in err


def test_dns_gives_the_image_and_its_caption(dnp):
    code, out, err = dnp("dns", PROMPT, "--json", "--dns-steps", 2)
    assert code == 0, err
    report = json.loads(out)
    assert [Path(p).stem.rsplit("-", 1)[-1] for p in report["images"]] == ["dns"]
    code, out, _ = dnp("caption", report["images"][0], "--json")
    assert json.loads(out)["captions"][0]["caption"] == report["negatives"][0]


def test_explore_draws_a_row_for_each_seed(dnp):
    code, out, err = dnp("explore", PROMPT, "--images", 2, "--json", *QUICK)
    assert code == 0, err
    report = json.loads(out)
    assert len(report["negatives"]) == 2
    with Image.open(report["images"][0]) as page:
        assert page.width > 4 * 192
        assert page.height > 2 * 192


def test_caption_reads_pictures_of_any_size_and_mode(dnp):
    for i, (mode, size) in enumerate([("RGB", (200, 77)), ("L", (64, 64)), ("RGBA", (10, 300)), ("P", (64, 65))]):
        Image.new(mode, size).save(f"{i}.png")
    code, out, err = dnp("caption", *[f"{i}.png" for i in range(4)], "--beams", 3, "--json")
    assert code == 0, err
    assert [c["image"] for c in json.loads(out)["captions"]] == [f"{i}.png" for i in range(4)]


def test_several_captions_name_their_pictures(dnp):
    Image.new("RGB", (64, 64)).save("a.png")
    _, one, _ = dnp("caption", "a.png", "--prefix", "a large")
    assert one.startswith("a large")
    _, two, _ = dnp("caption", "a.png", "a.png", "--prefix", "a large")
    assert two == f"a.png: {one}a.png: {one}"


def test_inspect_names_every_graph(dnp):
    code, out, _ = dnp("inspect")
    assert code == 0
    for name in ("encode_text", "denoise", "decode_latents", "encode_image", "caption_step"):
        assert name in out
    code, out, _ = dnp("inspect", "--json")
    assert code == 0
    assert json.loads(out)["graphs"]


def test_doctor_tells_what_works(dnp):
    code, out, _ = dnp("doctor", "--json")
    assert code == 0
    backends = {b["name"]: b for b in json.loads(out)["backends"]}
    assert backends["cpu"]["works"] is True


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        ([], 2, "PROMPT"),
        ([""], 2, "empty"),
        (["x" * 120_000], 2, "characters"),
        ([os.fsdecode(b"\xff\xfe\x00".replace(b"\x00", b"\x80"))], 2, "UTF-8"),
        ([PROMPT, "--steps", "0"], 2, "steps"),
        ([PROMPT, "--steps", "-5"], 2, "steps"),
        ([PROMPT, "--steps", "1000000"], 2, "1000000"),
        ([PROMPT, "--steps", "many"], 2, "many"),
        ([PROMPT, "--guidance", "nan"], 2, "nan"),
        ([PROMPT, "--guidance", "inf"], 2, "inf"),
        ([PROMPT, "--dns-guidance", "-inf"], 2, "inf"),
        ([PROMPT, "--height", "63"], 2, "multiple"),
        ([PROMPT, "--sampler", "dimm"], 2, "ddim"),
        ([PROMPT, "--backend", "cpuu"], 4, "cpu"),
        ([PROMPT, "--threads", "0"], 2, "threads"),
        ([PROMPT, "--threads", "2147483648"], 2, "threads"),
        ([PROMPT, "--precision", "f8"], 4, "f8"),
        ([PROMPT, "--negative", "x", "--no-dnp"], 2, "DNP"),
        ([PROMPT, "--bundle", "nowhere"], 3, "nowhere"),
        ([PROMPT, "--nonsense"], 2, "nonsense"),
    ],
)
def test_bad_input_has_a_code_and_a_sentence_and_leaves_nothing(dnp, tmp_path, arguments, code, word):
    got, out, err = dnp("generate", *arguments)
    assert got == code, err
    assert word in err
    assert "Traceback" not in err
    assert not out
    assert list(tmp_path.iterdir()) == []


def test_a_long_prompt_is_cut_with_a_word_about_it(dnp):
    code, _, err = dnp("generate", PROMPT + " and a dog" * 40, "--no-dnp", "--steps", 1)
    assert code == 0
    assert "left out" in err


def test_an_output_folder_that_is_a_file(dnp, tmp_path):
    (tmp_path / "taken").write_text("mine")
    code, _, err = dnp("generate", PROMPT, "--out", "taken", *QUICK)
    assert code == 6
    assert "taken" in err
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("folder", ["closed/out", "/proc/out"])
def test_an_unwritable_output_folder(dnp, tmp_path, folder):
    (tmp_path / "closed").mkdir(mode=0o500)
    if folder.startswith("closed") and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    code, out, err = dnp("generate", PROMPT, "--out", folder, *QUICK)
    assert code == 6
    assert "cannot write" in err
    assert not out


@pytest.mark.parametrize("damage", ["truncated", "edited", "missing file", "newer", "not json", "empty folder"])
def test_a_damaged_bundle(dnp, tmp_path, default_bundle, damage):
    copy = tmp_path / "bundle"
    shutil.copytree(default_bundle.path, copy)
    graph, manifest = copy / "graphs/denoise.onnx", copy / "bundle.json"
    if damage == "truncated":
        graph.write_bytes(graph.read_bytes()[:-1])
    elif damage == "edited":
        data = bytearray(graph.read_bytes())
        data[len(data) // 2] ^= 1
        graph.write_bytes(data)
    elif damage == "missing file":
        graph.unlink()
    elif damage == "newer":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 99}))
    elif damage == "not json":
        manifest.write_text("{")
    else:
        shutil.rmtree(copy)
        copy.mkdir()
    code, _, err = dnp("generate", PROMPT, "--bundle", copy, "--out", tmp_path / "out", *QUICK)
    assert code == 3
    assert {"newer": "99", "not json": "bundle.json", "empty folder": "bundle.json"}.get(damage, "denoise") in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ["starting", "DNS", "caption", "plain", "final"])
def test_ctrl_c_in_every_phase(tmp_path, when):
    """A real process, a real SIGINT: exit code 130, one line, no file, no traceback."""
    marker = {"starting": None, "DNS": "dns", "caption": "caption", "plain": "plain", "final": "final"}[when]
    code = f"""
import os, signal, sys, time
import dnp.cli, dnp.cli.options as options
marker = {marker!r}
plain = options.Progress.__call__
def interrupting(self, step):
    plain(self, step)
    if step.phase == marker:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
options.Progress.__call__ = interrupting
if marker is None:
    import threading
    threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
dnp.cli.main(["generate", {PROMPT!r}, "--compare", "--steps", "400", "--dns-steps", "{400 if when == "DNS" else 2}"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "dnp: cancelled"
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_a_pictures_place_costs_no_picture(dnp, tmp_path):
    _, out, _ = dnp("generate", PROMPT, *QUICK, "--json")
    final, dns_picture = map(Path, json.loads(out)["images"])
    before = final.read_bytes()
    dns_picture.unlink()
    dns_picture.mkdir()
    code, _, err = dnp("generate", PROMPT, "--steps", 1, "--dns-steps", 1)
    assert code == 6
    assert "directory" in err
    assert final.read_bytes() == before


@pytest.mark.parametrize(
    ("command", "kind"),
    [("generate", "dnp"), ("generate", "dns"), ("generate", "compared"), ("dns", "dns"), ("explore", "explored")],
)
def test_what_cannot_be_written_is_known_before_the_work(dnp, tmp_path, monkeypatch, command, kind):
    from dnp.runtime.pictures import file_name

    path = tmp_path / "out" / f"{file_name(PROMPT)}-0-{kind}.png"
    arguments = [command, PROMPT, "--images", 1, *(["--compare"] if command == "generate" else [])]
    for name in ("run", "dns"):
        monkeypatch.setattr(
            f"dnp.runtime.pipeline.pipeline.Pipeline.{name}", lambda *_, **__: pytest.fail("the work began")
        )
    path.mkdir(parents=True)
    for flag in ([], ["--overwrite"]):
        code, _, err = dnp(*arguments, *flag)
        assert code == 6
        assert "directory" in err
    path.rmdir()
    path.write_text("mine")
    code, _, err = dnp(*arguments)
    assert code == 6
    assert "--overwrite" in err
    assert path.read_text() == "mine"


def test_prompts_that_look_alike_have_pictures_of_their_own(dnp, tmp_path):
    prompts = ["🐱🚀", ".", "a cat", "A cat", f"{PROMPT}, seen from the left", f"{PROMPT}, seen from the right"]
    for prompt in prompts:
        code, _, err = dnp("generate", prompt, "--no-dnp", "--steps", 1)
        assert code == 0, err
    assert len(files(tmp_path)) == len(prompts)


def test_the_same_again_takes_its_place_and_other_settings_only_when_asked(dnp, tmp_path):
    arguments = ["generate", PROMPT, "--no-dnp", "--seed", 4]
    for extra, code in [(["--steps", 1], 0), (["--steps", 1], 0), (["--steps", 2], 6)]:
        got, _, err = dnp(*arguments, *extra)
        assert got == code, err
    assert "(steps)" in err
    (name,) = files(tmp_path)
    before = (tmp_path / name).read_bytes()
    assert dnp(*arguments, "--steps", 2, "--overwrite")[0] == 0
    assert (tmp_path / name).read_bytes() != before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-dnp", "--dns-steps", 3],
        ["--no-dnp", "--dns-eta", 0],
        ["--no-dnp", "--beams", 2],
        ["--negative", "a dog", "--dns-guidance", 2],
        ["--negative", "a dog", "--prefix", "a"],
    ],
)
def test_settings_of_a_pass_that_does_not_run_are_refused(dnp, tmp_path, arguments):
    code, _, err = dnp("generate", PROMPT, *arguments)
    assert code == 2
    assert arguments[0] in err
    assert arguments[-2] in err
    assert not list(tmp_path.iterdir())


def test_from_image_says_when_another_version_runs(dnp, tmp_path):
    from dnp.runtime.pictures import png, read_settings

    _, out, _ = dnp("generate", PROMPT, "--no-dnp", "--steps", 1, "--json")
    picture = Path(json.loads(out)["images"][0])
    settings = read_settings(picture)
    code, _, err = dnp("generate", "--from-image", picture)
    assert code == 0
    assert "differ" not in err
    older = settings["runs_on"].replace("ONNX Runtime 1.", "ONNX Runtime 0.")
    for change, told in [({"runs_on": older}, "ONNX Runtime 0."), ({"version": "0.0.1"}, "dnp-engine 0.0.1")]:
        with Image.open(picture) as image:
            (tmp_path / "old.png").write_bytes(png(image.copy(), {**settings, **change}))
        code, _, err = dnp("generate", "--from-image", "old.png", "--out", "again")
        assert code == 0, err
        assert told in err
        assert "may differ" in err


def test_pictures_that_python_saved_reproduce_themselves(dnp, tmp_path):
    from dnp import OutputError, Pipeline

    result = Pipeline.open()("A cat!", steps=2, dns_steps=1, images=2, compare=True)
    saved = result.save("mine")
    assert [path.name.rsplit("-", 1)[-1] for path in saved] == ["dnp.png"] * 2 + ["dns.png"] * 2 + ["plain.png"] * 2
    assert result.save("mine") == saved
    code, _, err = dnp("generate", "--from-image", saved[3], "--out", "again")
    assert code == 0, err
    for path in saved:
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    (tmp_path / "mine" / saved[0].name).write_text("somebody's")
    with pytest.raises(OutputError, match="overwrite=True"):
        result.save("mine")
    assert result.save("mine", overwrite=True) == saved


def test_a_sheet_reproduces_its_pictures(dnp, tmp_path):
    _, out, _ = dnp("generate", PROMPT, "--compare", *QUICK, "--json")
    code, _, err = dnp("generate", "--from-image", json.loads(out)["images"][-1], "--out", "again")
    assert code == 0, err
    for name in files(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_picture_without_settings_is_told_what_carries_them(dnp, tmp_path):
    Image.new("RGB", (8, 8)).save("bare.png")
    _, _, err = dnp("generate", "--from-image", "bare.png")
    assert "Result.save" in err
    assert "sheet" not in err


def test_a_newer_bundle_is_told_with_advice_that_can_be_followed(dnp, tmp_path, default_bundle):
    manifest = json.loads((default_bundle.path / "bundle.json").read_text())
    newer = {**manifest, "schema": 99, "created_with": {"dnp-engine": "9.8.7"}}
    (tmp_path / "bundle.json").write_text(json.dumps(newer))
    code, _, err = dnp("inspect", tmp_path)
    assert code == 3
    assert "dnp-engine '9.8.7'" in err
    assert "pip install" not in err  # it is on no index


def test_a_folder_that_another_process_tidied_away_is_made_again(tmp_path):
    from dnp.runtime import pictures

    with pictures.output_folder(tmp_path / "out"):
        (tmp_path / "out").rmdir()
        pictures.write_together({tmp_path / "out" / "0.png": b"picture"})
    assert files(tmp_path) == ["out/0.png"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_pictures_that_belong_together_are_written_together(tmp_path, monkeypatch, error):
    from dnp.engine.errors import OutputError
    from dnp.runtime import pictures

    made = []
    real = pictures.tempfile.NamedTemporaryFile

    def failing(**settings):
        made.append(settings)
        if len(made) == 3:
            raise error
        return real(**settings)

    monkeypatch.setattr(pictures.tempfile, "NamedTemporaryFile", failing)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        pictures.write_together({tmp_path / f"{n}.png": b"picture" for n in range(4)})
    assert len(made) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_amid_the_renames_is_answered_after_them(tmp_path, monkeypatch, number):
    from dnp.runtime import pictures

    before = signal.signal(number, signal.default_int_handler)

    real = Path.replace

    def interrupted(self, target):
        os.kill(os.getpid(), number)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            pictures.write_together({tmp_path / f"{n}.png": b"picture" for n in range(3)})
    finally:
        signal.signal(number, before)
    assert files(tmp_path) == ["0.png", "1.png", "2.png"]


def test_who_ignores_ctrl_c_goes_on_ignoring_it():
    """A job that a shell runs in the background ignores SIGINT, and so do its imports and renames."""
    from dnp.engine.system.interrupts import uninterrupted

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def shell(line, folder):
    """A command line run by a real shell; ``dnp`` in it is the installed command."""
    dnp_command = Path(sys.executable).with_name("dnp")
    line = f"set -o pipefail; {line.replace('DNP', str(dnp_command))}"
    return subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("DNP inspect >&-", 0),
        ("DNP inspect 2>&-", 0),
        ("DNP inspect | true", 0),
        ("DNP inspect >/dev/full", 6),
        ("DNP --help >/dev/full", 6),
        ("DNP inspect nope 2>/dev/full", 3),
        ("DNP generate 2>/dev/full", 2),
    ],
)
def test_streams_that_are_closed_or_full(tmp_path, line, code):
    done = shell(line, tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["schedule"].update(beta_start="x"),
        lambda m: m["schedule"].clear(),
        lambda m: m["defaults"]["dns"].update(sampler="zz"),
        lambda m: m["defaults"]["final"].update(guidance=1e39),
    ],
)
def test_a_bundle_whose_own_settings_cannot_run(dnp, tmp_path, default_bundle, change):
    copy = tmp_path / "bundle"
    shutil.copytree(default_bundle.path, copy)
    manifest = json.loads((copy / "bundle.json").read_text())
    change(manifest)
    raw = json.dumps(manifest).encode()
    (copy / "bundle.json").write_bytes(raw)
    (copy / "bundle.sha256").write_text(hashlib.sha256(raw).hexdigest())
    code, _, err = dnp("generate", PROMPT, "--bundle", copy, "--out", tmp_path / "out", *QUICK)
    assert code == 3, err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_from_outside(tmp_path):
    command = [sys.executable, "-c", "from dnp.cli import main; main()", "generate", PROMPT]
    command += ["--steps", "900", "--images", "8"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:  # made when the work begins
        time.sleep(0.05)
    time.sleep(0.5)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"backend": 3}, {"precision": []}, {"bundle": {}}, {"backend": "", "request": 1}])
def test_from_image_refuses_settings_of_the_wrong_kind(dnp, tmp_path, change):
    from dnp.runtime.pictures import png

    settings = {"request": {"prompt": PROMPT}, "bundle": "0" * 16, "backend": "cpu", "precision": None, **change}
    (tmp_path / "edited.png").write_bytes(png(Image.new("RGB", (8, 8)), settings))
    code, _, err = dnp("generate", "--from-image", "edited.png")
    assert code == 2
    assert "no settings of ours" in err


@pytest.mark.parametrize(
    ("size", "mode", "word"),
    [((20_000, 4_000), "1", "shrink"), ((60_000, 1), "L", "shrink"), ((4, 4), "F", "RGB"), ((4, 4), "I;16", "RGB")],
)
def test_pictures_that_would_be_misread_are_refused(dnp, tmp_path, size, mode, word):
    name = "picture.tiff" if mode == "F" else "picture.png"
    Image.new(mode, size).save(tmp_path / name)
    code, _, err = dnp("caption", name)
    assert code == 2
    assert word in err


def test_work_that_fails_leaves_no_folder(dnp, tmp_path):
    code, _, err = dnp("generate", PROMPT, "--no-dnp", "--steps", 2, "--guidance", 1e38, "--out", "new/pictures")
    assert code == 1
    assert "finite" in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_no_possible_name(dnp):
    code, _, err = dnp("generate", PROMPT, *QUICK, "--out", "x" * 300)
    assert code == 6, err
    assert "cannot write" in err


def test_an_n_star_that_is_too_long_is_told(dnp):
    code, _, err = dnp("generate", PROMPT, "--negative", "a small red circle " * 20, "--steps", 1)
    assert code == 0
    assert "the negative prompt is too long" in err


def test_a_working_directory_that_is_gone(tmp_path):
    done = shell("mkdir gone; cd gone; rmdir ../gone; DNP inspect bundle", tmp_path)
    assert done.returncode == 3, done.stderr
    assert "working directory" in done.stderr


@pytest.mark.slow
def test_export_writes_a_bundle_and_tells_how_far_it_is_from_pytorch(dnp, tmp_path, tiny_sd_folder, tiny_blip_folder):
    """The command as a user runs it, in fp16, and the bundle run with nothing but the path."""
    arguments = ["export", tiny_sd_folder, "half", "--captioner", tiny_blip_folder, "--precision", "fp16"]
    code, out, err = dnp(*arguments, "--default", "steps=3", "--default", "dns_steps=2", "--default", "guidance=2.5")
    assert code == 0, err
    table = out.splitlines()
    assert [line.split()[0] for line in table[1:6]] == GRAPHS
    assert "largest error against PyTorch" in table[0]
    assert all(re.search(r" \d\.\de[+-]\d\d \(", line) for line in table[1:6])
    assert table[6].startswith("wrote half in ")
    code, out, err = dnp("generate", "a red circle", "--bundle", "half", "--json")
    assert code == 0, err
    request = json.loads(out)["request"]
    assert (request["steps"], request["dns_steps"], request["guidance"]) == (3, 2, 2.5)
    code, out, _ = dnp("inspect", "half", "--json")
    assert json.loads(out)["precision"] == "fp16"


def test_a_failed_export_has_its_code_and_leaves_nothing(dnp, tmp_path, tiny_blip_folder):
    (tmp_path / "model").mkdir()
    code, _, err = dnp("export", "model", "out", "--captioner", tiny_blip_folder)
    assert code == 5, err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    code, _, err = dnp("export", "model", "out", "--captioner", tiny_blip_folder, "--default", "steps")
    assert code == 2, err


def test_saved_pixels_are_the_results_pixels(dnp):
    from dnp import Pipeline

    _, out, _ = dnp("generate", PROMPT, "--seed", 2, "--json", *QUICK)
    path = json.loads(out)["images"][0]
    with Image.open(path) as image:
        pixels = np.asarray(image)
    assert np.array_equal(pixels, Pipeline.open()(PROMPT, seed=2, steps=3, dns_steps=2).arrays[0])
