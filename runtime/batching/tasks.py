"""The requests that are in a scheduler: what each wants next, whose turn it is, and how it ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from dnp.engine.errors import Cancelled, DeadlineExceeded
from dnp.runtime.batching.events import Picture
from dnp.runtime.batching.stages import Room
from dnp.runtime.batching.work import Sampling, Want, Work
from dnp.runtime.result import Step

AGEING: Final = 30.0  # seconds of waiting that weigh as much as one of priority
NEVER: Final = math.inf


class Task:
    """A request in the scheduler.

    Attributes:
        work: what it does.
        tell: is given each ``Step``, and each ``Picture`` asked for.
        finish: is given what the work returned, or the exception that ended it. Called once, within ``Core.tick``.
        priority: the higher, the sooner.
        deadline: when it ends unfinished, on the scheduler's clock.
        previews: how many pictures of each image in each pass.
        stopped: asked before each step; true when the request is to be cancelled.
        alone: whether it is captioned by itself, since doing so with others failed.
        arrived: when it came, on the scheduler's clock.
        begun: when the first was done about it, if anything was.
        seconds: spent on it so far, by phase.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        work: Work[Any],
        finish: Callable[[Any, BaseException | None], object],
        tell: Callable[[Step | Picture], object],
        *,
        priority: int = 0,
        deadline: float = NEVER,
        previews: int = 0,
        stopped: Callable[[], bool] = lambda: False,
        arrived: float = 0.0,
    ) -> None:
        self.work, self.finish, self.tell = work, finish, tell
        self.priority, self.deadline, self.previews, self.stopped = priority, deadline, previews, stopped
        self.number, self.arrived = next(Task._numbers), arrived
        self.since = arrived  # when it came, or last got a place
        self.share = self.taken = 0  # where it began in the order, and images of this pass that got places
        self.begun: float | None = None
        self.alone = False
        self.seconds: dict[str, float] = {}
        self.want: Want | None = None
        self.room: Room | None = None
        self.waiting: list[int] = []  # numbers of the images, or pictures, that nothing is done about yet
        self.made: list[Any] = []  # images, or captions, by number
        self.calls = 0  # of the network, over all images of the pass

    def spent(self, phase: str, seconds: float) -> None:
        """Add to what was spent on it."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class Tasks:
    """The requests that are in.

    Attributes:
        all: of them.
    """

    def __init__(
        self,
        room_of: Callable[[Sampling], Room],
        free: Callable[[Task], object],
        clock: Callable[[], float],
        observe: Callable[[str, float], object],
    ) -> None:
        """``free`` is told of each that ends, before anybody hears of the outcome."""
        self._room_of, self._free, self._clock, self._observe = room_of, free, clock, observe
        self.all: list[Task] = []
        self._share = 0  # how many images of a pass whoever joined had before it, at the most

    def add(self, task: Task) -> None:
        """Take a task in."""
        task.share = self._share
        self.all.append(task)
        self._advance(task, None)

    def retire(self) -> None:
        """End what was cancelled, and what is late."""
        now = self._clock()
        for task in list(self.all):
            if task.stopped():
                self.end(task, None, Cancelled("the request was cancelled"))
            elif now >= task.deadline:
                where = "" if task.begun is not None else ", it was still in the queue"
                self.end(
                    task, None, DeadlineExceeded(f"the deadline of the request has passed{where}; allow more time")
                )

    def waiting(self, kind: type[Want]) -> list[Task]:
        """Those that wait for something of a kind to be begun, the first one first."""
        now = self._clock()
        waiting = [task for task in self.all if isinstance(task.want, kind) and task.waiting]
        return sorted(waiting, key=lambda task: self._order(task, now))

    def _order(self, task: Task, now: float) -> tuple[float, float, int, int]:
        """The smallest comes first: by priority, aged by waiting; deadline; share; first come.

        The first images of all come before the second ones: who comes while others are at their tenth is as they are.
        """
        aged = task.priority + math.floor((now - task.since) / AGEING)
        return -aged, task.deadline, task.share + task.taken, task.number

    def placed(self, task: Task) -> int:
        """The image that the task waits for next has got a place. Returns its number."""
        self._share = max(self._share, task.share + task.taken)
        task.since = self._clock()
        task.taken += 1
        return task.waiting.pop(0)

    def begin(self, task: Task) -> None:
        """The task waits no longer."""
        if task.begun is None:
            task.begun = self._clock()
            self._observe("queue", task.begun - task.arrived)

    def give(self, task: Task, number: int, made: Any) -> None:
        """Give a task an image, uint8 ``[1, height, width, 3]``, or a caption that it wanted; after the last one it
        says what it wants next.
        """
        task.made[number] = made
        if any(made is None for made in task.made):
            return
        if isinstance(task.want, Sampling):
            self._advance(task, made if len(task.made) == 1 else np.concatenate(task.made))
        else:
            self._advance(task, task.made)

    def _advance(self, task: Task, answer: Any) -> None:
        """Give a task what it wanted, and hear what it wants next."""
        task.want, task.room, task.waiting, task.made = None, None, [], []
        try:
            want = task.work.send(answer)
            count = len(want.seeds) if isinstance(want, Sampling) else len(want.images)
            task.room = self._room_of(want) if isinstance(want, Sampling) else None
        except StopIteration as stop:
            self.end(task, stop.value, None)
        except Exception as error:
            self.end(task, None, error)
        else:
            task.want, task.calls, task.taken = want, 0, 0
            task.waiting, task.made = list(range(count)), [None] * count

    def end(self, task: Task, result: Any, error: BaseException | None) -> None:
        """Free what a task holds, and tell it the outcome."""
        self.all.remove(task)
        self._free(task)
        task.work.close()
        task.finish(result, error)
