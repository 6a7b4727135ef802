"""What a scheduler does with the graphs of a bundle: places to sample in, slots to decode from, captions."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator
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

    def __init__(self, graphs: Graphs, *, waits: bool = False) -> None:
        """``waits``: a step is over when it is computed, also where a device does it, so that nobody runs ahead."""
        self._graphs, self._waits = graphs, waits
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
        graphs.decode.reshape(batch=graphs.decode.limits.nearest("batch", 1), **self._decode_sizes)
        self._room = room
        return slots

    def join(self, place: int, wanted: Sampling, number: int) -> None:
        """Put a sample into a free place: the image with that number of what is wanted.

        Raises what ``Denoiser.join`` and the text encoder raise; the place is then free.
        """
        denoiser, room = self._graphs.denoiser, self._room
        texts = {place: wanted.texts(number)}
        self._graphs.conditioner.write(denoiser.bank, texts, size=(room.height, room.width), windows=room.windows)
        denoiser.join(place, Sample(wanted.table, wanted.seeds[number]))

    def leave(self, place: int) -> None:
        """Free a place, whether its sample is finished or not."""
        self._graphs.denoiser.leave(place)

    def left(self, place: int) -> int:
        """Calls of the network that the sample in a place still needs."""
        return self._graphs.denoiser.left(place)

    def step(self, places: Collection[int] | None = None) -> None:
        """One step of every sample that is not finished, or of those in ``places``; one that fails changes none."""
        self._graphs.denoiser.step(places)
        self._wait()

    def rehearse(self, rows: int) -> float:
        """The seconds of a step of so many rows of the network, which are then no more the first of their size.

        It goes over whatever is in the places: open them anew afterwards.
        """
        started = time.perf_counter()
        self._graphs.denoiser.rehearse(rows)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        """Wait for a device, where nobody is to run ahead of it."""
        session = self._graphs.denoiser.session
        if self._waits and session.asynchronous:
            session.inputs["index"].read()

    def keep(self, place: int, slot: int, *, clean: bool) -> bool:
        """Copy the latents of a place to a slot: as they are, or ``clean``, as they are expected to be at the end.

        Returns whether they are numbers; a clean copy, which nothing depends on, is not looked at.
        """
        graphs = self._graphs
        graphs.require_open()
        source = (graphs.denoiser.clean_latents if clean else graphs.denoiser.latents).at(place)
        graphs.decode.inputs["latents"].at(slot).copy(source)
        return clean or finite(source.read())

    def decode(self, slot: int) -> Pixels:
        """What waits in a slot, as an image uint8 ``[1, height, width, 3]``.

        One at a time: on no processor do several take less for each, and an image's bits depend on no other.
        """
        session = self._graphs.decode
        count = session.limits.nearest("batch", 1)  # a plan may be for no fewer
        session.reshape(batch=count, **self._decode_sizes)
        session.inputs["decoded"].write(np.full(count, slot, np.int64))
        session.run()
        image = session.outputs["image"].read()[:1].astype(np.uint8, copy=False)
        self._shown = image if count == 1 else None
        return image

    def captioned(self, beams: int) -> int:
        """The most images captioned at once with so many beams each."""
        return self._graphs.captioned(beams)

    def caption(self, images: Pixels, settings: CaptionSettings) -> Generator[int, None, list[str]]:
        """Captions, token by token; see ``Captioner.steps``."""
        # What was decoded last is still where it was decoded.
        there = self._graphs.decode.outputs["image"] if images is self._shown else None
        return self._graphs.captioner.steps(images, settings, there)
