"""The requests that are in a scheduler: what each wants next, whose turn it is, and how it ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dnp.engine.errors import Cancelled, DeadlineExceeded
from dnp.runtime.batching.events import Picture
from dnp.runtime.batching.stages import Room
from dnp.runtime.batching.work import Captioning, Sampling, Want, Work
from dnp.runtime.result import Step

AGEING: Final = 30.0  # seconds of waiting that weigh as much as one of priority
NEAR: Final = 120.0  # seconds: a deadline that is further away hurries nobody
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


@dataclass(eq=False)
class Piece:
    """An image that a task wants, or the caption of one, about which something is done."""

    task: Task
    number: int
    want: Want

    @property
    def key(self) -> tuple[type, str] | None:
        """Pieces of equal keys are the same; None is like no other."""
        return _key(self.want, self.number)


def _whole(task: Task) -> Any:
    """What a task wanted, when it is made."""
    if isinstance(task.want, Captioning):
        return task.made
    return task.made[0] if len(task.made) == 1 else np.concatenate(task.made)


def _key(want: Want, number: int) -> tuple[type, str] | None:
    return (type(want), want.keys[number]) if want.keys else None


class Tasks:
    """The requests that are in.

    What is being made for one is not made again for another: whoever wants the same follows it, or takes it where the
    first has it and still waits for more. That goes for what is begun alone, so nobody waits for the turn of somebody
    who comes later; and for a piece, not for a task, whose other pieces may have to wait. When it comes to nothing,
    those that followed wait for their own turns as before.

    Attributes:
        all: of them.
    """

    def __init__(
        self,
        room_of: Callable[[Sampling], Room],
        under_way: Callable[[], Iterable[Piece]],
        free: Callable[[Task], object],
        clock: Callable[[], float],
        observe: Callable[[str, float], object],
    ) -> None:
        """``under_way`` gives what is being made; ``free`` is told of each task that ends, before anybody else is."""
        self._room_of, self._under_way, self._free = room_of, under_way, free
        self._clock, self._observe = clock, observe
        self.all: list[Task] = []
        self._following: list[Piece] = []
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
        """The smallest comes first: by priority, aged by waiting; deadline, where it is near; share; first come.

        The first images of all come before the second ones: who comes while others are at their tenth is as they are.
        """
        aged = task.priority + math.floor((now - task.since) / AGEING)
        deadline = task.deadline if task.deadline - now < NEAR else NEVER
        return -aged, deadline, task.share + task.taken, task.number

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

    def follow(self, tasks: Iterable[Task]) -> None:
        """Have those of the tasks that wait for what is under way follow it."""
        keys = {piece.key for piece in self._under_way()}
        for task in tasks:
            want = task.want
            if want is None or not want.keys:
                continue
            same = [number for number in task.waiting if _key(want, number) in keys]
            self._following += [Piece(task, number, want) for number in same]
            task.waiting = [number for number in task.waiting if number not in same]

    def release(self) -> None:
        """Have those that follow what is no more under way wait for their own turns."""
        keys = {piece.key for piece in self._under_way()}
        for piece in [piece for piece in self._following if piece.key not in keys]:
            self._following.remove(piece)
            piece.task.waiting = sorted([*piece.task.waiting, piece.number])

    def give(self, made: Sequence[tuple[Piece, Any]]) -> None:
        """Give pieces, an image uint8 ``[1, height, width, 3]`` or a caption each, to their tasks and to those that
        follow; whoever has all of them by now says what it wants next.
        """
        by_key = {piece.key: what for piece, what in made}
        following = [piece for piece in self._following if piece.key in by_key]
        self._following = [piece for piece in self._following if piece not in following]
        given = [*made, *((piece, copy(by_key[piece.key])) for piece in following)]
        for piece, what in given:
            if piece.want is piece.task.want:
                piece.task.made[piece.number] = what
        for task in dict.fromkeys(piece.task for piece, _ in given):
            if task in self.all and all(what is not None for what in task.made):
                self._advance(task, _whole(task))

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
            self.follow([task])
            if want.keys:
                self._take(task, want)

    def _take(self, task: Task, want: Want) -> None:
        """Give a task what others have of what it wants."""
        had: dict[tuple[type, str] | None, Any] = {}
        for other in self.all:
            theirs = other.want
            if theirs is None or not theirs.keys:
                continue
            if isinstance(theirs, Captioning):
                had |= {(Sampling, key): image[None] for key, image in zip(theirs.keys, theirs.images, strict=True)}
            had |= {_key(theirs, number): made for number, made in enumerate(other.made) if made is not None}
        found = [number for number in task.waiting if _key(want, number) in had]
        task.waiting = [number for number in task.waiting if number not in found]
        if found:
            self.give([(Piece(task, number, want), copy(had[_key(want, number)])) for number in found])

    def end(self, task: Task, result: Any, error: BaseException | None) -> None:
        """Free what a task holds, and tell it the outcome."""
        self.all.remove(task)
        self._free(task)
        self.release()
        task.work.close()
        task.finish(result, error)
