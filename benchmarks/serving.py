"""Step-level batching against request-level batching and against one request at a time, under load over HTTP.

    python benchmarks/serving.py                      # benchmarks/results/serving.json and .png
    python benchmarks/serving.py --requests 8 --clients 1 --clients 4 --out /tmp

Three servers of the same bundle, each a process of its own, are asked in turn: this process is the load. They differ
in when a request may join: between steps; when everything before it is done, together with those that wait and have the
same settings; alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import click
import httpx
from prometheus_client.parser import text_string_to_metric_families

from dnp import Pipeline
from dnp.runtime.batching import BatchOptions
from dnp.serving import load
from dnp.serving.app import create_app
from dnp.serving.engines import LocalEngine, Work, result_of
from dnp.serving.server import bind, serve
from dnp.serving.settings import ServerSettings

WAYS = {
    "step": "between steps",
    "request": "request by request, equal settings together",
    "alone": "one request at a time",
}
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
    ready, own = {}, []
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
                url, before = processes[way].url, totals(processes[way].url)
                work = load.drive(url, load.Load(clients=count), load.bodies(load.DEFAULT_MIX, count), requests)
                found[way].append(asyncio.run(work))
                if way == "step":
                    own.append({"clients": count, **own_share(before, totals(url), found[way][-1])})
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
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}",
        "backend": backend,
        "bundle": str(bundle or "the shipped one"),
        "mix": load.DEFAULT_MIX,
        "seconds_to_ready": ready,
        "own_share": own,
        "ways": {way: [asdict(one) for one in measured] for way, measured in found.items()},
        "ratios": ratios(found),
    }
    (out / "serving.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    load.plot({WAYS[way]: measured for way, measured in found.items()}, out / "serving.png")
    print(json.dumps(report["ratios"], indent=1))


def totals(url):
    """The seconds and the number of all requests so far, by the server's own metrics."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    wanted = ("dnp_http_request_seconds", "dnp_request_latency_seconds")
    samples = [sample for family in families if family.name in wanted for sample in family.samples]
    return {
        name: sum(sample.value for sample in samples if sample.name == name and is_images(sample))
        for name in (f"{metric}_{kind}" for metric in wanted for kind in ("sum", "count"))
    }


def is_images(sample):
    return sample.labels.get("endpoint", "/v1/images/generations") == "/v1/images/generations"


def own_share(before, after, measured):
    """Milliseconds of a request that are not the engine's: in the server, its PNG and JSON included, and as the client
    sees it, which reads them."""
    spent = {name: after[name] - before[name] for name in after}
    engine = spent["dnp_request_latency_seconds_sum"] / spent["dnp_request_latency_seconds_count"]
    server = spent["dnp_http_request_seconds_sum"] / spent["dnp_http_request_seconds_count"]
    return {"in_server_ms": 1e3 * (server - engine), "with_client_ms": 1e3 * (measured.latency["mean"] - engine)}


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


@main.command()
@click.argument("way", type=click.Choice(list(WAYS)))
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
        else:
            engine = Rounds("model", pipeline, options, 8 if way == "request" else 1)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        serve(create_app([engine], ServerSettings()), listener, [engine], lambda: print(url, flush=True))


if __name__ == "__main__":
    main()
