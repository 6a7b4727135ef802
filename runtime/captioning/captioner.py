"""Images into words: BLIP's image encoder once, then its decoder token by token over caches of a fixed size."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dnp.engine.backends.session import Buffer, Session
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.bundle.schema import shown
from dnp.engine.errors import DnpError, SettingsError
from dnp.runtime.captioning.resize import resize_matrices
from dnp.runtime.captioning.search import BeamSearch, GreedySearch, Search
from dnp.runtime.tokenizer import CaptionTokenizer

Images = npt.NDArray[np.uint8]

MAX_BEAMS = 16


class Captioner:
    """Captions images with the sessions ``encode`` (``encode_image``) and ``step`` (``caption_step``) of one bundle.

    The caches never leave the device: the cross-attention keys are read where ``encode`` wrote them, and a step's
    caches are carried to the next step, whose ``parent`` input puts them in the order of the surviving beams.
    """

    def __init__(self, bundle: Bundle, encode: Session, step: Session) -> None:
        self._spec = bundle.caption
        self._encode, self._step = encode, step
        self.tokenizer = CaptionTokenizer(bundle)
        for name in ("cross_keys", "cross_values"):
            step.alias(name, encode.outputs[name])
        step.feed_back("keys", "next_keys")
        step.feed_back("values", "next_values")

    def prepare(self, batches: Sequence[int], sizes: Sequence[tuple[int, int]]) -> None:
        """Warm up for so many images at once, the most first, of each of ``sizes``, as (height, width) in pixels or the
        nearest that there are, captioned greedily.
        """
        nearest = self._encode.nearest
        shapes = [(nearest("image_height", height), nearest("image_width", width)) for height, width in sizes]
        for height, width in shapes:  # what grows has grown before anything is recorded, for it moves
            for batch in batches[:1]:
                self._encode.reshape(batch=batch, image_height=height, image_width=width)
        for batch in batches:
            for height, width in shapes:
                self._see(np.zeros((batch, height, width, 3), np.uint8))
                self._encode.prepare()
            self._step.reshape(batch=batch, images=batch)
            self._step.inputs["token"].write(np.full(batch, self._spec.bos, np.int64))
            self._step.inputs["parent"].write(np.arange(batch, dtype=np.int64))
            self._step.inputs["position"].write(np.zeros(batch, np.int64))
            self._step.prepare()

    def validate(self, height: int, width: int) -> None:
        """Raises SettingsError when images of this size cannot be captioned here."""
        self._encode.validate(image_height=height, image_width=width)

    def takes(self, batch: int) -> bool:
        """Whether so many images can be captioned greedily at once."""
        sizes = ((self._encode, "batch"), (self._step, "batch"), (self._step, "images"))
        return all(session.least.get(s, 1) <= batch <= session.most.get(s, batch) for session, s in sizes)

    def validate_images(self, count: int, most: int, beams: int) -> None:
        """Raises SettingsError when some part of ``count`` images, ``most`` at a time, cannot be captioned here."""
        for batch in part_sizes(count, most):
            self._encode.validate(batch=batch)
            self._step.validate(batch=batch * beams, images=batch)

    def most(self, beams: int) -> int:
        """The most images to caption at once with so many beams each."""
        rows, images = (session.most.get("batch", 1 << 30) for session in (self._step, self._encode))
        return max(1, min(rows // beams, images))

    def captions(
        self,
        images: Images,
        *,
        beams: int = 1,
        prefix: str = "",
        min_length: int = 0,
        max_length: int | None = None,
    ) -> list[str]:
        """One caption for each of ``images``, uint8 ``[B, H, W, 3]`` of any size.

        Equal to transformers' ``BlipForConditionalGeneration.generate(num_beams=beams)`` on the processor's output.
        Lengths count tokens as transformers does, the begin token and the prefix included; the caption ends at
        ``max_length`` at the latest, which is the bundle's own when it is ``None``. See ``check`` for what is refused.
        """
        return _last(self.steps(images, beams=beams, prefix=prefix, min_length=min_length, max_length=max_length))

    def steps(
        self,
        images: Images,
        *,
        there: Buffer | None = None,
        beams: int = 1,
        prefix: str = "",
        min_length: int = 0,
        max_length: int | None = None,
    ) -> Generator[int, None, list[str]]:
        """``captions`` token by token: yields the length so far after each token, returns the captions.

        ``there`` is a buffer that holds ``images`` already, where they need not come from the host.
        """
        tokens = self.tokens(
            images, there=there, beams=beams, prefix=prefix, min_length=min_length, max_length=max_length
        )

        def decoded() -> Generator[int, None, list[str]]:
            return [self.tokenizer.decode(ids) for ids in (yield from tokens)]

        return decoded()

    def tokens(
        self,
        images: Images,
        *,
        there: Buffer | None = None,
        beams: int = 1,
        prefix: str = "",
        min_length: int = 0,
        max_length: int | None = None,
    ) -> Generator[int, None, list[list[int]]]:
        """``steps``, returning the ids as ``generate`` does: begin token, prefix, caption, end token unless cut off.

        Bad arguments are refused at once, before the first step is asked for.
        """
        _check_images(images)
        prompt = self.check(beams=beams, prefix=prefix, min_length=min_length, max_length=max_length)
        most = self._spec.max_length if max_length is None else max_length
        limits = (self._spec.eos, min_length, most)
        search: Search = (
            GreedySearch(prompt, len(images), *limits)
            if beams == 1
            else BeamSearch(prompt, len(images), beams, *limits)
        )
        return self._search(images, there, prompt, beams, search)

    def check(
        self, *, beams: int = 1, prefix: str = "", min_length: int = 0, max_length: int | None = None
    ) -> list[int]:
        """The ids that every caption begins with: the begin token and the prefix.

        Raises SettingsError for ``beams`` outside 1..16, for a ``max_length`` beyond the caches, and for lengths that
        leave no room: prefix < max_length and min_length <= max_length.
        """
        spec = self._spec
        most = spec.max_length if max_length is None else max_length
        for name, value, low, high in (
            ("beams", beams, 1, min(MAX_BEAMS, self._step.most.get("batch", MAX_BEAMS), max(1, (spec.vocab - 1) // 2))),
            ("max_length", most, 2, spec.length),
            ("min_length", min_length, 0, most),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise SettingsError(f"{name} must be a whole number from {low} to {high}, not {shown(value)}")
        prompt = [spec.bos, *self.tokenizer.encode(prefix)]
        if len(prompt) >= most:
            raise SettingsError(
                f"the caption prefix has {len(prompt) - 1} tokens, which leaves no room for a caption of at most "
                f"{most} tokens, the begin token included: shorten it, or raise max_length (up to {spec.length})"
            )
        return prompt

    def _search(
        self, images: Images, there: Buffer | None, prompt: list[int], beams: int, search: Search
    ) -> Generator[int, None, list[list[int]]]:
        self._see(images, there)
        step, rows = self._step, len(images) * beams
        step.reshape(batch=rows, images=len(images))
        token, parent = np.full(rows, prompt[0], np.int64), np.arange(rows, dtype=np.int64)
        length = 1  # tokens that the decoder has seen after this step, so one more than the token's position
        while not search.done:
            step.inputs["token"].write(token)
            step.inputs["parent"].write(parent)
            step.inputs["position"].write(np.full(rows, length - 1, np.int64))
            step.run()
            if length == 1 and not np.isfinite(step.outputs["logits"].read()).all():
                raise DnpError(
                    "what the captioner computes of the image are no longer finite numbers; use a bundle of higher "
                    "precision, or export it with --check-ranges"
                )
            if length < len(prompt):
                token = np.full(rows, prompt[length], np.int64)
            else:
                token, parent = search.advance(step.outputs["logits"].read, step.outputs["next_token"].read)
            length += 1
            yield length
        return search.results()

    def _see(self, images: Images, there: Buffer | None = None) -> None:
        """Run the image encoder; its results stay where they are."""
        batch, height, width, _ = images.shape
        columns, rows = resize_matrices(height, width, self._spec.image_size)
        self._encode.reshape(batch=batch, image_height=height, image_width=width)
        if there is not None and there.shape == images.shape:
            self._encode.inputs["image"].copy(there)
        else:
            self._encode.inputs["image"].write(images)
        self._encode.inputs["resize_columns"].write(columns)
        self._encode.inputs["resize_rows"].write(rows)
        self._encode.run()


def part_sizes(count: int, most: int) -> set[int]:
    """How many things come at once where ``count`` of them are taken ``most`` at a time."""
    return {min(count, most), count % most or most}


def _check_images(images: Any) -> None:
    found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise SettingsError(f"images must be a uint8 array [B, H, W, 3], not {found}")
    if not images.size:
        raise SettingsError(f"there is nothing to caption in images of {list(images.shape)}")


def _last(steps: Generator[Any, None, list[str]]) -> list[str]:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: list[str] = stop.value
            return result
