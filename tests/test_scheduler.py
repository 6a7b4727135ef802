"""The scheduler on stages that compute nothing, and a clock that they move: who joins, who waits, who ends how."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnp.engine.errors import Cancelled, DeadlineExceeded, DnpError
from dnp.runtime.batching.core import TURN, Core
from dnp.runtime.batching.events import Picture
from dnp.runtime.batching.stages import Room
from dnp.runtime.batching.tasks import AGEING, NEVER, Task
from dnp.runtime.batching.warmup import measure_cap
from dnp.runtime.batching.work import Captioning, Sampling
from dnp.runtime.captioning.captioner import CaptionSettings
from dnp.runtime.result import Step

SETTINGS = CaptionSettings(1, "", 0, 8)
STEP, TOKEN, DECODE = 1.0, 0.1, 0.25  # seconds


class Stages:
    """Samples that count their steps: an image is four numbers, of its seed, its texts, its steps and its phase.

    ``broken`` is asked before each call, with its name and what it is about; what it returns is raised.
    """

    def __init__(self, broken=lambda name, about: None):
        self.now, self.broken, self.token = 0.0, broken, TOKEN
        self.log: list[tuple[str, object]] = []
        self.held: dict[int, list] = {}  # by place: what is wanted, the number, steps taken
        self.slots: dict[int, np.ndarray] = {}

    def call(self, name, about, seconds=0.0):
        self.log.append((name, about))
        self.now += seconds
        if (error := self.broken(name, about)) is not None:
            raise error

    def open(self, room):
        assert not self.held, "samples are in the places"
        self.call("open", room)
        self.room = room
        return room.places

    def join(self, place, wanted, number):
        assert place not in self.held
        assert place < self.room.places
        assert wanted.height == self.room.height
        self.call("join", wanted.seeds[number])
        self.held[place] = [wanted, number, 0]

    def leave(self, place):
        del self.held[place]

    def left(self, place):
        wanted, _, taken = self.held[place]
        return wanted.table.calls - taken

    def step(self, running):
        assert running
        assert all(self.left(place) for place in running)
        self.call("step", [self.held[place][0].seeds[self.held[place][1]] for place in running], STEP)
        for place in running:
            self.held[place][2] += 1

    def keep(self, place, slot, *, clean):
        wanted, number, taken = self.held[place]
        numbers = [wanted.seeds[number], sum(map(ord, "".join(wanted.texts(number)))), taken, len(wanted.phase)]
        self.slots[slot] = np.array(numbers).reshape(1, 2, 2, 1)
        return wanted.seeds[number] != 13 or clean

    def decode(self, slot):
        self.call("decode", int(self.slots[slot].flat[0]), DECODE)
        return self.slots[slot]

    def captioned(self, beams):
        return 4

    def caption(self, images, settings):
        for token in range(2, 6):
            self.call("caption", [int(image.flat[0]) for image in images], self.token)
            yield token
        return [f"image {' '.join(map(str, image.flat))}" for image in images]


def sampling(phase, seeds, calls, size, texts=("",)):
    table = SimpleNamespace(calls=calls, perp_neg=False)
    return Sampling(phase, table, ["p"] * len(seeds), list(texts) * (len(seeds) // len(texts)), seeds, size, size, 1)


def request(seeds, calls=(3, 4), size=64):
    """DNS, captions, final; returns the images and the captions."""
    images = yield sampling("dns", seeds, calls[0], size)
    texts = yield Captioning(images, SETTINGS)
    return (yield sampling("final", seeds, calls[1], size, texts)), texts


def finding(found, seeds, calls=(3, 4), size=64):
    """The same, with DNS seeds of its own: whoever has them wants the same images."""
    keys = list(map(str, found))
    images = yield replace(sampling("dns", found, calls[0], size), keys=keys)
    texts = yield Captioning(images, SETTINGS, keys)
    return (yield sampling("final", seeds, calls[1], size, texts)), texts, images


class World:
    def __init__(self, places=3, broken=lambda name, about: None):
        self.stages = Stages(broken)
        self.core = Core(self.stages, lambda w: Room(places, 9, 9, w.height, w.width, 1), lambda: self.stages.now)
        self.ended: dict[int, tuple] = {}
        self.told: dict[int, list] = {}

    def add(self, name, work, **how):
        assert name not in self.told
        told = self.told[name] = []

        def finish(result, error):
            assert name not in self.ended
            self.ended[name] = (result, error)

        task = Task(work, finish, told.append, arrived=self.stages.now, **how)
        self.core.add(task)
        return task

    def run(self):
        for _ in range(10_000):
            if not self.core.tick():
                break
        assert not self.core.tasks
        assert not self.stages.held
        assert not self.core.running

    def order(self, name):
        return [about for called, about in self.stages.log if called == name]


def alone(*settings, work=request):
    world = World()
    world.add(0, work(*settings))
    world.run()
    return world.ended[0][0]


def same(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]


some_request = st.tuples(
    st.integers(1, 4), st.tuples(st.integers(1, 5), st.integers(1, 5)), st.sampled_from([64, 64, 64, 96]),
    st.integers(-1, 1), st.sampled_from([NEVER, NEVER, 20.0]), st.integers(0, 12), st.integers(0, 40),
)  # fmt: skip


@given(st.integers(1, 4), st.lists(some_request, min_size=1, max_size=8))
def test_whoever_comes_and_goes_each_gets_its_own_or_the_error_that_is_its_own(places, requests):
    """At random: images, steps, sizes, priorities, deadlines; when each comes, and when some are cancelled."""
    world, stops, settings = World(places), {}, {}
    for tick in range(60):
        for number, (images, calls, size, priority, deadline, comes, stopped) in enumerate(requests):
            if tick == comes:
                seeds = [100 * (number + 1) + image for image in range(images)]
                settings[number] = seeds, calls, size
                stops[number] = False
                world.add(
                    number, request(seeds, calls, size), priority=priority, deadline=world.stages.now + deadline,
                    previews=number % 3, stopped=lambda number=number: stops[number],
                )  # fmt: skip
            if tick == comes + stopped and stopped:
                stops[number] = True
                over = number in world.ended
                world.core.tick()
                assert number in world.ended
                assert over or isinstance(world.ended[number][1], Cancelled)
        world.core.tick()
        steps = [about for name, about in world.stages.log if name == "step"]
        assert all(len(step) == len(set(step)) <= places for step in steps)
    world.run()
    assert len(world.ended) == len(requests)
    for number, (result, error) in world.ended.items():
        if error is None:
            same(result, alone(*settings[number]))
        else:
            assert isinstance(error, Cancelled | DeadlineExceeded)
            assert (requests[number][4] < NEVER) or stops[number]


some_finding = st.tuples(
    st.lists(st.integers(1, 3), min_size=1, max_size=3, unique=True), st.tuples(st.integers(2, 3), st.integers(1, 3)),
    st.sampled_from([64, 64, 64, 96]), st.integers(-1, 1), st.sampled_from([NEVER, NEVER, 12.0]), st.integers(0, 8),
    st.integers(0, 12),
)  # fmt: skip


@given(st.integers(1, 4), st.lists(some_finding, min_size=2, max_size=8), st.sets(st.integers(0, 80), max_size=4))
def test_what_several_want_is_made_once_at_a_time_and_each_gets_its_own(places, requests, broken):
    """At random: who wants the same as whom, when each comes, is late, cancelled, and which calls fail."""
    calls = itertools.count()
    world = World(places, lambda name, about: OSError("broken") if next(calls) in broken else None)
    stops, settings = {}, {}
    for tick in range(25):
        for number, (found, counts, size, priority, deadline, comes, stopped) in enumerate(requests):
            if tick == comes:
                dns = [seed + 10 * counts[0] + size for seed in found]  # of equal settings alone the same
                settings[number] = dns, [1000 * (number + 1) + image for image in range(len(dns))], counts, size
                stops[number] = False
                world.add(
                    number, finding(*settings[number]), priority=priority, deadline=world.stages.now + deadline,
                    previews=number % 2, stopped=lambda number=number: stops[number],
                )  # fmt: skip
            if tick == comes + stopped and stopped:
                stops[number] = True
        world.core.tick()
    world.run()
    assert len(world.ended) == len(requests)
    for number, (result, error) in world.ended.items():
        if error is None:
            same(result, alone(*settings[number], work=finding))
        else:
            assert isinstance(error, Cancelled | DeadlineExceeded | OSError)
            assert isinstance(error, OSError) <= bool(broken)
    for name in ("step", "caption"):
        assert all(len(made) == len(set(made)) for made in world.order(name))


def test_what_one_has_begun_is_made_for_all_who_want_it():
    world = World(places=2)
    world.add("a", finding([1], [100]))
    world.core.tick()
    world.add("b", finding([1], [200], (3, 2)))
    world.add("c", finding([1, 2], [300, 301]))
    world.run()
    assert world.order("join").count(1) == 1
    assert world.order("caption") == [[1]] * 4 + [[1, 2]] * 4
    for name, seeds, calls in (("a", [100], (3, 4)), ("b", [200], (3, 2))):
        same(world.ended[name][0], alone([1], seeds, calls, work=finding))
    same(world.ended["c"][0], alone([1, 2], [300, 301], work=finding))
    assert not np.shares_memory(*(world.ended[name][0][2] for name in "ab"))


@pytest.mark.parametrize("found", [[1], [1, 2]])
def test_whenever_the_second_comes_nothing_is_made_twice(found):
    """Until n* is found, after which it is kept elsewhere: while it is sampled, decoded, and captioned."""
    for ticks in itertools.count():
        world = World(places=1)
        first = world.add("first", finding(found, [100, 101][: len(found)], (2, 20)))
        for _ in range(ticks):
            world.core.tick()
        if isinstance(first.want, Sampling) and first.want.phase == "final":
            break
        settings = found, [200, 201][: len(found)], (2, 20)
        world.add("second", finding(*settings))
        world.run()
        assert [world.order("join").count(seed) for seed in found] == [1] * len(found)
        assert sorted(itertools.chain(*world.order("caption"))) == sorted(found * 4)
        same(world.ended["second"][0], alone(*settings, work=finding))
        assert not np.shares_memory(*(world.ended[name][0][2] for name in ("first", "second")))
    assert ticks > 5


def test_what_has_no_key_is_made_for_each():
    world = World(places=2)
    for name in "ab":
        world.add(name, request([1]))
    world.run()
    assert world.order("join") == [1, 1, 1, 1]


@pytest.mark.parametrize("ends", ["cancelled", "late", "join", "step", "decode", "caption"])
def test_who_follows_one_that_ends_is_answered_all_the_same(ends):
    """At whatever point the first one ends, and however: the error is its own."""
    stop, failed = [], []

    def broken(name, about):
        if name == ends and not failed:
            failed.append(name)
            return OSError("of the first")
        return None

    for ticks in range(8):
        stop.clear()
        failed.clear()
        world = World(places=2, broken=broken)
        deadline = ticks + 0.5 if ends == "late" else NEVER
        world.add("first", finding([1], [100]), deadline=deadline, stopped=lambda: stop)
        world.add("second", finding([1], [200]))
        for _ in range(ticks):
            world.core.tick()
        if ends == "cancelled":
            stop.append(True)
        world.run()
        kind = {"cancelled": Cancelled, "late": DeadlineExceeded}.get(ends, OSError)
        assert isinstance(world.ended["first"][1], kind)
        same(world.ended["second"][0], alone([1], [200], work=finding))


def test_a_caption_that_fails_beside_others_ends_none_of_them():
    """Nor whoever follows one of them that has ended by then, and who waits for nobody but itself."""
    stop, failures = [], iter([None, OSError("of both"), *[None] * 99])
    world = World(places=2, broken=lambda name, about: next(failures) if name == "caption" else None)
    world.add("a", finding([1], [100], (1, 1)), stopped=lambda: stop)
    world.add("b", finding([2], [200], (1, 9)))
    while not world.order("caption"):
        world.core.tick()
    assert world.order("caption") == [[1, 2]]
    world.add("c", finding([1], [300], (1, 1)))
    stop.append(True)
    world.run()
    assert isinstance(world.ended["a"][1], Cancelled)
    same(world.ended["b"][0], alone([2], [200], (1, 9), work=finding))
    same(world.ended["c"][0], alone([1], [300], (1, 1), work=finding))
    assert list(world.ended).index("c") < list(world.ended).index("b")


@pytest.mark.parametrize("ticks", range(6))
def test_a_picture_on_the_way_is_nothing_to_follow(ticks):
    """It may be decoded when the image is there already."""
    world = World(places=3)
    world.add("long", iter_once([9], 99))
    world.add("first", finding([1], [100], (1, 30)), previews=1)
    for _ in range(ticks):
        world.core.tick()
    world.add("second", finding([1], [200], (1, 2)))
    world.run()
    assert list(world.ended) == ["second", "first", "long"]


def test_nobody_waits_for_the_turn_of_another():
    """What is only queued is not followed: the more urgent one begins, before what is in between, and is followed."""
    world = World(places=1)
    world.add("busy", iter_once([9], 3))
    world.core.tick()
    world.add("low", finding([1], [100]), priority=-1)
    world.add("other", iter_once([8], 3))
    world.add("high", finding([1], [200]), priority=1)
    world.run()
    assert world.order("join") == [9, 1, 8, 200, 100]


def test_a_piece_is_had_when_it_is_made_not_when_all_of_the_first_ones_are():
    world = World(places=1)
    world.add("many", finding([1, 2, 3], [100, 101, 102]))
    world.core.tick()
    world.add("one", finding([1], [200]), priority=1)
    world.run()
    assert world.order("join")[:3] == [1, 2, 200]  # the caption was made beside the second one


def test_one_step_is_of_all_that_are_in_whatever_their_phase():
    world = World(places=3)
    world.add("a", request([1], (2, 4)))
    world.core.tick()
    world.add("b", request([2], (5, 1)))
    world.run()
    assert world.order("step")[:3] == [[1], [1, 2], [2]]  # a's caption takes less than the second step
    assert [1, 2] in map(sorted, world.order("step")[3:])  # its final pass beside the other's DNS pass


def test_a_place_is_given_on_in_the_tick_in_which_it_is_free():
    world = World(places=1)
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        world.add(name, iter_once([seed], 2))
    world.run()
    assert world.order("step") == [[1], [1], [2], [2], [3], [3]]


def iter_once(seeds, calls, size=64, phase="final"):
    return (yield sampling(phase, seeds, calls, size))


def test_priority_deadline_then_first_come():
    world = World(places=1)
    world.add("first", iter_once([1], 1))
    world.add("late", iter_once([2], 1), deadline=90.0)
    world.add("soon", iter_once([3], 1), deadline=50.0)
    world.add("urgent", iter_once([4], 1), priority=1)
    world.run()
    assert world.order("join") == [4, 3, 2, 1]


def test_waiting_makes_urgent():
    world = World(places=1)
    world.add("old", iter_once([1], 1))
    world.stages.now = 2 * AGEING
    world.add("urgent", iter_once([2], 1), priority=1)
    world.add("more urgent", iter_once([3], 1), priority=3)
    world.run()
    assert world.order("join") == [3, 1, 2]


@pytest.mark.parametrize("seconds", [NEVER, 600.0])  # a server gives every request a deadline
def test_many_images_leave_places_to_others(seconds):
    world = World(places=2)
    world.add("many", iter_once([20, 21, 22, 23, 24, 25, 26], 2), deadline=seconds)
    world.core.tick()
    for seed in (1, 2):
        world.add(seed, iter_once([seed], 2), deadline=world.stages.now + seconds)
    world.run()
    assert world.order("join") == [20, 21, 1, 2, 22, 23, 24, 25, 26]


def test_a_long_request_does_not_age_while_it_is_served():
    world = World(places=1)
    world.add("many", iter_once(list(range(20, 90)), 2))
    while world.stages.now < 3 * AGEING:
        world.core.tick()
    world.add("one", iter_once([1], 2))
    before = len(world.order("join"))
    world.run()
    assert world.order("join").index(1) == before


def test_another_size_waits_a_turn_and_no_longer():
    world = World(places=2)
    world.add("small", iter_once([1], 4))
    world.core.tick()
    world.add("large", iter_once([2], 4, size=96))
    for number in range(60):
        world.add(number, iter_once([100 + number], 4))
    world.run()
    steps = world.order("step")
    waited = steps.index([2])
    assert TURN <= waited <= TURN + 4 + 1  # the turn, and what the last to join needs
    assert all(len(step) == 2 for step in steps[1:TURN])  # meanwhile no place is empty


def test_decoding_goes_on_in_pieces_between_steps_and_all_at_once_where_nobody_waits():
    world = World(places=4)
    world.add("batch", iter_once([1, 2, 3, 4], 2))
    world.core.tick()
    world.core.tick()
    world.add("next", iter_once([5, 6], 6))
    world.run()
    names = [name for name, _ in world.stages.log]
    decodes = "".join(name[0] for name in names if name in ("decode", "step"))
    assert decodes == "ss" + "dds" + "ds" + "ds" + "sss" + "dd"


def test_captions_of_several_requests_run_together_and_leave_room_for_steps():
    world = World(places=4)
    world.stages.token = 0.6 * STEP
    world.add("long", iter_once([1], 12))
    for name, seed in (("a", 2), ("b", 3), ("c", 4)):
        world.add(name, request([seed], (1, 1)))
    world.run()
    assert [3, 4] in world.order("caption")  # which waited for the first
    names = "".join(name[0] for name, _ in world.stages.log)
    tokens = [part.count("c") for part in names.split("s")]
    assert sum(tokens) == 8
    assert max(tokens) == 2  # as many as fit in the time of a step, and one


def test_images_that_were_to_join_after_the_bad_one_hold_no_place():
    world = World(places=3, broken=lambda name, about: RuntimeError("bad") if (name, about) == ("join", 7) else None)
    world.add("bad", iter_once([6, 7, 8], 3))
    world.add("good", iter_once([1, 2, 3], 3))
    world.run()
    assert str(world.ended["bad"][1]) == "bad"
    assert world.ended["good"][0].shape[0] == 3
    assert [1, 2, 3] in map(sorted, world.order("step"))


def test_who_is_cancelled_while_captioned_with_others_is_told_nothing_more():
    stop = []
    world = World(places=2)
    world.add("a", request([1], (1, 1)))
    world.add("b", request([2], (1, 1)), stopped=lambda: stop)
    while [1, 2] not in world.order("caption"):
        world.core.tick()
    stop.append(True)
    told = len(world.told["b"])
    world.run()
    assert len(world.told["b"]) == told
    assert isinstance(world.ended["b"][1], Cancelled)
    same(world.ended["a"][0], alone([1], (1, 1)))


@pytest.mark.parametrize("name", ["join", "step", "decode", "caption"])
def test_an_error_ends_the_one_that_it_is_about(name):
    def broken(called, about):
        return (
            RuntimeError("bad") if called == name and (about == 7 or (isinstance(about, list) and 7 in about)) else None
        )

    world = World(places=3, broken=broken)
    for number, seed in enumerate((5, 7, 9)):
        world.add(number, request([seed]))
    world.run()
    assert str(world.ended[1][1]) == "bad"
    for number, seed in ((0, 5), (2, 9)):
        same(world.ended[number][0], alone([seed]))


def test_a_step_that_fails_for_all_but_not_for_each_ends_nobody():
    failures = iter([None, RuntimeError("too many"), *[None] * 99])
    world = World(places=2, broken=lambda name, about: next(failures) if name == "step" else None)
    for number, seed in enumerate((1, 2, 3)):
        world.add(number, request([seed]))
    world.run()
    for number, seed in enumerate((1, 2, 3)):
        same(world.ended[number][0], alone([seed]))


def test_a_device_that_is_lost_ends_those_in_its_step_and_the_next_ones_go_on():
    failures = iter([None, *[RuntimeError("device")] * 3, *[None] * 99])
    world = World(places=2, broken=lambda name, about: next(failures) if name == "step" else None)
    for number, seed in enumerate((1, 2, 3)):
        world.add(number, request([seed]))
    world.run()
    assert [str(world.ended[number][1]) for number in (0, 1)] == ["device", "device"]
    same(world.ended[2][0], alone([3]))


def test_latents_that_are_no_numbers_end_their_request_alone():
    world = World(places=3)
    world.add("bad", request([12, 13]))
    world.add("good", request([14]))
    world.run()
    assert "finite" in str(world.ended["bad"][1])
    same(world.ended["good"][0], alone([14]))


def test_what_cannot_be_opened_ends_its_request_alone():
    world = World(broken=lambda name, about: MemoryError() if name == "open" and about.height == 96 else None)
    world.add("small", request([1]))
    world.add("large", request([2], size=96))
    world.run()
    assert isinstance(world.ended["large"][1], MemoryError)
    same(world.ended["small"][0], alone([1]))


def test_a_request_that_raises_by_itself_frees_its_places():
    def refuses(seeds):
        yield sampling("dns", seeds, 2, 64)
        raise DnpError("no words")

    world = World()
    world.add("bad", refuses([1]))
    world.add("good", request([2]))
    world.run()
    assert str(world.ended["bad"][1]) == "no words"
    same(world.ended["good"][0], alone([2]))


def test_steps_are_told_evenly_and_pictures_where_they_are_due():
    world = World(places=2)
    world.add("a", iter_once([1, 2, 3], 8), previews=3)
    world.run()
    steps = [told for told in world.told["a"] if isinstance(told, Step)]
    assert [step.index for step in steps] == sorted(step.index for step in steps)
    assert steps[-1].index == steps[-1].total == 16
    pictures = [told for told in world.told["a"] if isinstance(told, Picture)]
    assert {(p.number, p.index): int(p.image.flat[2]) for p in pictures} == {
        (number, index): taken for number in range(3) for index, taken in enumerate((2, 4, 6))
    }


def test_seconds_are_those_of_its_own_phases():
    world = World(places=2)
    task = world.add("a", request([1], (2, 3)))
    world.add("b", request([2], (5, 5)))
    world.run()
    assert task.seconds["dns"] == 2 * STEP
    assert task.seconds["final"] == 3 * STEP
    assert task.seconds["decode"] == 2 * DECODE
    assert sum(task.seconds.values()) <= world.stages.now


@pytest.mark.parametrize(
    ("seconds", "most", "cap"),
    [
        (lambda n: n, 8, 1),  # more at once brings nothing
        (lambda n: 1 + n / 100, 8, 8),  # it costs nothing
        (lambda n: max(1.0, n / 4), 8, 4),  # until the device is full
        (lambda n: 1 + n, 3, 3),
        (lambda n: 1.0 if n < 6 else 10.0, 8, 4),
    ],
)
def test_the_cap_is_the_smallest_batch_within_five_percent_of_the_best(seconds, most, cap):
    noise = np.random.default_rng(0)
    assert measure_cap(lambda n: seconds(n) * (1 + noise.choice([0, 0, 3])), most, lambda: 0.0) == cap


def test_measuring_the_cap_ends_with_its_budget():
    now = [0.0]

    def step(samples):
        now[0] += 4.0 * samples
        return 4.0 * samples

    assert measure_cap(step, 8, lambda: now[0]) == 1
    assert now[0] <= 30
