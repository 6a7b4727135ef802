"""``dnp serve --ray`` with two engines on a cluster of its own, which is started once and stopped under load."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import psutil
import pytest
from openai import OpenAI
from PIL import Image
from served import PROMPT, QUICK, SLOW

from dnp import Pipeline

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="Ray is tried on Linux alone")]
PATIENCE = 300  # seconds that anything may take: a crowded machine starts Ray's dozen processes in minutes


class Cluster:
    """What was started, and a client for it."""

    def __init__(self, process, log, http):
        self.process, self.log, self.http = process, log, http

    @property
    def processes(self):
        """All of it that lives, by the names that Ray gives."""
        found = {}
        for one in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                found[one] = " ".join(one.cmdline())
        return found

    @property
    def engines(self):
        return [one for one, name in self.processes.items() if name.startswith("ray::ServeReplica:dnp:engine-0")]

    def metric(self, name):
        found = re.findall(rf"^{re.escape(name)} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        return float(found[0]) if found else 0.0

    def until(self, true):
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster():
    for _ in range(5):  # Ray gives its own process 30 s to come up, which a crowded machine may miss
        with TemporaryDirectory(prefix="ray") as name, started(Path(name)) as process:
            folder = Path(name)
            log = folder / "log"
            end = time.monotonic() + PATIENCE
            while process.poll() is None and not (ready := re.search(r"ready: open (http://\S+)/ ", log.read_text())):
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            if process.poll() is None:
                with httpx.Client(base_url=ready[1], timeout=PATIENCE) as http:
                    yield (found := Cluster(process, log, http))
                    assert_stops_whole(found)
                    return
        assert "node timed out during startup" in log.read_text(), log.read_text()
    pytest.fail("Ray did not come up")


@contextmanager
def started(folder):
    """``dnp serve --ray`` as a process, which writes to ``log``; nothing of it is left after the block."""
    options = ["--replicas", "2", "--fronts", "1", "--cpus", "0.4", "--threads", "1", "--drain", str(PATIENCE)]
    command = [sys.executable, "-m", "dnp", "serve", "--ray", "--port", "0", *options]
    environment = {
        **os.environ,
        "HOME": str(folder),  # where Ray leaves a token
        "RAY_TMPDIR": str(folder),  # and its logs; another cluster of this machine is not found there
        "RAY_worker_niceness": "0",
        "RAY_worker_register_timeout_seconds": str(PATIENCE),
        "RAY_gcs_server_port_wait_time_s": str(PATIENCE),
    }
    environment.pop("RAY_ADDRESS", None)
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                for one in found_children(process):
                    one.kill()
                process.kill()


def found_children(process):
    return psutil.Process(process.pid).children(recursive=True)


def assert_stops_whole(cluster):
    """SIGTERM: work in flight is answered, new work is refused, nothing is left."""
    left = found_children(cluster.process)
    with ThreadPoolExecutor() as pool:
        long = {**SLOW, "steps": 120, "n": 4}
        coming = [pool.submit(cluster.http.post, "/v1/images/generations", json=long) for _ in range(3)]
        cluster.until(lambda: cluster.metric("dnp_http_requests_in_flight") == 3 + 1)  # this one is in flight, too
        cluster.process.terminate()
        cluster.until(lambda: cluster.http.get("/readyz").status_code == 503)
        refused = cluster.http.post("/v1/images/generations", json=QUICK)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert [answer.result().status_code for answer in coming] == [200] * 3
    assert cluster.process.wait(PATIENCE) == 0
    assert "everything that was in flight was answered" in cluster.log.read_text()
    assert psutil.wait_procs(left, timeout=PATIENCE)[1] == []


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.fixture(scope="module")
def alone():
    """What a request gives without a server."""
    with Pipeline.open(threads=1) as pipeline:
        yield lambda **settings: pipeline(PROMPT, **settings)


def events(http, body):
    """The events of a streamed request, as they come."""
    with http.stream("POST", "/v1/images/generations", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def test_the_images_are_those_of_the_pipeline(cluster, alone):
    with OpenAI(base_url=f"{cluster.http.base_url}/v1", api_key="any", timeout=PATIENCE) as client:
        settings = {"steps": 2, "dns_steps": 2, "seed": 3}
        answer = client.images.generate(prompt=PROMPT, n=2, extra_body=settings)
        expected = alone(**settings, images=2)
        assert np.array_equal([pixels(image.b64_json) for image in answer.data], expected.arrays)
        assert [image.negative_prompt for image in answer.data] == expected.negatives

        *partial, last = client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body=settings)
        assert [event.partial_image_index for event in partial] in ([0], [0, 1])  # one that would wait is left out
        assert np.array_equal(pixels(last.b64_json), expected.arrays[0])


def test_it_is_ready_and_says_what_runs_and_that_once(cluster):
    answer = cluster.http.get("/readyz", headers={"x-request-id": "mine"})
    assert answer.status_code == 200 and answer.headers.get_list("x-request-id") == ["mine"]
    assert "threads: 1" in answer.json()["models"]["dnp-tiny"]["runs_on"]
    assert cluster.http.get("/healthz").status_code == 200
    assert "<title>" in cluster.http.get("/").text


def test_nothing_accepted_is_lost_when_an_engine_is_killed(cluster, alone):
    """Eight requests are told of their first step, on both engines, when one of these is killed."""
    cluster.until(lambda: len(cluster.engines) == 2)
    bodies = [{**QUICK, "steps": 60, "seed": seed, "partial_images": 2, "progress": True} for seed in range(8)]
    began = []

    def told(body):
        found = []
        for event in events(cluster.http, body):
            if not found:
                began.append(body)
            found.append(event)
        return found

    with ThreadPoolExecutor(len(bodies)) as pool:
        coming = [pool.submit(told, body) for body in bodies]
        cluster.until(lambda: len(began) == len(bodies))
        cluster.engines[0].kill()
        answers = [answer.result() for answer in coming]
    cluster.until(lambda: "repeated id=" in cluster.log.read_text())
    for body, found in zip(bodies, answers, strict=True):
        kinds = [event["type"].removeprefix("image_generation.") for event in found]
        assert kinds[-1] == "completed" and kinds.count("completed") == kinds.count("negative") == 1
        partials = [event["partial_image_index"] for event in found if "partial_image_index" in event]
        assert partials == list(range(len(partials))) and len(partials) <= 4  # a slow reader gets fewer
        steps = [(event["phase"], event["step"]) for event in found if event["type"].endswith("progress")]
        assert len(set(steps)) == len(steps)
        expected = alone(steps=60, dns_steps=2, seed=body["seed"])
        assert np.array_equal(pixels(found[-1]["b64_json"]), expected.arrays[0])
    cluster.until(lambda: len(cluster.engines) == 2)


def test_an_engine_is_told_when_its_client_has_gone(cluster):
    cancelled = 'dnp_engine_failures_total{cause="Cancelled",model="dnp-tiny"}'
    before = cluster.metric(cancelled)
    for _ in events(cluster.http, {**SLOW, "steps": 120, "n": 4, "progress": True}):
        break
    cluster.until(lambda: cluster.metric(cancelled) > before)


def test_nothing_leaves_the_machine(cluster):
    here = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    names, others = list(cluster.processes.values()), []
    assert any("raylet" in name for name in names)
    for process, name in cluster.processes.items():
        with suppress(psutil.NoSuchProcess):
            if "raylet" in name.partition(" ")[0]:
                assert process.environ()["RAY_USAGE_STATS_ENABLED"] == "0"
            reached = [c.raddr.ip.removeprefix("::ffff:") for c in process.net_connections() if c.raddr]
            others += [address for address in reached if address not in here]
    assert others == []
