"""Requests of several threads on one pipeline: what each gives is what it gives alone."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dnp
from dnp.engine.errors import Busy, Cancelled, DeadlineExceeded, DnpError, Draining, SettingsError
from dnp.runtime.batching import Batcher, BatchOptions, NegativeCache, Negatives, Picture, Plain, Progress
from dnp.runtime.batching.core import Core
from dnp.runtime.batching.stages import Room, Stages
from dnp.runtime.batching.tasks import Task
from dnp.runtime.batching.work import make_images
from dnp.runtime.request import Request
from dnp.runtime.sampling.samplers import sampler_names

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
    [
        ({"height": 32}, "start with --size 64x64 --size 64x32$"),
        ({"windows": 2}, "--windows 2"),
        ({"steps": 200}, "--max-steps 200"),
    ],
)
def test_what_is_not_served_is_refused_at_once(batcher, settings, told):
    with pytest.raises(SettingsError, match=told):
        batcher.submit(Request(PROMPT, dnp=False, **settings))


def test_half_a_request_gives_n_star_and_is_refused_where_there_is_none_to_find(batcher, pipeline):
    with pytest.raises(SettingsError, match="DNS finds"):
        batcher.submit(Request(PROMPT, negative="a cross"), what="negatives")
    found = batcher.submit(Request(PROMPT, steps=3, dns_steps=2), what="negatives").result(60)
    same(found, pipeline.dns(PROMPT, steps=3, dns_steps=2))


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


def test_a_pipeline_that_is_busy_gives_futures_afterwards():
    with dnp.Pipeline.open() as shared:
        with shared.exclusive(), pytest.raises(DnpError, match="busy"):
            shared.submit(Request(PROMPT))
        assert shared.submit(Request(PROMPT, steps=1, dns_steps=1)).result(60).images


def test_a_warm_up_that_fails_gives_the_pipeline_back_and_may_be_tried_again(monkeypatch):
    before = set(threading.enumerate())
    with dnp.Pipeline.open() as pipeline:
        batcher = Batcher(pipeline, BatchOptions(samples=1))
        with monkeypatch.context() as broken:
            broken.setattr(Stages, "decode", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                batcher.warm_up()
        assert set(threading.enumerate()) <= before
        request = Request(PROMPT, steps=1, dns_steps=1)
        assert pipeline.run(request).images
        with batcher:
            assert batcher.submit(request).result(60).images


def test_closing_ends_a_warm_up(monkeypatch):
    rehearse, begun, go_on = Stages.rehearse, threading.Event(), threading.Event()

    def slow(stages, rows):
        begun.set()
        assert go_on.wait(60)
        return rehearse(stages, rows)

    monkeypatch.setattr(Stages, "rehearse", slow)
    with dnp.Pipeline.open() as pipeline, ThreadPoolExecutor(2) as others:
        batcher = Batcher(pipeline, BatchOptions(samples=1))
        warming = others.submit(batcher.warm_up)
        assert begun.wait(60)
        closing = others.submit(batcher.close)
        while batcher.status.state != "closed":
            time.sleep(0.001)
        go_on.set()
        with pytest.raises(Cancelled, match="closed"):
            warming.result(60)
        closing.result(60)
        with pytest.raises(Cancelled, match="closed"):
            batcher.warm_up()


@pytest.fixture(scope="module", params=["cpu", "openvino"])
def either(request):
    with dnp.Pipeline.open(backend=request.param, threads=1) as opened:
        yield opened


def varied(number):
    """One of many requests that have little in common but their size, a small one to be quick."""
    rng = random.Random(number)
    names = [name for name in sampler_names() if name != "ddpm"]
    return Request(
        rng.choice([PROMPT, "a green star", "a cross"]), negative=rng.choice([None, "a small circle"]), seed=number,
        images=rng.choice([1, 1, 2]), compare=rng.random() < 0.3, height=32, width=32, steps=rng.randint(1, 4),
        sampler=rng.choice(names), guidance=rng.choice([4.0, 1.0, -2.0, 0.0]), dns_steps=rng.randint(1, 3),
        dns_sampler=rng.choice(names), beams=rng.choice([1, 1, 2]), max_length=6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def by_itself(either):
    """What a request gives when it has the pipeline for itself: a result, or the error."""
    known = {}

    def made(number):
        if number not in known:
            try:
                known[number] = either.run(varied(number))
            except DnpError as error:
                known[number] = str(error)
        return known[number]

    return made


@settings(max_examples=4)
@given(st.integers(1, 4), st.lists(st.integers(0, 30), min_size=2, max_size=5, unique=True), st.integers(0, 2**32))
def test_whatever_the_company_the_bits_are_the_same(either, by_itself, places, numbers, seed):
    rng, expected = random.Random(seed), {number: by_itself(number) for number in numbers}
    core = Core(Stages(either.graphs), lambda want: Room(places, 20, 20, want.height, want.width, want.windows))
    core.reset()
    found, waiting = {}, list(numbers)
    while waiting or core.tasks:
        if waiting and rng.random() < 0.4:
            number = waiting.pop()
            job = either.resolve(varied(number))
            leaves = rng.random() < 0.1
            core.add(
                Task(
                    make_images(job),
                    lambda made, error, number=number: found.update({number: (made, error)}),
                    lambda told: None,
                    previews=rng.choice([0, 2]),
                    stopped=lambda leaves=leaves: leaves and rng.random() < 0.3,
                )
            )
        core.tick()
    for number, (made, error) in found.items():
        if error is None:
            assert made.negatives == expected[number].negatives
            for name in ("arrays", "dns_arrays", "plain_arrays"):
                np.testing.assert_array_equal(getattr(made, name), getattr(expected[number], name))
        else:
            assert isinstance(error, Cancelled) or str(error) == expected[number]


def test_a_session_that_fails_ends_those_in_the_call_and_the_engine_lives_on(batcher, pipeline, monkeypatch):
    session, before = batcher.pipeline.graphs.denoiser.session, batcher.status.failures.get("OSError", 0)
    run, calls = session.run, []

    def fails_once():
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the device is gone")
        run()

    monkeypatch.setattr(session, "run", fails_once)
    request = Request(PROMPT, steps=5, dnp=False)
    with pytest.raises(OSError, match="gone"):
        batcher.submit(request).result(60)
    same(batcher.submit(request).result(60), pipeline.run(request))
    assert batcher.status.failures["OSError"] == before + 1


def test_one_for_which_steps_fail_ends_alone(batcher, pipeline, monkeypatch):
    """Whoever was in those steps with it gives the same image as ever."""
    denoiser = batcher.pipeline.graphs.denoiser
    run, failed = denoiser.session.run, []

    def fails():
        among = set(denoiser.session.inputs["row_place"].read().tolist())
        held = denoiser.session.inputs["index"].read()
        seeds = {place: sample.seed for place, sample in enumerate(denoiser._samples) if sample}
        if any(seeds[place] == 66 and held[place] == 2 for place in among):
            failed.append(among)
            raise OSError("not this one")
        run()

    monkeypatch.setattr(denoiser.session, "run", fails)
    requests = [Request(PROMPT, steps=8, dnp=False, seed=seed) for seed in (5, 66, 7)]
    tickets = [batcher.submit(request) for request in requests]
    for request, ticket in zip(requests, tickets, strict=True):
        if request.seed == 66:
            with pytest.raises(OSError, match="not this one"):
                ticket.result(60)
        else:
            same(ticket.result(60), pipeline.run(request))
    assert len(failed[-1]) == 1


def test_captions_run_beside_requests(batcher, pipeline):
    pictures = [Image.new("RGB", (size, 64), colour) for size, colour in ((64, "red"), (48, "blue"), (64, "green"))]
    ticket = batcher.submit(Request(PROMPT, steps=8, dns_steps=2))
    assert batcher.caption(pictures, max_length=8).result(60) == pipeline.caption(pictures, max_length=8)
    assert ticket.result(60).negatives
    with pytest.raises(SettingsError, match="beams"):
        batcher.caption(pictures, beams=0)
    with pytest.raises(SettingsError, match=r"PIL\.Image"):
        batcher.caption(["a.png"])


def test_a_listener_that_raises_harms_nobody(batcher, pipeline, caplog):
    def raises(event):
        raise LookupError("of the caller")

    request = Request(PROMPT, steps=2, dnp=False)
    same(batcher.submit(request, listener=raises).result(60), pipeline.run(request))
    assert len([record for record in caplog.records if "listener" in record.getMessage()]) == 1


def test_what_was_found_is_not_sampled_again(tmp_path):
    request = Request(PROMPT, images=2, steps=2, dns_steps=2, max_length=8)
    cache = NegativeCache(folder=tmp_path)
    with dnp.Pipeline.open() as pipeline:
        with Batcher(pipeline, BatchOptions(samples=2, negatives=cache)) as batcher:
            first, again = batcher.submit(request).result(60), batcher.submit(request).result(60)
            more = batcher.submit(Request(PROMPT, seed=1, images=2, steps=2, dns_steps=2, max_length=8)).result(60)
            status = batcher.status
        same(first, again)
        assert "dns" in first.seconds
        assert "dns" not in again.seconds
        assert (status.hits, status.misses) == (3, 3)  # of the last request seed 1 was known
        np.testing.assert_array_equal(more.dns_arrays[0], first.dns_arrays[1])
        cache.close()
        assert len(list(tmp_path.glob("*.png"))) == 3
        after = NegativeCache(folder=tmp_path)
        with Batcher(pipeline, BatchOptions(samples=2, negatives=after)) as batcher:
            same(batcher.submit(request).result(60), first)
            for setting in ({"dns_steps": 3}, {"max_length": 9}, {"dns_guidance": 2.0}, {"prompt": "a star"}):
                batcher.submit(Request(**{**vars(request), "images": 1, **setting})).result(60)
        assert (after.hits, after.misses) == (2, 4)
        after.close()


def test_what_is_being_found_is_not_sampled_again(batcher, pipeline):
    """Nor is it counted as anything but a hit. Where nothing is kept, each finds its own."""
    requests = [Request(PROMPT, seed=21, steps=2, dns_steps=9, max_length=8, guidance=w) for w in (4.0, 1.0, 2.0)]
    expected = [pipeline.run(request) for request in requests]
    for found, expect in zip([batcher.submit(request) for request in requests], expected, strict=True):
        same(found.result(60), expect)
        assert "dns" in found.result().seconds
    with dnp.Pipeline.open() as shared, Batcher(shared, BatchOptions(samples=2, negatives=NegativeCache())) as keeps:
        found = [ticket.result(60) for ticket in [keeps.submit(request) for request in requests]]
        status = keeps.status
    for one, expect in zip(found, expected, strict=True):
        same(one, expect)
    assert ["dns" in one.seconds for one in found] == [True, False, False]
    assert (status.hits, status.misses) == (2, 1)


def test_a_cache_is_bounded_and_distrusts_its_folder(tmp_path):
    from dnp.runtime.batching.negatives import Found

    images = np.random.default_rng(0).integers(0, 256, (4, 50, 50, 3), np.uint8)
    cache = NegativeCache(memory=0.02, folder=tmp_path, disk=0.02)  # of 7.5 kB each two fit
    for number, image in enumerate(images):
        cache.put(str(number), Found(image, f"n* {number}"), {"request": {}, "negative": f"n* {number}"})
    cache.close()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["2.png", "3.png"]
    assert cache.get("0") is None
    assert cache.get("3").text == "n* 3"
    fresh = NegativeCache(folder=tmp_path)
    np.testing.assert_array_equal(fresh.get("2").image, images[2])
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:99])
    assert fresh.get("3") is None
    fresh.close()


def test_closing_ends_the_thread_and_whoever_waits():
    before = set(threading.enumerate())
    with dnp.Pipeline.open() as pipeline:
        batcher = Batcher(pipeline, BatchOptions(samples=1))
        with pytest.raises(DnpError, match="warm_up"):
            batcher.submit(Request(PROMPT))
        batcher.warm_up()
        tickets = [batcher.submit(Request(PROMPT, steps=60)) for _ in range(3)]
        batcher.close()
        for ticket in tickets:
            with pytest.raises(Cancelled, match="closed"):
                ticket.result(60)
        assert pipeline(PROMPT, steps=1, dns_steps=1).images  # which is its owner's again
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("settings", [{"samples": 0}, {"queue": 0}, {"steps": 2.5}, {"samples": True}])
def test_options_that_make_no_sense_are_refused(settings):
    with pytest.raises(SettingsError, match=next(iter(settings))):
        BatchOptions(**settings)


def test_a_mix_of_everything_is_answered_and_nothing_is_left(batcher, pipeline):
    """Many threads with good, bad, late and cancelled requests: each gets its own, and memory is given back."""
    rng = random.Random(5)
    requests = [
        Request(PROMPT, seed=number % 4, images=1 + number % 2, steps=1 + number % 3, dns_steps=1, max_length=6)
        for number in range(24)
    ]
    alone = {}

    def ask(number):
        kind = rng.choice(["good", "good", "cancelled", "late", "bad"])
        request, how = requests[number], {"deadline": 0.05} if kind == "late" else {}
        if kind == "bad":
            request = Request(PROMPT, steps=3, dnp=False, guidance=1e38)
        ticket = batcher.submit(
            request, previews=number % 2, listener=(lambda event: None) if number % 3 else None, **how
        )
        if kind == "cancelled":
            ticket.cancel()
        error = ticket.exception(120)
        if error is None:
            return number, ticket.result()
        assert isinstance(error, {"cancelled": Cancelled, "late": DeadlineExceeded, "bad": DnpError}[kind])
        return number, None

    with ThreadPoolExecutor(6) as threads:
        for number, result in threads.map(ask, range(len(requests))):
            if result is not None:
                key = repr(requests[number])
                alone[key] = alone.get(key) or pipeline.run(requests[number])
                same(result, alone[key])
    for _ in range(100):  # the thread counts anew at its next turn
        status = batcher.status
        if not status.requests:
            break
        time.sleep(0.05)
    assert (status.queued, status.requests, dict(status.running), status.company) == (0, 0, {}, 0)
