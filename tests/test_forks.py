"""A pipeline or session that was opened before a fork, as under ``gunicorn --preload``: a sentence, and no hanging."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PREAMBLE = """
    import multiprocessing, os, signal, sys
    import numpy as np
    import dnp
    from dnp.engine import Bundle, open_session

    def request(pipeline):
        return pipeline("a red circle", steps=1, dns_steps=1)

    backend = sys.argv[1]
    pipeline = dnp.Pipeline.open(backend=backend)
    request(pipeline)
    session = open_session(Bundle.default(), "encode_text", backend)
    session.reshape(batch=1, tokens=32)
    session.run()
"""
FORKED = """
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, "the child did not exit as it should"
        request(pipeline)  # the parent goes on
        session.run()
        sys.exit()
    signal.alarm(60)  # what hangs ends
"""
USES = {
    "request": "request(pipeline)",
    "steps": "next(pipeline.steps(dnp.Request('a red circle')))",
    "caption": "from PIL import Image; pipeline.caption([Image.new('RGB', (64, 64))])",
    "warm_up": "pipeline.warm_up()",
    "enter": "pipeline.__enter__()",
    "run": "session.run()",
    "reshape": "session.reshape(batch=2, tokens=32)",
}
ENDS = {
    "exit": "",
    "close": "pipeline.close(); pipeline.close(); session.close(); session.close()",
    "delete": "del pipeline, session",
    "close while the parent is busy": "assert not pipeline._busy.acquire(blocking=False); pipeline.close()",
    "with": "session.__exit__(None, None, None); pipeline.__exit__(None, None, None)",
}


def run(backend, *parts):
    code = "\n".join(textwrap.dedent(part) for part in parts)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, backend], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
on_both = pytest.mark.parametrize("backend", ["cpu", pytest.param("openvino", marks=pytest.mark.slow)])


@on_both
def test_using_it_in_a_child_is_a_sentence(backend):
    tries = "".join(
        f"""
try:
    {use}
    print("{name}: done")
except dnp.BackendError as error:
    print("{name}:", error)
"""
        for name, use in USES.items()
    )
    told = run(backend, PREAMBLE, FORKED, tries, "sys.exit(7)").splitlines()
    assert [line.split(":")[0] for line in told] == list(USES)
    for line in told:
        assert "was opened in process" in line
        assert line.endswith("open it in the child, or start the child by the method 'spawn'")


@on_both
@pytest.mark.parametrize("end", ENDS)
def test_ending_in_a_child_is_silent(backend, end):
    busy = "steps = pipeline.steps(dnp.Request('a red circle', steps=1, dnp=False)); next(steps)"
    after = "steps.close()" if "busy" in end else ""
    forked = FORKED.replace("request(pipeline)", f"{after}; request(pipeline)" if after else "request(pipeline)")
    assert run(backend, PREAMBLE, busy if after else "", forked, ENDS[end], "sys.exit(7)") == ""


@on_both
def test_a_child_opens_its_own(backend):
    child = """
    with dnp.Pipeline.open(backend=backend) as own:
        print(request(own).negatives)
    sys.exit(7)
    """
    assert "a" in run(backend, PREAMBLE, "sys.stdout.flush()", FORKED, child)


@on_both
def test_a_worker_of_multiprocessing_ends_with_the_sentence(backend):
    """Its workers end by another way than an exit, and tell their errors to the parent."""
    code = """
    def use(_):
        return request(pipeline).negatives

    with multiprocessing.get_context("fork").Pool(1) as workers:
        try:
            workers.map_async(use, [0]).get(60)
        except dnp.BackendError as error:
            print(error)
    """
    assert "was opened in process" in run(backend, PREAMBLE, code)
