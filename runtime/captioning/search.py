"""Which token comes next: beam search over the logits of ``caption_step``, in numpy. Greedily the graph chooses itself.

Matched token for token: transformers' ``generate`` with ``do_sample=False`` and its defaults (``length_penalty=1.0``,
``early_stopping=False``), as of transformers 5. Images never influence each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]

_NEVER = np.float32(-1e9)  # transformers' score of what must not be chosen


def greedy_ids(tokens: list[int], prompt: int, end: int) -> list[int]:
    """The ids of one sequence, as far as it was chosen: cut behind the first end token after the prompt's."""
    chosen = tokens[prompt:]
    return tokens[: prompt + chosen.index(end) + 1] if end in chosen else tokens


class BeamSearch:
    """Keeps the ``beams`` likeliest beginnings of each image, and the ``beams`` best captions that have ended.

    A caption scores its mean log-probability per chosen token, the end included. An image is done when its best
    beginning, were it to end now, would score below the worst of its full set of ended captions.
    """

    def __init__(self, prompt: list[int], images: int, beams: int, end: int, min_length: int, max_length: int) -> None:
        self._beams, self._end, self._min_length, self._max_length = beams, end, min_length, max_length
        self._start = self._length = len(prompt)
        shape = (images, beams)
        self._running = np.tile(np.array(prompt, np.int64), (*shape, 1))  # [images, beams, length]
        self._scores = np.zeros(shape, np.float32)
        self._scores[:, 1:] = _NEVER  # all beams are equal so far: continue the first only
        self._ended: list[list[tuple[np.float32, list[int]]]] = [[] for _ in range(images)]  # best first
        self._improving = np.ones(images, bool)
        self.done = self._length >= max_length

    @property
    def running(self) -> Ids:
        """The beginnings that go on, int64 ``[images, beams, length]``."""
        return self._running

    def advance(self, logits: npt.NDArray[Any]) -> Ids:
        """Choose a token for each sequence, by logits float32 ``[images · beams, vocab]``.

        Returns the sequence that each one continues, int64 ``[images · beams]``, counted over the whole batch.
        """
        images, beams = self._scores.shape
        scores = _log_softmax(logits)
        vocab = scores.shape[-1]
        if self._length < self._min_length:
            scores[:, self._end] = -np.inf
        scores = scores.reshape(images, beams, vocab) + self._scores[:, :, None]

        # Of one beam at most one candidate ends, so twice the beams leave enough that go on.
        top, pick = _largest(scores.reshape(images, beams * vocab), 2 * beams)  # [images, 2 beams]
        parent, token = np.divmod(pick, vocab)
        candidates = np.concatenate(
            [np.take_along_axis(self._running, parent[:, :, None], axis=1), token[:, :, None]], axis=2
        )
        self._length += 1
        ends = (token == self._end) | (self._length >= self._max_length)
        self._collect(top, candidates, ends)

        self._scores, go_on = _largest(top + ends.astype(np.float32) * _NEVER, beams)  # [images, beams]
        self._running = np.take_along_axis(candidates, go_on[:, :, None], axis=1)
        self._improving &= self._may_improve()
        self.done = self._length >= self._max_length or not self._improving.any()
        rows = np.take_along_axis(parent, go_on, axis=1) + beams * np.arange(images)[:, None]
        return rows.reshape(-1)

    def results(self) -> list[list[int]]:
        """The ids of each image: prompt, tokens chosen, and the end token unless the length ran out."""
        return [ended[0][1] for ended in self._ended]

    def _collect(self, top: Scores, candidates: Ids, ends: npt.NDArray[np.bool_]) -> None:
        """Keep the ended ones of the first ``beams`` candidates; those further down only stand in for them."""
        mean = top / np.float32(self._length - self._start)
        for image in np.flatnonzero(self._improving):
            for place in np.flatnonzero(ends[image, : self._beams]):
                self._ended[image].append((mean[image, place], candidates[image, place].tolist()))
            self._ended[image].sort(key=lambda caption: -caption[0])  # stable: of equals the older one stays first
            del self._ended[image][self._beams :]

    def _may_improve(self) -> npt.NDArray[np.bool_]:
        best = self._scores[:, 0] / np.float32(self._length - self._start)
        worst = [ended[-1][0] if len(ended) == self._beams else _NEVER for ended in self._ended]
        improving: npt.NDArray[np.bool_] = best > np.array(worst, np.float32)
        return improving


def _log_softmax(logits: npt.NDArray[Any]) -> Scores:
    shifted = logits.astype(np.float32) - logits.max(axis=-1, keepdims=True)
    result: Scores = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _largest(scores: Scores, count: int) -> tuple[Scores, Ids]:
    """The ``count`` largest of each row, largest first, of equals the first first; and where they were."""
    order = np.sort(np.argpartition(-scores, count - 1, axis=1)[:, :count], axis=1)
    best = np.argsort(-np.take_along_axis(scores, order, axis=1), axis=1, kind="stable")
    order = np.take_along_axis(order, best, axis=1)
    return np.take_along_axis(scores, order, axis=1), order
