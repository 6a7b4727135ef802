"""Step-level batching against request-level batching and against one request at a time, under load over HTTP.

    python benchmarks/serving.py                      # benchmarks/results/serving.json and .png
    python benchmarks/serving.py --requests 8 --clients 1 --clients 4 --out /tmp
    python benchmarks/serving.py share                # the server's own share of a lone request: results/share.json

Three servers of the same bundle, each a process of its own, are asked in turn: this process is the load. They differ
in when a request may join: between steps; when everything before it is done, together with those that wait and have the
same settings; alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

import click
import httpx
from starlette.datastructures import MutableHeaders

from dnp import Pipeline
from dnp.runtime.batching import BatchOptions
from dnp.serving import load, pictures
from dnp.serving.app import create_app
from dnp.serving.engines import LocalEngine, Work, result_of
from dnp.serving.server import bind, serve
from dnp.serving.settings import ServerSettings

WAYS = {
    "step": "between steps",
    "request": "request by request, equal settings together",
    "alone": "one request at a time",
}
WARM = 5  # requests that are not counted
RESULTS = Path(__file__).parent / "results"


class Rounds(LocalEngine):
    """The same engine, but a round of requests has to end before the next one begins.

    A round is the first request that waits, and those behind it whose settings are the same but for prompt and seed,
    ``most`` at the most: what a server does whose batch is a call of a pipeline.
    """

    def __init__(self, name, pipeline, options, most):
        super().__init__(name, pipeline, options)
        self._most = most
        self._waiting = []
        self._inside = 0

    async def submit(self, job, order) -> Work:
        """Wait for the round of the request to begin."""
        own = job.request.to_dict()
        settings = {name: value for name, value in own.items() if name not in ("prompt", "seed", "dns_seed")}
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((settings, turn))
        self._begin()
        await turn
        try:
            result = await result_of(await super().submit(job, order))
        finally:
            self._inside -= 1
            self._begin()
        return _Done(result)

    def _begin(self):
        if self._inside or not self._waiting:
            return
        same = [entry for entry in self._waiting if entry[0] == self._waiting[0][0]][: self._most]
        for entry in same:
            self._waiting.remove(entry)
            entry[1].set_result(None)
        self._inside = len(same)


class _Done:
    """Work that is done."""

    def __init__(self, result):
        self._result = result

    def __aiter__(self):
        return self

    async def __anext__(self):
        return self._result

    async def aclose(self):
        pass


@click.group(invoke_without_command=True)
@click.option("--clients", multiple=True, type=int, default=[1, 2, 4, 8, 16], show_default=True)
@click.option("--requests", default=32, show_default=True, help="For each number of clients.")
@click.option("--bundle", type=click.Path(path_type=Path))
@click.option("--backend", default="cpu", show_default=True)
@click.option("--threads", type=int)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.pass_context
def main(context, clients, requests, bundle, backend, threads, out):
    """Start the servers, ask them, write what came out."""
    if context.invoked_subcommand:
        return
    common = [
        "--backend",
        backend,
        *(["--bundle", bundle] if bundle else []),
        *(["--threads", threads] if threads else []),
    ]
    found = {way: [] for way in WAYS}
    ready = {}
    processes = {}
    try:
        for way in WAYS:
            started = time.perf_counter()
            command = [sys.executable, __file__, "one", way, *map(str, common)]
            processes[way] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            url = processes[way].stdout.readline().strip()
            ready[way] = time.perf_counter() - started
            processes[way].url = url
            warm = load.drive(url, load.Load(clients=2), load.bodies(load.DEFAULT_MIX, 99), 4)
            asyncio.run(warm)
        for count in clients:
            for way in WAYS:  # in turn, so that whatever else the machine does meets all three
                url = processes[way].url
                work = load.drive(url, load.Load(clients=count), load.bodies(load.DEFAULT_MIX, count), requests)
                found[way].append(asyncio.run(work))
                if processes[way].poll() is not None or not found[way][-1].answered:
                    sys.exit(f"the server '{way}' is gone, with code {processes[way].poll()}: nothing can be compared")
                print(way, load.table(found[way][-1:]), sep="\n", flush=True)
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "what": "python benchmarks/serving.py",
        "machine": machine(),
        "backend": backend,
        "bundle": str(bundle or "the shipped one"),
        "mix": load.DEFAULT_MIX,
        "seconds_to_ready": ready,
        "ways": {way: [asdict(one) for one in measured] for way, measured in found.items()},
        "ratios": ratios(found),
    }
    (out / "serving.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    load.plot({WAYS[way]: measured for way, measured in found.items()}, out / "serving.png")
    print(json.dumps(report["ratios"], indent=1))


def machine():
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}"


def ratios(found):
    """Step-level batching over the others: images a second, and the latencies' inverse; above 1 is better."""
    rows = []
    for number, step in enumerate(found["step"]):
        row = {"clients": step.clients}
        for way in ("request", "alone"):
            other = found[way][number]
            row[f"images_per_second over {way}"] = round(step.images_per_second / other.images_per_second, 3)
            for share in ("p50", "p95", "p99"):
                row[f"{share} of {way} over step"] = round(other.latency[share] / step.latency[share], 3)
        rows.append(row)
    return rows


class Marked(LocalEngine):
    """The same engine; notes the time at which the server comes to each part of a lone request."""

    def __init__(self, name, pipeline, options):
        super().__init__(name, pipeline, options)
        self.marks = {}
        write = pictures.png

        def png(*arguments):
            with self.marked("png"):
                return write(*arguments)

        pictures.png = png

    @contextmanager
    def marked(self, part):
        self.marks[part] = time.perf_counter()
        yield
        self.marks[f"{part} done"] = time.perf_counter()

    def resolve(self, request):
        """The time of this one, too."""
        with self.marked("resolve"):
            return super().resolve(request)

    async def submit(self, job, order):
        """Have the end of the work noted."""
        return _Noted(await super().submit(job, order), self.marks)


class _Noted(_Done):
    """Work whose end is noted when the server hears of it."""

    def __init__(self, work, marks):
        super().__init__(work)
        self._marks = marks

    async def __anext__(self):
        event = await anext(self._result)
        self._marks["heard"] = time.perf_counter()
        return event


class Telling:
    """Middleware around all others: the seconds of each part of a request, in a header of its answer."""

    def __init__(self, app, marks):
        self._app, self._marks = app, marks

    async def __call__(self, scope, receive, send):
        began = time.perf_counter()

        async def answer(message):
            if message["type"] == "http.response.start" and "heard" in self._marks:
                at = self._marks
                parts = {
                    "read": at["resolve"] - began,
                    "resolve": at["resolve done"] - at["resolve"],
                    "engine and back": at["heard"] - at["resolve done"],
                    "png": at["png done"] - at["png"],
                    "answer": time.perf_counter() - at["heard"] - (at["png done"] - at["png"]),
                }
                MutableHeaders(scope=message)["parts"] = json.dumps(parts)
            await send(message)

        await self._app(scope, receive, answer)


class Wire:
    """A connection that is kept, by a client that costs next to nothing: what it sends is written before the clock
    starts, and what it gets is looked at when the clock has stopped."""

    def __init__(self, url):
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname, address.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, body):
        """Seconds from the call that sends to the last byte received, what the server told of them, and the answer."""
        sent = json.dumps(body).encode()
        head = (
            "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(sent)}\r\n\r\n"
        )
        sent, got = head.encode() + sent, b""
        started = time.perf_counter()  # not after the call, which may return when the server is at work already
        self._socket.sendall(sent)
        while not got.partition(b"\r\n\r\n")[1]:
            got += self._socket.recv(2**20)
        head, _, got = got.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:])
        while len(got) < int(headers["content-length"]):
            got += self._socket.recv(2**20)
        seconds = time.perf_counter() - started
        return seconds, json.loads(headers["parts"]), json.loads(got)


@main.command()
@click.option("--requests", default=100, show_default=True, help="Of each kind.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--threads", type=int)
def share(requests, out, threads):
    """The server's own share of a lone request: from its sending to the answer's last byte, less the time of the
    engine, from admission to the images, and less that of writing the PNG. The client is another process."""
    command = [sys.executable, __file__, "one", "marked", *(["--threads", str(threads)] if threads else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            wire, prompt = Wire(url), {"prompt": load.PROMPTS[0]}
            found = {
                "DNP": parts_of(wire, prompt, requests),
                "plain": parts_of(wire, {**prompt, "dnp": False}, requests),
            }
            outside = outside_by_httpx(url, {**prompt, "dnp": False}, requests)
        finally:
            process.terminate()
    found["plain"]["own, with httpx as the client"] = round(outside - found["plain"]["png"], 2)
    report = {"what": "python benchmarks/serving.py share", "machine": machine(), "milliseconds": found}
    (out / "share.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def parts_of(wire, body, count):
    """Milliseconds of the parts of requests, one after the other: medians, and the 95th percentile of the own share."""
    rows = []
    for seed in range(count + WARM):
        seconds, parts, answer = wire.ask({**body, "seed": seed})
        engine = answer["timings"]["total"]
        own = seconds - engine - parts["png"]
        parts["engine and back"] -= engine
        told = sum(parts.values())
        rows.append({"whole": seconds, "engine": engine, "own": own, **parts, "wire": seconds - engine - told})
    columns = {name: [1e3 * row[name] for row in rows[WARM:]] for name in rows[0]}
    medians = {name: round(statistics.median(values), 2) for name, values in columns.items()}
    return {**medians, "own, p95": round(load.percentile(sorted(columns["own"]), 95), 2)}


def outside_by_httpx(url, body, count):
    """Milliseconds of the same requests that are not the engine's, as the usual client sees them: the median."""
    outside = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for seed in range(count + WARM):
            started = time.perf_counter()
            answer = client.post("/v1/images/generations", json={**body, "seed": seed}).json()
            outside.append(1e3 * (time.perf_counter() - started - answer["timings"]["total"]))
    return statistics.median(outside[WARM:])


@main.command()
@click.argument("way", type=click.Choice([*WAYS, "marked"]))
@click.option("--bundle", type=click.Path(path_type=Path))
@click.option("--backend", default="cpu")
@click.option("--threads", type=int)
def one(way, bundle, backend, threads):
    """One of the servers; says where it is when it is warm."""
    listener = bind("127.0.0.1", 0, writer_seconds=60)
    with Pipeline.open(bundle, backend, threads=threads) as pipeline:
        options = BatchOptions(queue=1000)
        if way == "step":
            engine = LocalEngine("model", pipeline, options)
        elif way == "marked":
            engine = Marked("model", pipeline, options)
        else:
            engine = Rounds("model", pipeline, options, 8 if way == "request" else 1)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = create_app([engine], ServerSettings())
        if way == "marked":
            app.add_middleware(Telling, marks=engine.marks)
        serve(app, listener, [engine], lambda: print(url, flush=True))


if __name__ == "__main__":
    main()
