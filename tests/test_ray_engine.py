"""What a front replica makes of its engine replicas, which are played here: no cluster is started."""

from __future__ import annotations

import asyncio
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import yaml
from pydantic import ValidationError
from served import PROMPT, QUICK

from dnp import Pipeline, Request
from dnp.cli import run
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.errors import BackendError, BundleError, Busy, DeadlineExceeded, DnpError, Draining, SettingsError
from dnp.runtime.batching import Batcher, Negatives, Picture, Progress
from dnp.serving.app import create_app
from dnp.serving.engines import Order, result_of

exceptions = pytest.importorskip("ray.exceptions")
ray_app, ray_engine = pytest.importorskip("dnp.serving.ray_app"), pytest.importorskip("dnp.serving.ray_engine")

REQUEST = Request(PROMPT, steps=2, dns_steps=2, seed=3)
DEFAULT = Bundle.default().path
BLACK = np.zeros((64, 64, 3), np.uint8)


class Stream:
    """A streaming call; what is an exception class is raised, ``None`` waits for ever."""

    def __init__(self, events):
        self.events, self.cancelled = iter(events), False

    def __aiter__(self):
        return self

    async def __anext__(self):
        event = next(self.events, StopAsyncIteration)
        if event is None:
            await asyncio.Event().wait()
        if isinstance(event, type):
            raise event
        return event

    def cancel(self):
        self.cancelled = True


class Handle:
    """A deployment's handle, whose replicas do what they are told: one script a call; and what they say of themselves,
    time after time.
    """

    def __init__(self, *scripts, told):
        self.scripts, self.streams, self.orders = iter(scripts), [], []
        self.told, self.run = iter(told), self

    def broadcast(self, method):
        assert method == "status"
        return self

    async def results_async(self, *, timeout_s, return_exceptions):
        found = next(self.told)
        if isinstance(found, Exception):
            raise found
        return found

    def options(self, *, stream):
        assert stream
        return self

    def remote(self, request, order):
        self.orders.append(order)
        self.streams.append(Stream(next(self.scripts)))
        return self.streams[-1]


@pytest.fixture(scope="module")
def known():
    """A real result, and how a real engine is."""
    with Pipeline.open(threads=1) as pipeline:
        result = pipeline.run(REQUEST)
        with Batcher(pipeline) as batcher:
            return result, batcher.status


def engine_of(known, *scripts, queue=64):
    handle = Handle(*scripts, told=[[known[1]]])
    engine = ray_engine.RayEngine("dnp-tiny", Bundle.default(), handle, queue)
    asyncio.run(engine.warm_up())
    return engine, handle


def events_of(engine, deadline=None):
    """What a request tells until it ends."""

    async def all_of_it():
        found = []
        work = await engine.submit(engine.resolve(REQUEST), Order("an id", deadline=deadline))
        found.append(await result_of(work, found.append))
        return found

    return asyncio.run(all_of_it())


def test_a_request_is_begun_again_when_its_replica_dies_and_tells_nothing_twice(known):
    result, _ = known
    first = [Progress("dns", 1, 2), Picture("dns", 0, 0, BLACK), Progress("dns", 2, 2)]
    second = [Negatives(BLACK[None], ["n"]), Picture("final", 0, 0, BLACK), Picture("final", 0, 1, BLACK)]
    dies, lost = exceptions.RayActorError, exceptions.ObjectLostError
    raises_lost = type("Lost", (lost,), {"__init__": lambda self: Exception.__init__(self, "lost")})
    engine, handle = engine_of(
        known, [*first, dies], [*first[:2], raises_lost], [*first, *second[:2], dies], [*first, *second, result]
    )
    told = events_of(engine)
    assert [id(event) for event in told] == [id(event) for event in [*first, *second, result]]
    assert len(handle.streams) == 4 and all(stream.cancelled for stream in handle.streams)


def test_a_request_that_ends_every_engine_is_given_up(known):
    engine, handle = engine_of(known, *[[exceptions.RayActorError]] * 10)
    with pytest.raises(DnpError, match="4 times"):
        events_of(engine)
    assert len(handle.streams) == 4


def test_an_error_of_the_engine_is_the_same_error_in_the_front(known):
    error = SettingsError("beams must be a whole number from 1 to 16, not 99")
    engine, handle = engine_of(known, [Progress("dns", 1, 2), error])
    with pytest.raises(SettingsError) as raised:
        events_of(engine)
    assert raised.value is error and len(handle.streams) == 1


def test_the_deadline_holds_where_no_engine_looks(known):
    engine, handle = engine_of(known, [exceptions.RayActorError], [None])
    with pytest.raises(DeadlineExceeded):
        events_of(engine, 0.2)
    first, second = (order.deadline for order in handle.orders)
    assert second < first <= 0.2
    assert handle.streams[-1].cancelled


def test_what_is_dropped_is_cancelled_on_the_replica(known):
    engine, handle = engine_of(known, [Progress("dns", 1, 2), None])

    async def drop():
        work = await engine.submit(engine.resolve(REQUEST), Order("an id"))
        await anext(work)
        assert not handle.streams[0].cancelled
        await work.aclose()
        while not handle.streams[0].cancelled:
            await asyncio.sleep(0)

    asyncio.run(drop())


def test_only_so_many_wait_and_who_was_begun_or_dropped_waits_no_more(known):
    engine, _ = engine_of(known, [None], [Progress("dns", 1, 2), None], [None], [None], queue=2)

    async def fill():
        waits = await engine.submit(engine.resolve(REQUEST), Order("waits"))
        begun = await engine.submit(engine.resolve(REQUEST), Order("begun"))
        with pytest.raises(Busy) as busy:
            await engine.submit(engine.resolve(REQUEST), Order("too many"))
        assert busy.value.retry_after >= 1
        await anext(begun)
        works = [waits, begun, await engine.submit(engine.resolve(REQUEST), Order("a free place"))]
        with pytest.raises(Busy):
            await engine.submit(engine.resolve(REQUEST), Order("too many"))
        await waits.aclose()
        while len(engine._waiting) == 2:
            await asyncio.sleep(0)
        works.append(await engine.submit(engine.resolve(REQUEST), Order("another free place")))
        for work in works:
            await work.aclose()

    asyncio.run(fill())


@pytest.mark.parametrize("settings", [{"height": 128}, {"windows": 2}, {"steps": 200}])
def test_what_no_engine_serves_is_refused_in_front(known, settings):
    engine, handle = engine_of(known)
    with pytest.raises(SettingsError, match="not served here"):
        asyncio.run(engine.submit(engine.resolve(replace(REQUEST, **settings)), Order("an id")))
    assert handle.streams == []


def test_a_full_front_answers_as_openai_does(known):
    engine, _ = engine_of(known, queue=0)

    async def post():
        transport = httpx.ASGITransport(create_app([engine]))
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as http:
            return await http.post("/v1/images/generations", json=QUICK), await http.get("/v1/models")

    answer, models = asyncio.run(post())
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"].items() >= {"type": "rate_limit_error", "code": "queue_full", "param": None}.items()
    assert models.json()["data"][0]["dnp"]["sizes"] == [[64, 64]]


def test_engines_together_count_as_one(known):
    one = replace(known[1], idle=1.0, queued=1, running={"dns": 2}, counts={"steps": 5, "samples": 3, "finished": 1})
    other = replace(one, idle=2.0, alive=False, running={"final": 1, "dns": 1})
    both = ray_engine.together([one, other])
    assert (both.idle, both.alive, both.queued, both.requests) == (2.0, False, 2, 0)
    assert both.running == {"dns": 3, "final": 1}
    assert both.counts == {"steps": 10, "samples": 6, "finished": 2}


def test_it_is_ready_while_a_replica_answers(known, monkeypatch):
    """Before any has, and when each is lost, it is not; one that is slow to answer changes nothing."""
    monkeypatch.setattr(ray_engine, "_WATCH", 0)
    nobody = exceptions.RayActorError()
    none = pytest.importorskip("ray.serve.exceptions").DeploymentUnavailableError("engine")
    handle = Handle(told=[none, [nobody], [known[1], nobody], TimeoutError(), nobody, [nobody], none, [known[1]]])
    engine = ray_engine.RayEngine("dnp-tiny", Bundle.default(), handle, 64)
    seen = []

    async def watch():
        assert not engine.ready
        await engine.warm_up()
        seen.append(engine.ready)
        for _ in range(5):
            await engine._look()
            seen.append(engine.ready)
        assert engine.status.sizes == known[1].sizes

    asyncio.run(watch())
    assert seen == [True, True, True, False, False, True]


def test_errors_go_from_process_to_process():
    """As Ray sends them; with what the answer says of them."""
    for kind in (Busy, Draining):
        error = pickle.loads(pickle.dumps(kind("the queue is full; try again", 7.0)))
        assert type(error) is kind and str(error) == "the queue is full; try again" and error.retry_after == 7.0


@pytest.mark.parametrize(
    ("rows", "waiting", "wanted"), [({"a": 0, "b": 0}, 0, 0), ({"a": 3, "b": 1}, 0, 2), ({"a": 2, "b": 2}, 5, 4.5)]
)
def test_as_many_engines_are_wanted_as_their_batches_hold(rows, waiting, wanted):
    context = SimpleNamespace(
        aggregated_metrics={"rows": rows, "cap": dict.fromkeys(rows, 2)}, total_queued_requests=waiting
    )
    assert ray_app.replicas_wanted(context)[0] == wanted
    context = SimpleNamespace(aggregated_metrics={}, total_queued_requests=waiting, target_num_replicas=3)
    assert ray_app.replicas_wanted(context)[0] == 3  # nobody has said anything yet


def test_keys_of_the_environment_are_asked_for(monkeypatch):
    """Whoever starts it: ``serve run`` reads no options of ours."""
    monkeypatch.setenv("DNP_API_KEYS", "a-key-of-ours")
    bundles, args, _ = ray_app.build({"server": {"keys": ["another-key"]}})._bound_deployment.init_args
    assert args.server.keys == ("another-key", "a-key-of-ours") and len(bundles) == 1


def test_ray_takes_the_application_and_what_configuration_files_say_of_it(tmp_path):
    """``serve build`` imports what ``serve run`` runs."""
    serve = Path(sys.executable).with_name("serve")
    subprocess.run([serve, "build", "dnp.serving.ray_app:app", "-o", tmp_path / "built"], check=True)
    (application,) = yaml.safe_load((tmp_path / "built").read_text())["applications"]
    deployments = {one["name"]: one for one in application["deployments"]}
    assert set(deployments) == {"front", "engine-0"} and deployments["front"]["num_replicas"] == 2
    scaling = deployments["engine-0"]["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 4)
    ray_app.build({"backend": "openvino", "cpus": "2", "fronts": "1"})  # words, as on the command line
    with pytest.raises(ValidationError, match="bundel"):
        ray_app.build({"bundel": "my-bundle"})
    with pytest.raises(BundleError):
        ray_app.build({"bundles": {"one": "no-such-folder"}})


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--replicas", "4:1"], 2, "1:4"),
        (["--replicas", "0"], 2, "1:4"),
        (["--sdapi"], 2, "sdapi"),
        (["--bundle", "no-such-folder"], 3, "no-such-folder"),
        (["--bundle", f"a={DEFAULT}", "--bundle", f"a={DEFAULT}"], 2, "name them apart"),
    ],
)
def test_what_cannot_be_served_is_said_before_ray_starts(capsys, arguments, code, word):
    assert run(["serve", "--ray", "--port", "0", *arguments]) == code
    assert word in capsys.readouterr().err


@pytest.fixture
def cluster(monkeypatch):
    """Somebody's cluster, where Serve runs on ``proxies``; it tells what was done to it."""
    done, front = [], SimpleNamespace(broadcast=lambda _: SimpleNamespace(results=lambda **_: [0]))

    def does(name, gives=None):
        return lambda *_, **__: done.append(name) or gives

    cluster = SimpleNamespace(done=done, proxies={})
    status = lambda: SimpleNamespace(proxies=cluster.proxies)  # noqa: E731
    steps = {name: does(name) for name in ("start", "delete", "shutdown")}
    monkeypatch.setattr(ray_app, "serve", SimpleNamespace(status=status, run=does("run", front), **steps))
    monkeypatch.setattr(ray_app, "ray", SimpleNamespace(init=does("join"), shutdown=does("leave")))
    monkeypatch.setattr(ray_app, "build", lambda args: "an application")
    return cluster


def test_a_cluster_that_was_joined_is_left_as_it_was(cluster):
    assert ray_app.run(ray_app.Args(), "127.0.0.1", 1, lambda: signal.raise_signal(signal.SIGTERM))
    assert cluster.done == ["join", "start", "run", "delete", "shutdown", "leave"]


def test_an_address_that_would_not_be_served_is_not_said_to_be(cluster):
    cluster.proxies = {"a node": "HEALTHY"}
    with pytest.raises(BackendError, match="serve shutdown"):
        ray_app.run(ray_app.Args(), "127.0.0.1", 1, lambda: pytest.fail("it is not ready"))
    assert cluster.done == ["join", "leave"]


def test_the_extra_is_named_where_ray_is_missing(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "dnp.serving.ray_app")
    monkeypatch.delattr("dnp.serving.ray_app")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(["serve", "--ray", "--port", "0"]) == 4
    assert "dnp-engine[cpu,ray]" in capsys.readouterr().err
