"""``dnp serve`` as a process: what it says, its exit codes, SIGTERM under load, several bundles, sockets."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from served import PROMPT, QUICK, SLOW

from dnp.cli import run
from dnp.runtime.pictures import read_settings


@contextmanager
def process(*options, until="ready"):
    """A server as a process of its own; the block gets it and a client for it, when it has said ``until``."""
    command = [sys.executable, "-m", "dnp", "serve", "--port", "0", "--threads", "1", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            said = next(line for line in started.stdout if until in line)
            address = re.search(r"http://[\w.:\[\]]+\b", said)[0]
            with httpx.Client(base_url=address.replace("0.0.0.0", "127.0.0.1"), timeout=120) as http:
                yield started, http
        finally:
            if started.poll() is None:
                started.kill()


def wait_for(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def in_flight(http, count):
    """Whether so many requests are, and this one."""
    return f"dnp_http_requests_in_flight {count + 1}.0" in http.get("/metrics").text


def answers(http):
    try:
        return http.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def is_draining(http):
    answer = http.get("/readyz")
    return answer.status_code == 503 and answer.json()["status"] == "draining"


def post(http, body):
    return http.post("/v1/images/generations", json=body)


@contextmanager
def begun(http):
    """A request half of whose body is there, for which a server that stops waits; the block gets what sends the rest,
    and returns the answer."""
    body = json.dumps(QUICK).encode()
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((http.base_url.host, http.base_url.port)) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body[:9])

        def finish():
            connection.sendall(body[9:])
            return connection.recv(1000)

        yield finish


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_work_in_flight_end(number):
    """Meanwhile the server still answers: it lives, is not ready, and takes nothing more."""
    with process("--log", "json") as (server, http), ThreadPoolExecutor() as pool, begun(http) as finish:
        long = {**SLOW, "steps": 127}
        assert http.get("/", headers={"Connection": "Upgrade", "Upgrade": "websocket"}).status_code == 200
        plain = pool.submit(post, http, long)
        streamed = pool.submit(post, http, {**long, "stream": True})
        wait_for(lambda: in_flight(http, 3))
        server.send_signal(number)
        wait_for(lambda: is_draining(http))
        refused = post(http, QUICK)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) > 0
        assert http.get("/healthz").status_code == 200
        assert len(plain.result().json()["data"]) == 1
        assert streamed.result().text.count("event: image_generation.completed") == 1
        assert server.poll() is None
        assert finish().startswith(b"HTTP/1.1 503 ")
        assert server.wait(30) == 0
        assert "everything that was in flight was answered" in server.stdout.read()
        lines = [json.loads(line) for line in server.stderr]
        assert {line["event"] for line in lines} == {"warm", "request"}
        assert PROMPT not in json.dumps(lines)


def test_a_signal_ends_a_warm_up_without_a_word_of_error():
    with process(until="warming up") as (server, http):
        wait_for(lambda: answers(http))
        server.terminate()
        server.terminate()
        assert server.wait(60) == 0
        assert "everything that was in flight was answered" in server.stdout.read()
        assert server.stderr.read() == ""


def test_a_second_signal_ends_it_at_once():
    """What it cuts off is told so, and may be sent to another server."""
    with process() as (server, http), ThreadPoolExecutor() as pool:
        coming = pool.submit(post, http, {**SLOW, "steps": 127, "n": 10})
        wait_for(lambda: in_flight(http, 1))
        server.terminate()
        server.terminate()  # the same one: supervisors tell a process and its group
        wait_for(lambda: is_draining(http))
        time.sleep(1.5)
        assert server.poll() is None
        server.terminate()
        assert server.wait(60) == 130
        assert server.stderr.read().splitlines()[-1] == "dnp: cancelled"
        assert coming.result().status_code == 503


def test_several_bundles_with_keys_prompts_in_the_log_and_n_star_on_the_disk(tmp_path, default_bundle):
    shutil.copytree(default_bundle.path, tmp_path / "other", ignore=shutil.ignore_patterns("plans"))
    (tmp_path / "keys").write_text("a-key-of-ours\n")
    options = ["--bundle", f"one={tmp_path / 'other'}", "--bundle", tmp_path / "other", "--api-keys", tmp_path / "keys"]
    options += ["--cache", tmp_path / "a" / "cache"]
    with process(*options, "--log-prompts", "--alias", "flux") as (server, http):
        key = {"Authorization": "Bearer a-key-of-ours"}
        models = http.get("/v1/models", headers=key).json()["data"]
        assert [model["id"] for model in models if "dnp" in model] == ["one", "dnp-tiny"]
        assert {model["id"]: model["root"] for model in models}["flux"] == "one"
        assert set(http.get("/readyz").json()["models"]) == {"one", "dnp-tiny"}
        for model in ("dnp-tiny", "flux"):
            body = {**QUICK, "model": model}
            answer = http.post("/v1/images/generations", json=body, headers=key).json()
            assert answer["model"] == {"flux": "one"}.get(model, model)
        server.terminate()
        assert server.wait(30) == 0
        assert PROMPT in server.stderr.read()
    (kept,) = (tmp_path / "a" / "cache").iterdir()  # the same bundle twice
    assert read_settings(kept)["request"]["prompt"] == PROMPT


def refused(capsys, *arguments):
    """The exit code of ``dnp serve`` where nothing is served, and what it said."""
    code = run(["serve", *map(str, arguments)])
    for name in ("dnp.serving", "dnp.runtime", "uvicorn.error"):  # they write to what ends with the test
        logging.getLogger(name).handlers.clear()
    return code, capsys.readouterr().err


def test_a_port_in_use_is_said(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = refused(capsys, "--port", port)
    assert code == 6 and str(port) in said and "--port 0" in said


def test_what_cannot_be_served_is_said(capsys, tmp_path, monkeypatch):
    (tmp_path / "none").write_text("\n")
    (tmp_path / "short").write_text("abc\n")
    for arguments, code, word in [
        (["--host", "no.such.host.invalid"], 6, "--host"),
        (["--bundle", tmp_path], 3, "bundle.json"),
        (["--bundle", "="], 2, "NAME=PATH"),
        (["--size", "64"], 2, "512x768"),
        (["--api-keys", tmp_path / "none"], 2, "no API key"),
        (["--api-keys", tmp_path / "short"], 2, "8 or more"),
        (["--api-keys", tmp_path / "missing"], 2, "missing"),
        (["--bundle", f"a={dnp_default()}", "--bundle", f"a={dnp_default()}"], 2, "name them apart"),
        (["--size", "9999x64"], 2, "9999"),
        (["--cache", tmp_path / "none"], 2, "name another folder"),
        (["--cache", tmp_path / "kept", "--no-cache"], 2, "--no-cache"),
    ]:
        found, said = refused(capsys, "--port", 0, *arguments)
        assert found == code and word in said, said
    monkeypatch.setenv("DNP_API_KEYS", "ab")
    assert refused(capsys, "--port", 0)[0] == 2


def dnp_default():
    from dnp.engine import Bundle

    return Bundle.default().path


def test_a_model_that_does_not_warm_up_is_said(capsys, monkeypatch):
    from dnp.engine.errors import BackendError
    from dnp.serving.engines import LocalEngine

    def fail(self):
        raise BackendError("no memory is left; name --memory-limit")

    monkeypatch.setattr(LocalEngine, "warm_up", fail)
    code, said = refused(capsys, "--port", 0)
    assert code == 4 and "--memory-limit" in said


def test_other_machines_without_a_key_are_warned_of():
    with process("--host", "0.0.0.0") as (server, http):
        assert http.get("/healthz").status_code == 200
        server.terminate()
        assert server.wait(30) == 0
        assert "--api-keys" in server.stderr.readline()
