"""Images into words: BLIP's image encoder once, then its decoder token by token over caches of a fixed size."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from dnp.engine.backends.session import Buffer, Session
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.bundle.schema import shown
from dnp.engine.errors import DnpError, SettingsError
from dnp.runtime.captioning.resize import resize_matrices
from dnp.runtime.captioning.search import BeamSearch, greedy_ids
from dnp.runtime.tokenizer import CaptionTokenizer

Images = npt.NDArray[np.uint8]
T = TypeVar("T")

MAX_BEAMS: Final = 16
_LOOK: Final = 4  # tokens between two looks of the host, where each look waits for a device


@dataclass(frozen=True)
class CaptionSettings:
    """How a caption is searched for. Lengths count tokens as transformers does, begin token and prefix included.

    Attributes:
        beams: 1 is greedy search.
        prefix: what each caption begins with.
        max_length: where it ends at the latest.
    """

    beams: int
    prefix: str
    min_length: int
    max_length: int


class Captioner:
    """Captions images with the sessions ``encode`` (``encode_image``) and ``step`` (``caption_step``) of one bundle.

    Caches, tokens and position never leave the device: the cross-attention keys are read where ``encode`` wrote them,
    and what a step gives is fed back to the next one.
    """

    def __init__(self, bundle: Bundle, encode: Session, step: Session) -> None:
        self._spec = bundle.caption
        self._encode, self._step = encode, step
        self.tokenizer = CaptionTokenizer(bundle)
        for name in ("cross_keys", "cross_values"):
            step.alias(name, encode.outputs[name])
        for name in ("tokens", "position", "keys", "values"):
            step.feed_back(name, f"next_{name}")

    def settings(
        self, *, beams: int = 1, prefix: str = "", min_length: int = 0, max_length: int | None = None
    ) -> CaptionSettings:
        """The settings with nothing left open: ``max_length`` is the bundle's own when it is ``None``.

        Raises SettingsError for ``beams`` outside 1..16, for a ``max_length`` beyond the caches, and for lengths that
        leave no room: prefix < max_length and min_length <= max_length.
        """
        spec = self._spec
        most = spec.max_length if max_length is None else max_length
        for name, value, low, high in (
            ("beams", beams, 1, self.widest),
            ("max_length", most, 2, spec.length),
            ("min_length", min_length, 0, most),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise SettingsError(f"{name} must be a whole number from {low} to {high}, not {shown(value)}")
        given = len(self.tokenizer.encode(prefix))
        if given + 1 >= most:
            raise SettingsError(
                f"the caption prefix has {given} tokens, which leaves no room for a caption of at most "
                f"{most} tokens, the begin token included: shorten it, or raise max_length (up to {spec.length})"
            )
        return CaptionSettings(beams, prefix, min_length, most)

    @property
    def widest(self) -> int:
        """The most beams that there can be."""
        return min(self._sequences, max(1, (self._spec.vocab - 1) // 2))

    @property
    def _sequences(self) -> int:
        """The most at once: what one image may have of beams, so that several with beams need no more room."""
        return min(MAX_BEAMS, self._step.limits.nearest("sequences", MAX_BEAMS))

    def reserve(self) -> None:
        """Make room for the most sequences, so that nothing has to grow later."""
        self._step.reshape(sequences=self._sequences, images=self._step.limits.nearest("images", 1))

    def capture(self, batches: Sequence[int], sizes: Sequence[tuple[int, int]], most: int) -> None:
        """Capture greedy captions of so many images at once, of each of ``sizes``, with room for ``most`` images.

        Sizes are (height, width) in pixels; the nearest that there are is taken.
        """
        nearest = self._encode.limits.nearest
        shapes = [(nearest("image_height", height), nearest("image_width", width)) for height, width in sizes]
        for height, width in shapes:  # what grows has grown before anything is captured, for it moves
            self._encode.reshape(batch=most, image_height=height, image_width=width)
        self._step.reshape(sequences=most, images=most)
        for batch in batches:
            for height, width in shapes:
                self._see(np.zeros((batch, height, width, 3), np.uint8))
                self._encode.capture(batch=batch, image_height=height, image_width=width)
            self._begin([self._spec.bos], batch, 1, 0)
            self._step.capture(sequences=batch, images=batch)

    def validate(self, height: int, width: int) -> None:
        """Raises SettingsError when images of this size cannot be captioned here."""
        self._encode.limits.check(image_height=height, image_width=width)

    def takes(self, batch: int) -> bool:
        """Whether so many images can be captioned greedily at once."""
        sizes = ((self._encode, "batch"), (self._step, "sequences"), (self._step, "images"))
        return all(session.limits.nearest(symbol, batch) == batch for session, symbol in sizes)

    def validate_images(self, count: int, most: int, beams: int) -> None:
        """Raises SettingsError when some part of ``count`` images, ``most`` at a time, cannot be captioned here."""
        for batch in part_sizes(count, most):
            self._encode.limits.check(batch=batch)
            self._step.limits.check(sequences=batch * beams, images=batch)

    def most(self, beams: int) -> int:
        """The most images to caption at once with so many beams each."""
        return max(1, min(self._sequences // beams, self._encode.limits.nearest("batch", 1 << 30)))

    def captions(self, images: Images, settings: CaptionSettings) -> list[str]:
        """One caption for each of ``images``, uint8 ``[B, H, W, 3]`` of any size.

        Equal to transformers' ``BlipForConditionalGeneration.generate(num_beams=beams)`` on the processor's output.
        """
        return _last(self.steps(images, settings))

    def steps(
        self, images: Images, settings: CaptionSettings, there: Buffer | None = None
    ) -> Generator[int, None, list[str]]:
        """``captions`` token by token: yields the length so far after each, returns the captions.

        ``there`` is a buffer that holds ``images`` already, where they need not come from the host.
        Raises SettingsError at once for what are no images.
        """
        tokens = self.tokens(images, settings, there)

        def decoded() -> Generator[int, None, list[str]]:
            return [self.tokenizer.decode(ids) for ids in (yield from tokens)]

        return decoded()

    def tokens(
        self, images: Images, settings: CaptionSettings, there: Buffer | None = None
    ) -> Generator[int, None, list[list[int]]]:
        """``steps``, returning the ids as ``generate`` does: begin token, prefix, caption, end token unless cut off."""
        _check_images(images)
        return self._tokens(images, settings, there)

    def _tokens(
        self, images: Images, settings: CaptionSettings, there: Buffer | None
    ) -> Generator[int, None, list[list[int]]]:
        self._see(images, there)
        prompt = [self._spec.bos, *self.tokenizer.encode(settings.prefix)]
        self._begin(prompt, len(images), settings.beams, settings.min_length)
        search = self._greedily if settings.beams == 1 else self._with_beams
        return (yield from search(prompt, len(images), settings))

    def _greedily(
        self, prompt: list[int], images: int, settings: CaptionSettings
    ) -> Generator[int, None, list[list[int]]]:
        """The graph itself chooses; the host looks now and then whether all have ended."""
        every = _LOOK if self._step.asynchronous else 1
        for length in range(2, settings.max_length + 1):
            self._run(first=length == 2)
            chosen, last = length - len(prompt), length == settings.max_length
            if last or (chosen > 0 and chosen % every == 0):
                found = self._step.outputs["next_tokens"].read()[:, :length].tolist()
                ids = [greedy_ids(row, len(prompt), self._spec.eos) for row in found]
                last = last or all(row[-1] == self._spec.eos for row in ids)
            yield length
            if last:
                break
        return ids

    def _with_beams(
        self, prompt: list[int], images: int, settings: CaptionSettings
    ) -> Generator[int, None, list[list[int]]]:
        """The host chooses, token by token."""
        search = BeamSearch(prompt, images, settings.beams, self._spec.eos, settings.min_length, settings.max_length)
        length = 1  # tokens that the decoder has seen after this step, so one more than the token's position
        while not search.done:
            self._run(first=length == 1)
            if length >= len(prompt):
                parent = search.advance(self._step.outputs["logits"].read())
                self._step.inputs["tokens"].write(self._padded(search.running))
                self._step.inputs["parent"].write(parent)
            length += 1
            yield length
        return search.results()

    def _begin(self, prompt: list[int], images: int, beams: int, min_length: int) -> None:
        """Shape the decoder, and put it before the first token."""
        sequences, inputs = images * beams, self._step.inputs
        self._step.reshape(sequences=sequences, images=images)
        inputs["tokens"].write(self._padded(np.tile(np.array(prompt, np.int64), (sequences, 1))))
        for name, number in (("position", 0), ("prompt_length", len(prompt)), ("min_length", min_length)):
            inputs[name].write(np.full(sequences, number, np.int64))
        inputs["parent"].write(np.arange(sequences, dtype=np.int64))

    def _padded(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Ids ``[..., length]`` as the graph's ``tokens`` ``[sequences, M]``."""
        rows = ids.reshape(-1, ids.shape[-1])
        tokens = np.full((len(rows), self._spec.length), self._spec.pad, np.int64)
        tokens[:, : rows.shape[1]] = rows
        return tokens

    def _run(self, *, first: bool) -> None:
        self._step.run()
        if first and not np.isfinite(self._step.outputs["logits"].read()).all():
            raise DnpError(
                "what the captioner computes of the image are no longer finite numbers; use a bundle of higher "
                "precision, or export it with --check-ranges"
            )

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


def _last(steps: Generator[Any, None, T]) -> T:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result
