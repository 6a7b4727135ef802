"""What leaves the machine, or is left on it, as the system sees it: every command, traced for 20 s after its work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

PROMPT = "a large red circle left of a small blue square on a plain yellow background"
QUICK = ["--steps", "2", "--dns-steps", "2"]
LINGER = 20  # seconds: ONNX Runtime's first message would leave some 9 s after its start
CALLS = "connect,sendto,sendmsg,sendmmsg,open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2"
COMMANDS = {
    "generate-cpu": ["generate", PROMPT, *QUICK],
    "generate-openvino": ["generate", PROMPT, *QUICK, "--backend", "openvino"],
    "dns-openvino": ["dns", PROMPT, "--dns-steps", "2", "--backend", "openvino"],
    "explore-cpu": ["explore", PROMPT, *QUICK, "--images", "1"],
    "caption-cpu": ["caption", "picture.png"],
    "caption-openvino": ["caption", "picture.png", "--backend", "openvino"],
    "build-cpu": ["build", "--backend", "cpu", "--plans", "plans"],
    "build-tensorrt-rtx": ["build", "--sm", "89", "--graph", "encode_text", "--plans", "plans"],
    "export": ["export", "MODEL", "bundle", "--captioner", "CAPTIONER"],
    "inspect": ["inspect"],
    "doctor": ["doctor"],
    "serve": ["serve", "--port", "0", "--threads", "1"],
}
COMMAND = """
    import os, signal, sys, threading, time
    from pathlib import Path
    from dnp.cli import main
    if sys.argv[2] == "serve":  # which ends when it is told to
        threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        main(sys.argv[2:])
    except SystemExit as ended:
        time.sleep(float(sys.argv[1]))
        left = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
        if any(left):
            print("children:", *left, file=sys.stderr)
        sys.exit(ended.code)
"""
LIBRARY = f"""
    import sys, time
    import dnp
    import diffusers, onnxruntime, transformers
    for backend in ("cpu", "openvino"):
        with dnp.Pipeline.open(backend=backend) as pipeline:
            pipeline({PROMPT!r}, steps=2, dns_steps=2)
    time.sleep(float(sys.argv[1]))
"""


@dataclass
class Run:
    """One process that has ended: its folder, which held ``home`` and ``tmp``, and what strace wrote of it."""

    folder: Path
    code: int
    errors: str
    calls: list[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_sd_folder, tiny_blip_folder):
    """All commands, started at once, each in an empty folder with an empty home and nothing of our environment."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("NOTHING WATCHED WHAT LEAVES THE MACHINE: there is no strace here; install it")
    if subprocess.run([strace, "-f", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode:
        pytest.skip("NOTHING WATCHED WHAT LEAVES THE MACHINE: this system lets strace trace nothing")
    started = {}
    for name in [*COMMANDS, "library"]:
        folder = tmp_path_factory.mktemp(name)
        for part in ("home", "tmp", "work"):
            (folder / part).mkdir()
        Image.new("RGB", (64, 64), "red").save(folder / "work" / "picture.png")
        paths = {"MODEL": str(tiny_sd_folder), "CAPTIONER": str(tiny_blip_folder)}
        words = [paths.get(word, word) for word in COMMANDS.get(name, [])]
        code = textwrap.dedent(COMMAND if name in COMMANDS else LIBRARY)
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"),
            "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        traced = [strace, "-f", "-qq", "-s", "200", "-o", str(folder / "trace"), "-e", f"trace={CALLS}"]
        started[name] = (
            folder,
            subprocess.Popen(
                [*traced, sys.executable, "-c", code, str(LINGER), *words],
                cwd=folder / "work",
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            ),
        )
    done = {}
    for name, (folder, process) in started.items():
        _, errors = process.communicate(timeout=1800)
        done[name] = Run(folder, process.returncode, errors, (folder / "trace").read_text().splitlines())
    return done


pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="strace is Linux's")]
each = pytest.mark.parametrize("name", [*COMMANDS, "library"])


@each
def test_nothing_leaves_the_machine(runs, name):
    """No connection but to a service of the system's own, such as the one that knows its users, and no packet."""
    run = runs[name]
    assert run.code in (0, 4) if name == "doctor" else run.code == 0, run.errors
    assert any("dnp" in call for call in run.calls)  # it was watched
    calls = [call for call in run.calls if '"\\0", 1' not in call]  # by which asyncio wakes its own loop
    assert not [call for call in calls if " send" in call or (" connect(" in call and "AF_UNIX" not in call)]


@each
def test_nothing_is_left_on_the_machine(runs, name):
    """Nothing in the home, no temporary file, and nothing opened for writing anywhere but there and where asked."""
    run = runs[name]
    assert list((run.folder / "home").rglob("*")) == []
    assert [path for path in (run.folder / "tmp").rglob("*") if not path.is_dir()] == []
    writing = re.compile(r"\b(?:open|openat)\(.*(?:O_WRONLY|O_RDWR|O_CREAT)|\b(?:creat|mkdir|mkdirat|rename\w*)\(")
    written = [re.findall(r'"([^"]*)"', call) for call in run.calls if writing.search(call) and " = -1 " not in call]
    outside = (path for paths in written for path in paths if path.startswith("/"))
    assert [path for path in outside if not path.startswith((str(run.folder), "/dev/", "/proc/self/"))] == []


@each
def test_only_we_say_anything(runs, name):
    """No warning of a library's on stderr; the driver adds there what children were left."""
    ours = re.compile(r"dnp: |\d\d:\d\d:\d\d \w+ ")  # the last is the server's log
    assert [line for line in runs[name].errors.splitlines() if not ours.match(line)] == []
