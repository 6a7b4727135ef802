"""Plans of the ``cpu`` backend: the same numbers as the graphs they are made of, and never used when in doubt."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
import pytest

from dnp import Pipeline
from dnp.cli import run
from dnp.engine.backends.onnxruntime.cpu import build_cpu_plans, plan_spec
from dnp.engine.backends.onnxruntime.session import OrtSession
from dnp.engine.backends.registry import open_session
from dnp.engine.backends.session import BackendOptions
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.errors import BackendError, BundleError, Cancelled, OutputError
from dnp.engine.plans.store import PlanStore
from dnp.engine.system.background import in_background

DNP = str(Path(sys.executable).with_name("dnp"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A copy of the default bundle, with plans."""
    folder = tmp_path_factory.mktemp("planned") / "default"
    shutil.copytree(Bundle.default().path, folder, ignore=shutil.ignore_patterns("plans"))
    opened = Bundle.open(folder)
    build_cpu_plans(opened)
    return opened


@pytest.fixture
def folder(bundle, tmp_path):
    """A folder with a plan of ``encode_text`` that a test may spoil."""
    (plan,) = build_cpu_plans(bundle, graphs=["encode_text"], folder=tmp_path / "plans")
    return plan.path.parent


def run_graph(session, seed):
    """Its outputs for random inputs of a random size."""
    rng = np.random.default_rng(seed)
    sides = {"height": 16, "width": 8, "image_height": 40, "image_width": 72, "tokens": 32, "images": 2}
    sides["sequences"] = 2 + 2 * (seed % 2)
    session.reshape(**{name: sides.get(name, 3) for name in session.graph.symbols})
    for buffer in session.inputs.values():
        if buffer.dtype.kind == "f":
            buffer.write(rng.standard_normal(buffer.shape).astype(buffer.dtype))
        else:
            buffer.write(np.full(buffer.shape, seed % 2, buffer.dtype))
    session.run()
    return {name: buffer.read() for name, buffer in session.outputs.items()}


@pytest.mark.parametrize("graph", ["encode_text", "denoise", "decode_latents", "encode_image", "caption_step"])
def test_a_plan_computes_bit_for_bit_what_its_graph_does(bundle, tmp_path, graph):
    with (
        open_session(bundle, graph, options=BackendOptions(plans=tmp_path)) as plain,
        open_session(bundle, graph) as planned,
    ):
        assert planned.backend == plain.backend.replace(")", ", plan)")
        for seed in range(4):
            expected, found = run_graph(plain, seed), run_graph(planned, seed)
            assert expected.keys() == found.keys()
            for name, array in expected.items():
                assert np.isfinite(array).all()
                np.testing.assert_array_equal(array, found[name])


def test_a_request_gives_the_same_picture_and_words(bundle, tmp_path):
    settings = {"prompt": "a red circle", "seed": 5, "steps": 3, "dns_steps": 3}
    with Pipeline.open(bundle.path) as planned, Pipeline.open(Bundle.default().path, plans=tmp_path) as plain:
        one, other = planned(**settings), plain(**settings)
    assert one.negatives == other.negatives
    for mine, its in zip(one.images, other.images, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(its))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_weights_are_mapped_and_not_copied(bundle):
    with open_session(bundle, "denoise") as session:
        run_graph(session, 0)
        mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".weights" in line]
        spans = [[int(end, 16) for end in span.split("-")] for span, *_ in mapped]
    (weights,) = plan_path(bundle, "denoise").parent.glob("denoise-*.weights")
    assert {fields[-1] for fields in mapped} == {str(weights)}
    assert sum(end - start for start, end in spans) > weights.stat().st_size / 2  # weights that were packed are not


def plan_path(bundle, graph):
    plan, reason = PlanStore(bundle.path / "plans").find(plan_spec(bundle, bundle.graph(graph)))
    assert not reason
    return plan.path


def test_a_plan_that_is_there_is_not_built_again_unless_told_so(bundle, folder):
    (before,) = folder.glob("*.plan")
    said = []
    (again,) = build_cpu_plans(bundle, graphs=["encode_text"], folder=folder, report=said.append)
    assert (again.path, said) == (before, [f"encode_text: there already, {before.name}"])
    said.clear()
    stamp = before.stat().st_mtime_ns
    build_cpu_plans(bundle, graphs=["encode_text"], folder=folder, force=True, report=said.append)
    assert before.stat().st_mtime_ns > stamp
    (line,) = said
    assert re.fullmatch(r"encode_text: optimising \d+ MB, about [\d.]+ GB of memory and [\d.]+ GB of disk", line)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-4096])


def of_another_version(path):
    sidecar = json.loads(path.read_text())
    sidecar["spec"]["version"] = "1.0.0"
    path.write_text(json.dumps(sidecar))


def without_its_hash(path):
    sidecar = json.loads(path.read_text())
    sidecar["weights"] = {"size": 1}
    path.write_text(json.dumps(sidecar))


@pytest.mark.parametrize(
    ("ending", "spoil", "reason"),
    [
        (".weights", flip, r"\.weights is damaged: its SHA-256 differs"),
        (".weights", shorten, r"\.weights is damaged: \d+ bytes, wanted are \d+"),
        (".weights", Path.unlink, r"\.weights cannot be read"),
        (".plan", flip, r"\.plan is damaged: its SHA-256 differs"),
        (".json", of_another_version, r"version is 1\.0\.0, wanted is "),
        (".json", Path.unlink, r"no sidecar that can be read"),
        (".json", without_its_hash, r"no sidecar that can be read"),
    ],
)
def test_a_plan_in_doubt_is_named_and_not_used(bundle, folder, caplog, ending, spoil, reason):
    (path,) = folder.glob(f"*{ending}")
    spoil(path)
    caplog.set_level(logging.WARNING, "dnp.engine")
    with open_session(bundle, "encode_text", options=BackendOptions(plans=folder)) as session:
        assert "plan" not in session.backend
        run_graph(session, 0)
    (record,) = caplog.records
    remedy = f"dnp build {bundle.path} --backend cpu --plans {folder}"
    told = rf"encode_text: opened without its plan: .*{reason}.*; build it again: {re.escape(remedy)}"
    assert re.fullmatch(told, record.message)
    said = []
    build_cpu_plans(bundle, graphs=["encode_text"], folder=folder, report=said.append)
    assert re.search(rf"building, since .*{reason}", said[0])
    with open_session(bundle, "encode_text", options=BackendOptions(plans=folder)) as session:
        assert session.backend.endswith(", plan)")


def test_a_plan_of_another_processor_is_not_used(bundle, folder, caplog, monkeypatch):
    monkeypatch.setattr("dnp.engine.backends.onnxruntime.cpu.processor_features", lambda: ("avx512f",))
    with open_session(bundle, "encode_text", options=BackendOptions(plans=folder)) as session:
        assert "plan" not in session.backend
    assert "architecture is" in caplog.text


def test_no_plans_is_nothing_to_speak_of(bundle, tmp_path, caplog):
    with open_session(bundle, "encode_text", options=BackendOptions(plans=tmp_path / "none")) as session:
        assert "plan" not in session.backend
    assert not caplog.records
    assert not (tmp_path / "none").exists()


def test_without_a_gpu_the_plans_are_the_processors(bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = ["build", str(bundle.path), "--plans", str(tmp_path), "--graph", "encode_text"]
    assert run([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "'cpu'" in err
    (plan,) = json.loads(out)["plans"]
    assert plan["spec"]["backend"] == "cpu"
    assert run([*command, "--batch", "4"]) == 2
    assert "--batch is for TensorRT" in capsys.readouterr().err


def test_the_commands(bundle, tmp_path, capsys):
    folder = ["--plans", str(tmp_path / "plans")]
    assert run(["build", str(bundle.path), "--backend", "cpu", *folder, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["plans"]
    assert [plan["spec"]["graph"] for plan in listed] == list(bundle.graphs)
    assert all(plan["statistics"]["weights_bytes"] and plan["statistics"]["seconds"] for plan in listed)
    assert run(["inspect", str(bundle.path), *folder, "--layers"]) == 0  # only plans of TensorRT have any
    page = capsys.readouterr().out
    assert page.count("profile   every size") == len(bundle.graphs)
    assert page.count("mapped into memory") == len(bundle.graphs)
    assert "GPU" not in page.split("plans\n")[1]
    out = tmp_path / "out"
    command = ["generate", "a red circle", "--bundle", str(bundle.path), "--steps", "2", "--dns-steps", "2"]
    assert run([*command, "--out", str(out), *folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs_on"].endswith(", plan)")
    assert len(list(out.glob("*.png"))) == 2


@pytest.mark.parametrize(
    "option", [["--sm", "89"], ["--batch", "4"], ["--refit"], ["--workspace", "1"], ["--device", "0"]]
)
def test_options_of_tensorrt_are_refused(bundle, option, capsys):
    assert run(["build", str(bundle.path), "--backend", "cpu", *option]) == 2
    assert f"{option[0]} is for TensorRT; plans of the backend 'cpu' take every size" in capsys.readouterr().err


def test_a_plan_that_is_whole_and_does_not_open_is_named_and_not_used(bundle, folder, caplog):
    (path,) = folder.glob("*.plan")
    path.write_bytes(b"no graph")
    sidecar = json.loads(path.with_suffix(".json").read_text())
    sidecar |= {"size": 8, "sha256": hashlib.sha256(b"no graph").hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    options = BackendOptions(plans=folder)
    with open_session(bundle, "encode_text", options=options) as session:
        assert "plan" not in session.backend
        run_graph(session, 0)
    (record,) = caplog.records
    assert re.search(rf"{path.name} does not open: .*; build it again: dnp build .* --force --graph", record.message)
    command = record.message.split("build it again: ")[1].split()
    assert run(command[1:]) == 0
    with open_session(bundle, "encode_text", options=options) as session:
        assert session.backend.endswith(", plan)")


def test_a_precision_that_it_lacks_is_no_fault_of_the_plan(bundle, folder, caplog):
    with pytest.raises(BackendError, match="has no precision 'bf16'"):
        open_session(bundle, "encode_text", options=BackendOptions(plans=folder, precision="bf16"))
    assert not caplog.records


def test_a_folder_that_cannot_be_looked_into_is_named(bundle, caplog):
    unreadable = Path("/" + "a" * 300)  # whatever the system refuses: a folder without permission is none for root
    with open_session(bundle, "encode_text", options=BackendOptions(plans=unreadable)) as session:
        assert "plan" not in session.backend
    assert re.search(r"opened without its plan: .* cannot be read \(File name too long\)", caplog.text)


@pytest.mark.skipif(sys.platform == "win32", reason="a working folder cannot be removed there")
def test_a_working_folder_that_is_gone(bundle, tmp_path):
    code = """
import os, sys
from dnp import Pipeline
os.rmdir(os.getcwd())
with Pipeline.open(sys.argv[1], plans="plans") as pipeline:
    print(pipeline("a red circle", steps=1, dns_steps=1).negatives)
"""
    (tmp_path / "gone").mkdir()
    command = [sys.executable, "-c", code, str(bundle.path)]
    told = subprocess.run(command, cwd=tmp_path / "gone", capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, ""), told.stderr


def test_no_plans_where_the_system_does_not_tell_what_the_processor_can_do(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("dnp.engine.backends.onnxruntime.cpu.processor_features", tuple)
    with pytest.raises(BackendError, match=r"does not tell what its processor can do.*opens the graphs themselves"):
        build_cpu_plans(bundle, folder=tmp_path / "plans")
    assert not (tmp_path / "plans").exists()


def test_plans_that_are_built_again_while_others_open_them(bundle, folder, caplog):
    """A plan never meets the weights of another build, and what was verified can be opened."""
    options, errors = BackendOptions(plans=folder), []

    def build_again():
        try:
            for _ in range(12):
                build_cpu_plans(bundle, graphs=["encode_text"], folder=folder, force=True)
        except Exception as error:
            errors.append(error)

    with open_session(bundle, "encode_text") as session:
        expected = run_graph(session, 1)["embeddings"]
    builder = threading.Thread(target=build_again)
    builder.start()
    opened = 0
    while builder.is_alive():
        with open_session(bundle, "encode_text", options=options) as session:
            np.testing.assert_array_equal(run_graph(session, 1)["embeddings"], expected)
        opened += 1
    builder.join()
    assert not errors
    assert opened > 1
    assert all("does not open" in record.message or "cannot be read" in record.message for record in caplog.records)
    with open_session(bundle, "encode_text", options=options) as session:
        assert session.backend.endswith(", plan)")
    assert len(list(folder.glob("*.weights"))) == 1


@pytest.mark.parametrize("last", [".weights", ".json"])
def test_a_plan_survives_the_failure_of_the_next_one(bundle, folder, monkeypatch, last):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    replace_file = Path.replace

    def fail(self, target):
        if self.suffix == last:
            raise OSError(28, "No space left on device")
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match=r"^cannot write .*\.plan: No space left on device; name another folder$"):
        build_cpu_plans(bundle, graphs=["encode_text"], folder=folder, force=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_what_killed_builds_left_is_removed_and_what_others_are_building_is_not(bundle, tmp_path):
    killed, busy = tmp_path / ".dnp.encode_text-0123456789abcdef.x", tmp_path / ".dnp.encode_text-fedcba9876543210.y"
    for left in (killed, busy):
        left.mkdir()
        (left / "half.weights").write_bytes(b"half")
    with filelock.FileLock(tmp_path / ".encode_text-fedcba9876543210.lock"):
        (plan,) = build_cpu_plans(bundle, graphs=["encode_text"], folder=tmp_path)
    orphan = plan.path.with_suffix(".01234567.weights")
    orphan.write_bytes(b"of a build that was killed amid its last steps")
    assert (killed.exists(), busy.exists()) == (False, True)
    build_cpu_plans(bundle, graphs=["encode_text"], folder=tmp_path, force=True)
    assert (orphan.exists(), busy.exists()) == (False, False)


def nested(depth):
    return {"x": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize("flags", [{"x": None}, {"x\x1b[2J\n": "y" * 1000}, nested(900)])
def test_flags_that_were_edited_are_told_in_a_line(bundle, folder, caplog, flags):
    (path,) = folder.glob("*.json")
    sidecar = json.loads(path.read_text())
    sidecar["spec"]["flags"] = flags
    path.write_text(json.dumps(sidecar))
    assert run(["inspect", str(bundle.path), "--plans", str(folder)]) == 0
    with open_session(bundle, "encode_text", options=BackendOptions(plans=folder)) as session:
        assert "plan" not in session.backend
    (record,) = caplog.records
    assert "flags.x" in record.message
    assert record.message.isprintable()
    assert len(record.message) < 700


@pytest.mark.parametrize(
    "change",
    [
        {"spec": {"graph": 3}},
        {"spec": {"profile": {"batch": 1}}},
        {"spec": {"profile": {"batch": ["a"]}}},
        {"spec": {"flags": []}},
        {"statistics": {"weights_bytes": "many"}},
        {"statistics": {"weights_bytes": True}},
        {"statistics": {"weights_bytes": 10**400}},
        {"weights": {"file": "../elsewhere.weights"}},
        {"weights": {"size": -1}},
        {"more": 1},
        "[" * 100_000,
    ],
)
def test_sidecars_that_are_not_as_they_were_written(bundle, folder, caplog, capsys, change):
    (path,) = folder.glob("*.json")
    sidecar = json.loads(path.read_text())
    if isinstance(change, dict):
        for name, value in change.items():
            sidecar[name] = sidecar[name] | value if isinstance(value, dict) else value
        path.write_text(json.dumps(sidecar))
    else:
        path.write_text(change)
    assert run(["inspect", str(bundle.path), "--plans", str(folder)]) == 0
    assert "encode_text-" not in capsys.readouterr().out
    with open_session(bundle, "encode_text", options=BackendOptions(plans=folder)) as session:
        assert "plan" not in session.backend
    (record,) = caplog.records
    assert "has no sidecar that can be read" in record.message
    assert "export" not in record.message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no such files")
@pytest.mark.parametrize("spoil", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_sidecars_that_are_no_files_are_not_read(bundle, folder, capsys, spoil):
    (path,) = folder.glob("*.json")
    path.unlink()
    spoil(path)
    assert run(["inspect", str(bundle.path), "--plans", str(folder)]) == 0
    assert "no plans" in capsys.readouterr().out
    with open_session(bundle, "encode_text", options=BackendOptions(plans=folder)) as session:
        assert "plan" not in session.backend


def test_what_a_sidecar_says_cannot_write_to_the_terminal(bundle, folder, capsys):
    (path,) = folder.glob("*.json")
    sidecar = json.loads(path.read_text())
    sidecar["statistics"]["built"] = "\x1b[2Jnever\nmore"
    path.write_text(json.dumps(sidecar))
    assert run(["inspect", str(bundle.path), "--plans", str(folder)]) == 0
    assert "?[2Jnever?more" in capsys.readouterr().out.replace("\n", "?")


def test_a_plan_under_another_name_is_none(bundle, folder, capsys):
    for path in folder.glob("encode_text-*"):
        path.rename(path.with_name(path.name.replace("encode_text-", "foo-")))
    assert run(["inspect", str(bundle.path), "--plans", str(folder)]) == 0
    assert "no plans" in capsys.readouterr().out


def test_an_empty_folder_name_is_refused(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["build", str(bundle.path), "--backend", "cpu", "--plans", ""]) == 2
    assert "the path is empty; name one, or leave it out" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_plans_of_other_versions_are_removed_when_asked(bundle, tmp_path, monkeypatch, capsys):
    command = ["build", str(bundle.path), "--backend", "cpu", "--plans", str(tmp_path), "--graph", "encode_text"]
    assert run(command) == 0
    before = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")}
    monkeypatch.setattr("dnp.engine.backends.onnxruntime.cpu.processor_name", lambda: "another processor")
    assert run([*command, "--prune"]) == 0
    assert not before & {path.name for path in tmp_path.iterdir()}
    assert re.search(r"dnp: removed encode_text-\w+\.plan", capsys.readouterr().err)
    assert len([*tmp_path.glob("*.plan")]) == len([*tmp_path.glob("*.weights")]) == 1


def test_two_processes_that_want_the_same_plans_build_them_once(bundle, tmp_path):
    command = [DNP, "build", str(bundle.path), "--backend", "cpu", "--plans", str(tmp_path), "--json"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert sum(errors.count("optimising") for _, errors in told) == len(bundle.graphs)
    assert len(list(tmp_path.glob("*.plan"))) == len(bundle.graphs)
    assert not list(tmp_path.glob(".dnp.*"))


def test_a_folder_that_cannot_be_written(bundle, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="plans cannot be written to"):
        build_cpu_plans(bundle, folder=tmp_path / "file")


def test_a_disk_that_is_full(bundle, tmp_path, monkeypatch):
    def full(graph, options, plan=None, settings=None):
        error = f"Failed to write to {settings.optimized_model_filepath}"
        raise BundleError(f"{graph.path}: {error}; export it again") from RuntimeError(error)

    monkeypatch.setattr("dnp.engine.backends.onnxruntime.cpu.OrtSession", full)
    told = rf"the plan of 'encode_text' cannot be kept in {tmp_path}: Failed to write to \S+; "
    with pytest.raises(OutputError, match=f"{told}name another folder"):  # there is room, it was something else
        build_cpu_plans(bundle, folder=tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(100, 95, 5_000_000))

    def full_of_weights(graph, options, plan=None, settings=None):
        error = "Failed to write pre-packed blobs"  # it does not always name the file
        raise BundleError(f"{graph.path}: {error}; export it again") from RuntimeError(error)

    monkeypatch.setattr("dnp.engine.backends.onnxruntime.cpu.OrtSession", full_of_weights)
    told = rf"the plan of 'encode_text' cannot be kept in {tmp_path}: Failed to write pre-packed blobs; "
    with pytest.raises(OutputError, match=f"{told}its disk has 5 MB left: make room, or name another folder"):
        build_cpu_plans(bundle, folder=tmp_path)
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


def test_a_graph_that_cannot_be_read_is_the_graphs_own_error(bundle, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    broken = replace(bundle.graph("encode_text"), path=tmp_path / "broken.onnx")
    spoiled = replace(bundle, graphs={**bundle.graphs, "encode_text": broken})
    object.__setattr__(spoiled, "files", {**bundle.files, "broken.onnx": bundle.files["graphs/encode_text.onnx"]})
    object.__setattr__(spoiled, "path", tmp_path)
    with pytest.raises(BundleError, match=r"broken\.onnx: no graph that ONNX Runtime can load"):
        build_cpu_plans(spoiled, graphs=["encode_text"], folder=tmp_path / "plans")
    assert not list((tmp_path / "plans").glob("*.plan"))


def test_a_build_that_is_stopped_leaves_nothing(bundle, tmp_path, monkeypatch):
    """ONNX Runtime itself, asked to stop in the middle."""
    seen = []

    def slow(graph, options, plan=None, settings=None):
        while not seen:
            time.sleep(0.01)
        return OrtSession(graph, options, plan, settings)

    def stop(state):
        seen.append(state)
        return False

    monkeypatch.setattr("dnp.engine.backends.onnxruntime.cpu.OrtSession", slow)
    with pytest.raises(Cancelled, match="'encode_text' was stopped"):
        build_cpu_plans(bundle, graphs=["encode_text"], folder=tmp_path, progress=stop)
    assert (seen[0].graph, seen[0].phase) == ("encode_text", "optimising")
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


class TestInBackground:
    def test_it_gives_what_the_work_gives(self):
        assert in_background(lambda: threading.current_thread().name, name="me", tick=int, cancel=int) == "me"

    def test_it_raises_what_the_work_raises(self):
        with pytest.raises(ZeroDivisionError):
            in_background(lambda: 1 / 0, name="me", tick=int, cancel=int)

    def test_a_cancel_that_fails_does_not_leave_the_work_behind(self):
        ended = threading.Event()

        def work():
            time.sleep(0.6)
            ended.set()

        def fail():
            raise RuntimeError

        with pytest.raises(RuntimeError):
            in_background(work, name="me", tick=lambda: 1 / 0, cancel=fail)
        assert ended.is_set()

    def test_a_thread_that_the_system_does_not_give_is_not_waited_for(self, monkeypatch):
        def refuse(self):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            in_background(int, name="me", tick=int, cancel=int)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_an_interruption_waits_for_the_work_to_end(self, error):
        stop, ended = threading.Event(), threading.Event()

        def work():
            assert stop.wait(10)
            time.sleep(0.1)
            ended.set()

        def tick():
            raise error

        with pytest.raises(error):
            in_background(work, name="me", tick=tick, cancel=stop.set)
        assert ended.is_set()
