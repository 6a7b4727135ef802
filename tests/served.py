"""A server in this process, for the tests: the shipped model on a free port, and clients for it."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import httpx

from dnp import Pipeline
from dnp.runtime.batching import BatchOptions
from dnp.serving.app import create_app
from dnp.serving.engines import LocalEngine
from dnp.serving.server import Server, bind
from dnp.serving.settings import ServerSettings

PROMPT = "a large red circle left of a small blue square on a plain yellow background"
QUICK = {"prompt": PROMPT, "steps": 2, "dns_steps": 2, "seed": 3}
LONG = 120  # steps
SLOW = {"prompt": PROMPT, "steps": 60, "dnp": False, "seed": 3}


class Served:
    """A server that runs."""

    def __init__(self, server, engine, port):
        self.server, self.engine = server, engine
        self.service = server.config.app.state.service
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.http = httpx.Client(base_url=self.url, timeout=120)  # making one takes longer than most requests

    def post(self, path, body=None, **options):
        return self.http.post(path, json=body, **options)

    def get(self, path, **options):
        return self.http.get(path, **options)

    def until(self, true, seconds=30.0):
        """Wait for something to become true."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.005)


@contextmanager
def serving(settings=None, batching=None, *, warm=True):
    """A server for the block; nothing of it is left after that."""
    before = set(threading.enumerate())
    settings = settings or ServerSettings()
    listener = bind("127.0.0.1", 0, writer_seconds=settings.writer_seconds)
    with Pipeline.open(threads=1) as pipeline:
        engine = LocalEngine("dnp-tiny", pipeline, batching or BatchOptions())
        server = Server(create_app([engine], settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        served = Served(server, engine, listener.getsockname()[1])
        try:
            if warm:
                engine.warm_up()
            served.until(lambda: server.started)
            yield served
        finally:
            served.http.close()
            server.should_exit = True
            thread.join()
            engine.close()
    left = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
    for thread in left:  # anyio tells its own to end, and does not wait for them
        thread.join(60)
    assert [thread for thread in left if thread.is_alive()] == []
