"""A server under all that clients do, at once and for long: every answer is right, and nothing of it stays.

150 requests; DNP_SOAK says how many otherwise.
"""

from __future__ import annotations

import base64
import gc
import io
import itertools
import json
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from served import PROMPT, serving

from dnp import Pipeline
from dnp.runtime.batching import BatchOptions, NegativeCache
from dnp.serving.settings import ServerSettings

REQUESTS = int(os.environ.get("DNP_SOAK", "150"))
CLIENTS = 8
SLACK = 48e6  # bytes that the process may have grown by between the first third and the end
PATH = "/v1/images/generations"
SETTINGS = [
    {"prompt": prompt, "seed": seed, "steps": steps, "sampler": sampler, **more}
    for seed, (prompt, steps, sampler, more) in enumerate(
        itertools.product(
            [PROMPT, "a small white cross above a large green triangle on a plain black background"],
            [2, 5, 9],
            ["ddim", "euler_a", "dpmpp_2m"],
            [{"dns_steps": 3}, {"dnp": False}, {"negative": "a small circle", "guidance": 2.5}],
        )
    )
]


@pytest.fixture(scope="module")
def alone():
    """What each of the settings gives alone."""
    with Pipeline.open(threads=1) as pipeline:
        yield [pipeline(**settings).arrays[0] for settings in SETTINGS]


def body(number: int, **more) -> dict:
    settings = dict(SETTINGS[number])
    if "negative" in settings:
        settings["negative_prompt"] = settings.pop("negative")
    return {**settings, **more}


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


class Client:
    """One of those that ask at the same time; each does whatever comes by chance."""

    def __init__(self, served, alone, seed):
        self.served, self.alone, self.chance = served, alone, random.Random(seed)
        self.http = httpx.Client(base_url=served.url, timeout=600)
        self.did: list[str] = []

    def once(self) -> None:
        kinds = [self.plain, self.stream, self.slow_stream, self.leave, self.deadline, self.bad, self.negatives]
        kind = self.chance.choices(kinds, [6, 3, 1, 3, 2, 2, 1])[0]
        kind(self.chance.randrange(len(SETTINGS)))
        self.did.append(kind.__name__)

    def plain(self, number: int) -> None:
        answer = self.http.post(PATH, json=body(number))
        assert answer.status_code == 200, answer.text
        np.testing.assert_array_equal(pixels(answer.json()["data"][0]["b64_json"]), self.alone[number])

    def stream(self, number: int, pause: float = 0.0) -> None:
        more = {"stream": True, "progress": True, "partial_images": 2}
        with self.http.stream("POST", PATH, json=body(number, **more)) as answer:
            assert answer.status_code == 200
            data = [json.loads(line[6:]) for line in self.lines(answer, pause) if line.startswith("data: ")]
        assert data[-1]["type"] == "image_generation.completed", data[-1]
        np.testing.assert_array_equal(pixels(data[-1]["b64_json"]), self.alone[number])

    def slow_stream(self, number: int) -> None:
        self.stream(number, pause=0.02)

    @staticmethod
    def lines(answer, pause):
        for line in answer.iter_lines():
            yield line
            time.sleep(pause)

    def leave(self, number: int) -> None:
        """Ask, and go away at some moment without a word."""
        data = json.dumps(body(number, steps=100, stream=self.chance.random() < 0.5)).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        sent = head.encode() + data
        with socket.create_connection(("127.0.0.1", self.served.port)) as connection:
            connection.sendall(sent[: self.chance.choice([len(head), len(sent) - 5, len(sent), len(sent)])])
            time.sleep(self.chance.uniform(0, 0.2))

    def deadline(self, number: int) -> None:
        answer = self.http.post(PATH, json=body(number, deadline=self.chance.choice([1e-3, 0.05, 0.3])))
        if answer.status_code == 200:
            np.testing.assert_array_equal(pixels(answer.json()["data"][0]["b64_json"]), self.alone[number])
        else:
            assert (answer.status_code, answer.json()["error"]["code"]) == (408, "deadline_exceeded")

    def bad(self, number: int) -> None:
        content = self.chance.choice(
            [b"{", b"[" * 5000, b'{"prompt": 1}', b"", json.dumps(body(number, n=99)).encode()]
        )
        assert self.http.post(PATH, content=content, headers={"Content-Type": "application/json"}).status_code == 400

    def negatives(self, number: int) -> None:
        fields = {"prompt": SETTINGS[number]["prompt"], "seed": number, "dns_steps": 2}
        found = {self.http.post("/v1/images/negatives", json=fields).json()["data"][0]["negative_prompt"] for _ in "ab"}
        assert len(found) == 1


@pytest.mark.slow
def test_soak(alone):
    process = psutil.Process()
    threads = threading.active_count()
    kept = NegativeCache(memory=0.05)  # four of them: what is found is soon found again, by some at the same time
    with (
        serving(ServerSettings(), BatchOptions(queue=CLIENTS * 4, samples=4, negatives=kept)) as served,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        clients = [Client(served, alone, seed) for seed in range(CLIENTS)]

        def work(client, count):
            for _ in range(count):
                client.once()

        def run(count):
            list(pool.map(work, clients, [count] * CLIENTS))
            served.until(lambda: not served.service.active and not served.engine.status.requests)
            gc.collect()

        run(max(1, REQUESTS // 3 // CLIENTS))
        for client in clients:
            client.http.close()  # connections that are kept are files
            client.http = httpx.Client(base_url=served.url, timeout=600)
        files, memory = process.num_fds(), process.memory_info().rss
        run(max(1, REQUESTS * 2 // 3 // CLIENTS))
        for client in clients:
            client.http.close()
        served.until(lambda: not served.server.server_state.connections)
        assert process.num_fds() <= files
        assert process.memory_info().rss - memory < SLACK
        status = served.engine.status
        assert (status.queued, status.requests, sum(status.running.values())) == (0, 0, 0)
        did = [name for client in clients for name in client.did]
        assert len(did) >= REQUESTS * 0.9 and len(set(did)) == 7
        assert status.hits and status.misses
    assert threading.active_count() <= threads
