"""The scheduler: each tick takes one step with every sample that is in a place, and does a bounded piece of the rest.

It starts no thread and owns no clock: whoever drives it calls ``tick`` until nothing is left to do.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from dnp.engine.errors import DnpError
from dnp.runtime.batching.events import Picture
from dnp.runtime.batching.stages import Room, Stages
from dnp.runtime.batching.tasks import Piece, Task, Tasks
from dnp.runtime.batching.work import Captioning, Sampling
from dnp.runtime.result import Step

Pixels = npt.NDArray[np.uint8]
_log = logging.getLogger("dnp.runtime")

TURN: Final = 32  # steps that samples of one room may go on joining while one of another room is first


@dataclass(eq=False)
class _Seat(Piece):
    """A sample in a place."""

    want: Sampling
    due: list[int]  # calls after which a picture is due, the next one last


@dataclass(eq=False)
class _Kept(Piece):
    """Latents in a slot: of a finished image, or for a picture on the way."""

    want: Sampling
    slot: int
    preview: int | None = None


@dataclass(eq=False)
class _Seen(Piece):
    """An image that is being captioned."""

    want: Captioning


class Core:
    """Requests on one set of stages. ``add`` and ``tick`` are for one thread at a time.

    Attributes:
        lock: held through each tick, and by whoever uses the stages in between.
        steps, samples: how often a step was taken, and by how many samples all together.
    """

    def __init__(
        self,
        stages: Stages,
        room_of: Callable[[Sampling], Room],
        clock: Callable[[], float] = time.perf_counter,
        observe: Callable[[str, float], object] = lambda name, value: None,
    ) -> None:
        self._stages, self._clock, self._observe = stages, clock, observe
        self._tasks = Tasks(room_of, self._under_way, self._free, clock, observe)
        self.lock = threading.Lock()
        self.steps = self.samples = 0
        self.reset()

    def reset(self) -> None:
        """Take every place for free, and as of no size: the stages were used otherwise."""
        self._room: Room | None = None
        self._turn = TURN
        self._slots = 0
        self._seats: dict[int, _Seat] = {}  # by place
        self._kept: list[_Kept] = []  # what is decoded first comes first
        self._seen: list[_Seen] = []
        self._tokens: Generator[int, None, list[str]] | None = None
        self._pace = 0.0  # seconds of the last step

    @property
    def running(self) -> Counter[str]:
        """How many samples are in places, by phase; and how many images are being captioned."""
        return Counter([*(seat.want.phase for seat in self._seats.values()), *("caption" for _ in self._seen)])

    @property
    def tasks(self) -> list[Task]:
        """Those that are in."""
        return self._tasks.all

    def add(self, task: Task) -> None:
        """Take a task in."""
        self._tasks.add(task)

    def tick(self) -> bool:
        """Schedule; a piece of decoding and one of captioning; one step of all that are in; commit.

        The step comes last, so that a device computes it while the caller does something else. Returns whether anything
        is left to do.
        """
        with self.lock:
            self._tasks.retire()
            self._keep_finished()
            self._admit()
            self._decode()
            self._describe()
            self._step()
        return bool(self.tasks)

    def drop(self, task: Task, error: BaseException) -> None:
        """End a task with an error, if it is not over; its places are free."""
        if task in self.tasks:
            self._tasks.end(task, None, error)

    # Schedule

    def _admit(self) -> None:
        """Give free places to those that are first.

        Samples of one room alone share the places. Those of another room wait until these are free; until then others
        of the present room may pass them for a turn, not for longer.
        """
        passing = False
        joining: dict[int, _Seat] = {}
        while waiting := self._tasks.waiting(Sampling):
            if not self._seats and not self._kept and waiting[0].room != self._room:
                self._open(waiting[0])
                continue
            passing = waiting[0].room != self._room
            task = next((task for task in waiting if task.room == self._room), None)
            place = self._free_place()
            if task is None or place is None or (passing and self._turn <= 0):
                break
            self._seats[place] = joining[place] = self._seat(task)
            self._tasks.follow(self.tasks)
        self._turn -= passing
        if joining:
            self._join(joining)

    def _seat(self, task: Task) -> _Seat:
        """A seat for the next image that the task waits for."""
        want = task.want
        assert isinstance(want, Sampling)
        calls, count = want.table.calls, task.previews
        due = [calls - calls * (number + 1) // (count + 1) for number in range(count)]  # calls that are then left
        return _Seat(task, self._tasks.placed(task), want, due[::-1])

    def _under_way(self) -> list[Piece]:
        """What is being sampled or decoded, and what is being captioned."""
        return [*self._seats.values(), *(kept for kept in self._kept if kept.preview is None), *self._seen]

    def _open(self, task: Task) -> None:
        assert task.room is not None
        self._room = None
        try:
            self._slots = self._stages.open(task.room)
        except Exception as error:
            self._tasks.end(task, None, error)
        else:
            self._room, self._turn = task.room, TURN

    def _free_place(self) -> int | None:
        places = range(0 if self._room is None else self._room.places)
        return next((place for place in places if place not in self._seats), None)

    def _join(self, joining: dict[int, _Seat]) -> None:
        """Write samples into the places that they were given; whose sample cannot join, that task ends."""
        for place, seat in joining.items():
            if self._seats.get(place) is not seat:
                continue  # another image of its task has ended it
            self._tasks.begin(seat.task)
            started = self._clock()
            try:
                self._stages.join(place, seat.want, seat.number)
            except Exception as error:
                unwritten = list(joining)[list(joining).index(place) :]
                for other in unwritten:
                    if joining[other].task is seat.task:
                        del self._seats[other]
                self._tasks.end(seat.task, None, error)
            seat.task.spent(seat.want.phase, self._clock() - started)

    # Step

    def _step(self) -> None:
        """One step of the network for all; where it fails, for each task alone, so that one ends that is to blame."""
        running = self._running()
        if not running or (error := self._advance(running)) is None:
            return
        tasks = dict.fromkeys(seat.task for seat in running.values())
        for task in tasks:
            own = {place: seat for place, seat in running.items() if seat.task is task}
            of_own = error if len(tasks) == 1 else self._advance(own)
            if of_own is not None:
                self._tasks.end(task, None, of_own)

    def _advance(self, running: dict[int, _Seat]) -> Exception | None:
        """One step of these samples; returns what failed, which leaves them as they were."""
        started = self._clock()
        try:
            self._stages.step(running)
        except Exception as error:
            return error
        self._pace = self._clock() - started
        self._commit(running)
        return None

    def _running(self) -> dict[int, _Seat]:
        """The samples that take steps, by place."""
        return {place: seat for place, seat in self._seats.items() if self._stages.left(place)}

    def _commit(self, running: dict[int, _Seat]) -> None:
        """Everyone who was in that step is one further."""
        self.steps += 1
        self.samples += len(running)
        self._observe("step", self._pace)
        self._observe("batch", len(running))
        places: dict[Task, list[int]] = {}
        for place, seat in running.items():
            places.setdefault(seat.task, []).append(place)
            if seat.due and seat.due[-1] >= self._stages.left(place):
                self._preview(place, seat)
        for task, own in places.items():
            want = task.want
            assert isinstance(want, Sampling) and self._room is not None
            task.calls += len(own)
            task.spent(want.phase, self._pace)
            calls, count = want.table.calls, len(want.seeds)
            total = calls * math.ceil(count / self._room.places)
            index = max(1, task.calls * total // (calls * count))
            task.tell(Step(want.phase, index, total, partial(self._look, tuple(own))))

    def _preview(self, place: int, seat: _Seat) -> None:
        """Keep what an image is expected to become; a picture that has to wait is not worth it."""
        seat.due.pop()
        index = seat.task.previews - 1 - len(seat.due)
        if (slot := self._free_slot()) is not None:
            self._stages.keep(place, slot, clean=True)
            self._kept.append(_Kept(seat.task, seat.number, seat.want, slot, index))

    def _keep_finished(self) -> None:
        """Hand what is finished to the decoder; where that has no room, it stays in its place until there is."""
        running = self._running()
        for place, seat in list(self._seats.items()):
            if place not in running and place in self._seats and (slot := self._free_slot()) is not None:
                self._keep(place, seat, slot)

    def _keep(self, place: int, seat: _Seat, slot: int) -> None:
        """Hand the latents of a finished sample to the decoder; its place is free."""
        try:
            if not self._stages.keep(place, slot, clean=False):
                raise DnpError(
                    f"the latents of the {seat.want.phase} pass are no longer finite numbers; bring the guidance "
                    "nearer to 0, or use a bundle of higher precision"
                )
        except Exception as error:
            self._tasks.end(seat.task, None, error)
            return
        self._stages.leave(place)
        del self._seats[place]
        self._kept.append(_Kept(seat.task, seat.number, seat.want, slot))

    def _free_slot(self) -> int | None:
        taken = {kept.slot for kept in self._kept}
        return next((slot for slot in range(self._slots) if slot not in taken), None)

    def _look(self, places: Sequence[int]) -> Pixels:
        """The images that some places are expected to give, as of the last step."""
        with self.lock:
            slot = self._free_slot()
            if slot is None:
                raise DnpError("every slot of the decoder is taken; look again after the next step")
            images = []
            for place in places:
                self._stages.keep(place, slot, clean=True)
                images.append(self._stages.decode(slot))
            return np.concatenate(images)

    # Decode and describe

    def _decode(self) -> None:
        """Decode what waits, image by image: all of it where nobody takes steps meanwhile, else a piece.

        What is finished goes before pictures on the way.
        """
        self._kept.sort(key=lambda kept: kept.preview is not None)
        for _ in range(1 + len(self._kept) // 4 if self._running() else len(self._kept)):
            if not self._kept:  # whoever wanted the rest has ended
                return
            kept = self._kept.pop(0)
            started = self._clock()
            try:
                image = self._stages.decode(kept.slot)
            except Exception as error:
                self._tasks.end(kept.task, None, error)
                continue
            spent = self._clock() - started
            kept.task.spent("decode", spent)
            self._observe("decode", spent)
            if kept.preview is not None:
                kept.task.tell(Picture(kept.want.phase, kept.preview, kept.number, image[0]))
            else:
                self._decoded(kept, image)

    def _decoded(self, kept: _Kept, image: Pixels) -> None:
        if image.min() == image.max():
            error = DnpError(
                f"the {kept.want.phase} image of seed {kept.want.seeds[kept.number]} is one flat colour, as when a "
                "decoder overflows in fp16; use a bundle of higher precision, or export it with --check-ranges"
            )
            self._tasks.end(kept.task, None, error)
            return
        self._tasks.give([(kept, image)])

    def _describe(self) -> None:
        """Caption images that want it, of the first task and others with the same settings: a token or more.

        While others take steps, it is as many as fit in the time of one.
        """
        started, running = self._clock(), self._running()
        if self._tokens is None:
            self._see()
        while self._tokens is not None:
            before = self._clock()
            try:
                length = next(self._tokens)
            except StopIteration as stop:
                self._described(stop.value, self._clock() - before)
                return
            except Exception as error:
                self._not_described(error)
                return
            spent = self._clock() - before
            self._observe("caption", spent)
            for task in self._described_now():
                task.spent("caption", spent)
                assert isinstance(task.want, Captioning)
                task.tell(Step("caption", length, task.want.settings.max_length, task.want.images.copy))
            if self._clock() - started >= self._pace or not running:
                return

    def _see(self) -> None:
        waiting = self._tasks.waiting(Captioning)
        if not waiting:
            return
        first = waiting[0].want
        assert isinstance(first, Captioning)
        most = self._stages.captioned(first.settings.beams)
        size = first.images.shape[1:]
        for task in [waiting[0]] if waiting[0].alone else [task for task in waiting if not task.alone]:
            assert isinstance(task.want, Captioning)
            if len(self._seen) == most:
                break
            if task.want.settings == first.settings and task.want.images.shape[1:] == size:
                while task.waiting and len(self._seen) < most:
                    self._tasks.begin(task)
                    self._seen.append(_Seen(task, task.waiting.pop(0), task.want))
                    self._tasks.follow(self.tasks)
        images = [seen.want.images[seen.number] for seen in self._seen]
        whole = len(images) == len(first.images) and all(seen.task is waiting[0] for seen in self._seen)
        try:
            self._tokens = self._stages.caption(first.images if whole else np.stack(images), first.settings)
        except Exception as error:
            self._not_described(error)

    def _described_now(self) -> list[Task]:
        """Those whose images are being captioned; some may have ended meanwhile."""
        return [task for task in dict.fromkeys(seen.task for seen in self._seen) if task in self.tasks]

    def _described(self, texts: list[str], spent: float) -> None:
        tasks, seen = self._described_now(), self._seen
        self._seen, self._tokens = [], None
        for task in tasks:
            task.spent("caption", spent)
        self._tasks.give(list(zip(seen, texts, strict=True)))

    def _not_described(self, error: Exception) -> None:
        """What failed for several is tried again for each alone, also where all but one have ended by now."""
        seen, self._seen, self._tokens = self._seen, [], None
        if len({one.task for one in seen}) == 1:
            self._tasks.end(seen[0].task, None, error)
            return
        for one in seen:
            one.task.waiting.append(one.number)
            one.task.alone = True
        self._tasks.release()

    def _free(self, task: Task) -> None:
        """Nothing more is done about a task."""
        for place in [place for place, seat in self._seats.items() if seat.task is task]:
            del self._seats[place]
            try:
                self._stages.leave(place)
            except Exception:
                _log.exception("place %d cannot be freed", place)
                self._room = None
        self._kept = [kept for kept in self._kept if kept.task is not task]
        if self._seen and all(seen.task is task for seen in self._seen):
            self._seen, self._tokens = [], None
