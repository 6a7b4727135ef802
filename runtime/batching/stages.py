"""What a scheduler does with the graphs of a bundle: places to sample in, slots to decode from, captions."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dnp.runtime.batching.work import Sampling
from dnp.runtime.captioning.captioner import CaptionSettings
from dnp.runtime.pipeline.graphs import Graphs
from dnp.runtime.sampling.denoise import Sample, finite

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Room:
    """What one opening of the places is for. Samples of one room can share a step.

    Attributes:
        places: how many samples at once.
        steps, noise_steps: the most rows of a sampler table, and the most draws of noise.
        height, width: of the images, in pixels.
        windows: of the prompts.
    """

    places: int
    steps: int
    noise_steps: int
    height: int
    width: int
    windows: int


class Stages:
    """The graphs of a bundle as a scheduler uses them. Not for several threads at once.

    Places are those of the denoiser. Slots are those of the decoder: latents wait in them, so that a place is free as
    soon as its sample is finished.
    """

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._scale = graphs.bundle.latents.vae_scale_factor
        self._room = Room(0, 0, 0, 0, 0, 0)
        self._decode_sizes: dict[str, int] = {}
        self._shown: Pixels | None = None  # what lies in the decoder's output

    def open(self, room: Room) -> int:
        """Make room; every place and slot is free. Returns how many slots there are."""
        graphs = self._graphs
        self._room = Room(0, 0, 0, 0, 0, 0)
        height, width = room.height // self._scale, room.width // self._scale
        graphs.denoiser.open(
            room.places,
            steps=room.steps,
            noise_steps=room.noise_steps,
            height=height,
            width=width,
            tokens=room.windows * graphs.bundle.text.length,
        )
        slots = graphs.decode.limits.fit("places", room.places)
        self._decode_sizes = {"places": slots, "height": height, "width": width}
        graphs.decode.reshape(batch=1, **self._decode_sizes)
        self._room = room
        return slots

    def join(self, samples: Mapping[int, tuple[Sampling, int]]) -> None:
        """Put samples into free places, each the image with that number of what is wanted.

        Raises what ``Denoiser.join`` and the text encoder raise; then none has joined.
        """
        denoiser, room = self._graphs.denoiser, self._room
        texts = {place: wanted.texts(number) for place, (wanted, number) in samples.items()}
        self._graphs.conditioner.write(denoiser.bank, texts, size=(room.height, room.width), windows=room.windows)
        joined: list[int] = []
        try:
            for place, (wanted, number) in samples.items():
                denoiser.join(place, Sample(wanted.table, wanted.seeds[number]))
                joined.append(place)
        except BaseException:
            for place in joined:
                denoiser.leave(place)
            raise

    def leave(self, place: int) -> None:
        """Free a place, whether its sample is finished or not."""
        self._graphs.denoiser.leave(place)

    def left(self, place: int) -> int:
        """Calls of the network that the sample in a place still needs."""
        return self._graphs.denoiser.left(place)

    def step(self) -> None:
        """One step of every sample that is not finished."""
        self._graphs.denoiser.step()

    def keep(self, place: int, slot: int, *, clean: bool) -> bool:
        """Copy the latents of a place to a slot: as they are, or ``clean``, as they are expected to be at the end.

        Returns whether they are numbers; a clean copy, which nothing depends on, is not looked at.
        """
        graphs = self._graphs
        graphs.require_open()
        source = (graphs.denoiser.clean_latents if clean else graphs.denoiser.latents).at(place)
        graphs.decode.inputs["latents"].at(slot).copy(source)
        return clean or finite(source.read())

    def decode(self, slots: Sequence[int]) -> Pixels:
        """What waits in these slots, as images uint8 ``[slots, height, width, 3]``."""
        session = self._graphs.decode
        session.reshape(batch=len(slots), **self._decode_sizes)
        session.inputs["decoded"].write(np.array(slots, np.int64))
        session.run()
        self._shown = session.outputs["image"].read().astype(np.uint8, copy=False)
        return self._shown

    def captioned(self, beams: int) -> int:
        """The most images captioned at once with so many beams each."""
        return self._graphs.captioned(beams)

    def caption(self, images: Pixels, settings: CaptionSettings) -> Generator[int, None, list[str]]:
        """Captions, token by token; see ``Captioner.steps``."""
        # What was decoded last is still where it was decoded.
        there = self._graphs.decode.outputs["image"] if images is self._shown else None
        return self._graphs.captioner.steps(images, settings, there)
