"""Ctrl-C and SIGTERM at any moment of a command, those included where Python drops exceptions: none is lost."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap

import pytest

# Sends SIGNAL when the AT-th of Python's own events comes up that count: calls, returns, calls of C functions.
DRIVER = """
    import os, signal, sys
    number, at, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    count = 0

    def counts(frame, event):
        if kind == "event":
            return True
        # what importlib has called when the lock of a module is freed: whatever it raises is dropped
        return event == "call" and frame.f_code.co_name == "cb" and "importlib" in frame.f_code.co_filename

    def watch(frame, event, _):
        global count
        if counts(frame, event):
            count += 1
            if count == at:
                sys.setprofile(None)
                os.kill(os.getpid(), number)

    from dnp.cli import main
    import dnp.cli.signals
    sys.setprofile(watch)
    main(["generate", "a red circle", "--steps", "2", "--dns-steps", "2"])
"""
LISTENING = 100  # events after which `main` has its handlers
BOTH = [signal.SIGINT, signal.SIGTERM]


def run(folder, code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def assert_cancelled(done, folder):
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip() == "dnp: cancelled"
    assert done.stdout == ""
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("at", [1, 2, 3, 5, 20])
def test_ctrl_c_at_the_first_instructions(tmp_path, at):
    """From the second event on: the first is the call of ``main`` itself."""
    assert_cancelled(run(tmp_path, DRIVER, int(signal.SIGINT), at + 1, "event"), tmp_path)


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("share", [0.001, 0.1, 0.4, 0.9])
def test_a_signal_at_any_moment(tmp_path, number, share):
    """Up to the 500,000th event, of some 650,000 in a run."""
    at = random.randint(LISTENING, LISTENING + int(share * 500_000))
    assert_cancelled(run(tmp_path, DRIVER, int(number), at, "event"), tmp_path)


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("at", [1, 100])
def test_a_signal_in_a_callback_of_importlib(tmp_path, number, at):
    assert_cancelled(run(tmp_path, DRIVER, int(number), at, "callback"), tmp_path)


@pytest.mark.parametrize("place", ["__del__", "weakref", "silently", "import"])
@pytest.mark.parametrize("numbers", [(2,), (15,), (2, 15), (2, 2, 2)])
def test_a_signal_where_exceptions_are_dropped_or_changed(tmp_path, place, numbers):
    """And several at once, one of which is delivered inside the hook that hears of the first."""
    code = f"""
    import os, signal, weakref
    import dnp.cli, dnp.cli.options as options

    def kill(*_):
        signal.pthread_sigmask(signal.SIG_BLOCK, set({numbers}))
        for number in {numbers}:
            os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, set({numbers}))

    class Thing:
        pass

    class Dying:
        def __del__(self):
            kill()

    plain = options.Progress.__call__
    def interrupting(self, step):
        plain(self, step)
        if step.phase != "final" or step.index != 1:
            return
        if {place!r} == "__del__":
            Dying()
        elif {place!r} == "weakref":
            thing = Thing()
            kept = weakref.ref(thing, kill)
            del thing
        else:
            try:
                kill()
            except KeyboardInterrupt:
                if {place!r} == "import":
                    raise ImportError("a module did not load") from None
    options.Progress.__call__ = interrupting
    dnp.cli.main(["generate", "a red circle", "--steps", "3", "--dns-steps", "2", "--out", "out"])
    """
    done = run(tmp_path, code)
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip() == "dnp: cancelled"
    if place != "silently":  # then it is heard of at the end alone
        assert list(tmp_path.iterdir()) == []


def test_more_signals_do_not_cut_off_what_cleans_up(tmp_path):
    code = """
    import os, signal, sys, time
    import dnp.cli
    def run(_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM) * 3:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            print("cleaned up")
    dnp.cli.run = run
    dnp.cli.main([])
    """
    done = run(tmp_path, code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", "dnp: cancelled\n")


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_that_the_parent_ignores_is_ignored(tmp_path, number):
    """As in the background of a script, or below ``nohup``."""
    code = """
    import os, signal, sys
    number = int(sys.argv[1])
    signal.signal(number, signal.SIG_IGN)
    import dnp.cli
    dnp.cli.run = lambda _: os.kill(os.getpid(), number) or 0
    dnp.cli.main([])
    """
    done = run(tmp_path, code, int(number))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_amid_the_exchange_of_handlers_leaves_both_answered():
    """Wherever it comes in a block that is not to be interrupted: each of Python's own events there is tried."""
    code = """
    import os, signal, sys
    from dnp.engine.system.interrupts import uninterrupted

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    both = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in both]
    for number in both:
        for at in range(1, 1000):
            count, interrupted = 0, False
            def watch(frame, event, _):
                global count
                count += 1
                if count == at:
                    sys.setprofile(None)
                    os.kill(os.getpid(), number)
            try:
                sys.setprofile(watch)
                with uninterrupted():
                    pass
                sys.setprofile(None)
            except KeyboardInterrupt:
                interrupted = True
            if count < at:  # the block is over
                break
            assert interrupted, (number, at)
            for other in both:
                try:
                    signal.raise_signal(other)
                except KeyboardInterrupt:
                    pass
                else:
                    raise AssertionError(f"{other} is lost after {number} at event {at}")
            for other, handler in zip(both, before):
                signal.signal(other, handler)
        assert 20 < at < 999
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
