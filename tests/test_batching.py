"""Requests of several threads on one pipeline: what each gives is what it gives alone."""

from __future__ import annotations

import numpy as np
import pytest

import dnp
from dnp.engine.errors import Busy, Cancelled, DeadlineExceeded, DnpError, Draining, SettingsError
from dnp.runtime.batching import Batcher, BatchOptions, Negatives, Picture, Plain, Progress
from dnp.runtime.request import Request

PROMPT = "a large red circle left of a small blue square on a plain yellow background"


@pytest.fixture(scope="module")
def batcher():
    with dnp.Pipeline.open() as pipeline, Batcher(pipeline, BatchOptions(samples=3)) as opened:
        yield opened


@pytest.fixture(scope="module")
def pipeline():
    with dnp.Pipeline.open() as opened:
        yield opened


def same(one, other):
    for name in ("arrays", "dns_arrays", "plain_arrays"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.negatives == other.negatives
    assert one.request == other.request


def test_each_gets_what_it_gets_alone(batcher, pipeline):
    requests = [
        Request(PROMPT, seed=1, images=2, steps=5, dns_steps=3, sampler="euler_a", compare=True),
        Request("a green star", seed=7, steps=3, negative="a small blue square", guidance=2.0),
        Request("a small cross", seed=9, steps=7, dnp=False, guidance=1.0, sampler="heun"),
        Request(PROMPT, seed=3, images=5, steps=2, dns_steps=2, beams=2),
    ]
    tickets = [batcher.submit(request, previews=1) for request in requests]
    for request, ticket in zip(requests, tickets, strict=True):
        same(ticket.result(60), pipeline.run(request))


def test_a_request_tells_what_happens(batcher):
    ticket = batcher.submit(Request(PROMPT, images=2, steps=4, dns_steps=2, compare=True), previews=1)
    result = ticket.result(60)
    events = list(ticket.events())
    steps = [event for event in events if isinstance(event, Progress)]
    assert list(dict.fromkeys(step.phase for step in steps)) == ["dns", "caption", "plain", "final"]
    assert [step.index for step in steps if step.phase == "final"] == [1, 2, 3, 4]
    pictures = [event for event in events if isinstance(event, Picture)]
    assert sorted((p.phase, p.number) for p in pictures) == [(p, n) for p in ("dns", "final", "plain") for n in (0, 1)]
    (found,) = [event for event in events if isinstance(event, Negatives)]
    assert found.texts == result.negatives
    np.testing.assert_array_equal(found.images, result.dns_arrays)
    (plain,) = [event for event in events if isinstance(event, Plain)]
    np.testing.assert_array_equal(plain.images, result.plain_arrays)


def test_cancelled_and_late_requests_end(batcher):
    stopped, late = batcher.submit(Request(PROMPT, steps=60)), batcher.submit(Request(PROMPT, steps=60), deadline=0.01)
    assert stopped.cancel()
    with pytest.raises(Cancelled):
        stopped.result(60)
    with pytest.raises(DeadlineExceeded):
        late.result(60)
    assert not stopped.cancel()


def test_one_bad_request_ends_alone(batcher, pipeline):
    good, bad = Request(PROMPT, steps=4, dnp=False), Request(PROMPT, steps=3, dnp=False, guidance=1e38)
    tickets = batcher.submit(good), batcher.submit(bad)
    with pytest.raises(DnpError, match="finite"):
        tickets[1].result(60)
    same(tickets[0].result(60), pipeline.run(good))


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"height": 32}, "--size 32x64"), ({"windows": 2}, "--windows 2"), ({"steps": 200}, "--max-steps 200")],
)
def test_what_is_not_served_is_refused_at_once(batcher, settings, told):
    with pytest.raises(SettingsError, match=told):
        batcher.submit(Request(PROMPT, dnp=False, **settings))


def test_a_full_queue_and_a_drained_engine_say_so():
    with dnp.Pipeline.open() as pipeline, Batcher(pipeline, BatchOptions(samples=1, queue=1)) as batcher:
        tickets = []
        with pytest.raises(Busy) as refused:
            while True:
                tickets.append(batcher.submit(Request(PROMPT, steps=20, dnp=False)))
        assert refused.value.retry_after >= 1
        with pytest.raises(DnpError, match="busy"):
            pipeline(PROMPT)
        assert batcher.drain(60)
        assert all(ticket.done() for ticket in tickets)
        with pytest.raises(Draining):
            batcher.submit(Request(PROMPT))
    assert batcher.status.state == "closed"


def test_a_pipeline_gives_futures(pipeline):
    with dnp.Pipeline.open() as shared:
        tickets = [shared.submit(Request(PROMPT, seed=seed, steps=2, dns_steps=2)) for seed in range(2)]
        for seed, ticket in enumerate(tickets):
            same(ticket.result(60), pipeline(PROMPT, seed=seed, steps=2, dns_steps=2))
