"""The denoising loop: samples in the places of one ``denoise`` session, which all take one step at a time.

Each sample has a table of its own, so samples with other samplers, steps and guidance, and in other passes, take their
step in the same call of the network. A sample joins at a free place and leaves between any two steps; what the others
compute does not depend on it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dnp.engine.backends.session import Buffer, Session
from dnp.engine.errors import DnpError, SettingsError
from dnp.runtime.sampling.noise import TorchNoise
from dnp.runtime.sampling.samplers import SamplerTable, identity_row


@dataclass(frozen=True)
class Sample:
    """One sample: its sampler table, and the seed that its noise comes from."""

    table: SamplerTable
    seed: int


class Denoiser:
    """The places of a ``denoise`` session. Not for several threads at once.

    Attributes:
        session: what computes.
        bank: what the network is conditioned on, by name: buffers ``[P, roles, ...]``. Another mapping, of the same
            buffers, as soon as they have other shapes, and so no more what was written into them.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        inputs = session.graph.inputs
        _, self._roles = inputs["place_rows"].resolve({"places": 1})
        self.bank: Mapping[str, Buffer] = {
            name: session.inputs[name] for name in list(inputs)[list(inputs).index("place_rows") + 1 :]
        }
        session.feed_back("state", "next_state")
        session.feed_back("index", "next_index")
        self._dims: dict[str, int] = {}
        self._samples: list[Sample | None] = []
        self._done: list[int] = []  # calls of each sample so far
        self._rows: tuple[tuple[int, int], ...] = ()  # (place, role) of each row, as the session has them

    def open(self, places: int, *, steps: int, noise_steps: int, **sizes: int) -> None:
        """Make room for so many samples, of tables of at most ``steps`` rows that draw at most ``noise_steps`` times.

        ``sizes`` are ``height`` and ``width`` of the latents, and ``tokens`` of the prompts. Every place is free.
        Raises what ``Session.reshape`` raises.
        """
        wanted = {"places": places, "rows": 1, "steps": steps, "noise_steps": max(1, noise_steps), **sizes}
        fit = self.session.limits.fit
        self._dims = {name: fit(name, size) for name, size in wanted.items()}
        shapes = [buffer.shape for buffer in self.bank.values()]
        self.session.reshape(**self._dims)
        if shapes != [buffer.shape for buffer in self.bank.values()]:
            self.bank = dict(self.bank)
        places = self._dims["places"]
        inputs = self.session.inputs
        idle = np.tile(identity_row(), (places, self._dims["steps"], 1))
        inputs["table"].write(idle)
        for name in ("state", "index", "noise"):
            inputs[name].write(np.zeros(inputs[name].shape, inputs[name].dtype))
        self._samples, self._done, self._rows = [None] * places, [0] * places, ()

    def join(self, place: int, sample: Sample) -> None:
        """Put a sample into a free place: its state, table and noise. Its entries in the bank are the caller's.

        Noise is drawn in torch's order, ``randn(1, C, h, w)`` for the start and one more for each call that draws, as
        a diffusers pipeline with one generator per image does.

        Raises SettingsError for a table that is longer, or draws more often, than there is room; DnpError for a place
        that is taken.
        """
        inputs, table, generator = self.session.inputs, sample.table, TorchNoise(sample.seed)
        if self._samples[place] is not None:
            raise DnpError(f"place {place} has a sample that has not left; choose a free one")
        for name, size in (("steps", len(table.rows)), ("noise_steps", len(table.noise_steps))):
            if size > self._dims[name]:
                raise SettingsError(
                    f"the sampler needs {name} {size}, there is room for {self._dims[name]}; ask for fewer steps"
                )
        state = np.zeros(inputs["state"].shape[1:], np.float32)  # [N, C, h, w]
        noise = np.zeros(inputs["noise"].shape[1:], np.float32)  # [draws, C, h, w]
        state[0] = generator.randn((1, *state.shape[1:]))[0] * np.float32(table.init_noise_sigma)
        for draw in range(len(table.noise_steps)):
            noise[draw] = generator.randn((1, *state.shape[1:]))[0]
        rows = np.tile(identity_row(), (self._dims["steps"], 1))
        rows[: len(table.rows)] = table.rows
        for name, array in (("state", state), ("noise", noise), ("table", rows), ("index", np.zeros((), np.int64))):
            inputs[name].at(place).write(array)
        self._samples[place], self._done[place] = sample, 0

    def leave(self, place: int) -> None:
        """Free a place, whether its sample is finished or not; its latents stay until another sample joins there."""
        finished = not self.left(place)  # and stands still by itself
        self._samples[place] = None
        if not finished:
            self.session.inputs["table"].at(place).write(np.tile(identity_row(), (self._dims["steps"], 1)))

    def left(self, place: int) -> int:
        """Calls of the network that the sample in a place still needs."""
        sample = self._samples[place]
        return 0 if sample is None else sample.table.calls - self._done[place]

    def step(self, among: Collection[int] | None = None) -> bool:
        """Take one step with every sample that is not finished, or with those in the places ``among``; the others
        stand still. False when there is none. A step that fails leaves every sample as it was.

        Nothing crosses to the host, and nothing is waited for. Rows of the network are computed for what is needed
        alone: two for guidance, one where a branch has no weight.
        """
        unfinished = [place for place in range(len(self._samples)) if self.left(place)]
        running = [place for place in unfinished if among is None or place in among]
        if not running:
            return False
        held = [place for place in unfinished if place not in running]
        try:
            for place in held:
                self._go_to(place, self._dims["steps"] - 1)  # the last row of every table stands still
            self._set_rows(tuple((place, role) for place in running for role in self._needed(place)))
            self.session.run()
        finally:
            for place in held:
                self._go_to(place, self._done[place])
        for place in running:
            self._done[place] += 1
        return True

    @property
    def latents(self) -> Buffer:
        """The latents of every place as far as they got, ``[P, C, h, w]``."""
        return self.session.outputs["latents"]

    @property
    def clean_latents(self) -> Buffer:
        """The latents that are expected at the end, as seen from the step before: ``[P, C, h, w]``."""
        return self.session.outputs["clean_latents"]

    def capture(self, rows: int) -> None:
        """Capture a step of ``rows`` rows at the present sizes, so that later ones need one launch of the host."""
        self._set_rows(tuple((row % len(self._samples), 0) for row in range(rows)))
        self.session.capture(**self._dims)
        self._rows = ()

    def rehearse(self, rows: int) -> None:
        """Take a step of ``rows`` rows, whatever is in the places; what they hold is unspecified afterwards."""
        self._set_rows(tuple((row % len(self._samples), 0) for row in range(rows)))
        self.session.run()
        self._rows = ()

    def _go_to(self, place: int, row: int) -> None:
        self.session.inputs["index"].at(place).write(np.array(row, np.int64))

    def _needed(self, place: int) -> tuple[int, ...]:
        sample = self._samples[place]
        assert sample is not None
        return sample.table.roles[self._done[place]]

    def _set_rows(self, rows: tuple[tuple[int, int], ...]) -> None:
        """Tell the session whose rows it computes; what fills a captured size up repeats the first, and is unread."""
        if rows == self._rows:
            return
        self._rows = ()  # until all of it is told
        count = self.session.limits.fit("rows", len(rows))
        padded = np.array([*rows, *[rows[0]] * (count - len(rows))], np.int64)  # [R, 2]
        place_rows = np.zeros((len(self._samples), self._roles), np.int64)
        for number, (place, _) in enumerate(rows):
            place_rows[place] = number  # a role without a row has no weight, and reads a row of its own place
        for number, (place, role) in enumerate(rows):
            place_rows[place, role] = number
        self._dims["rows"] = count
        self.session.reshape(**self._dims)
        inputs = self.session.inputs
        inputs["row_place"].write(padded[:, 0].copy())
        inputs["row_role"].write(padded[:, 1].copy())
        inputs["place_rows"].write(place_rows)
        self._rows = rows


def finite(latents: npt.NDArray[np.float32]) -> bool:
    """Whether latents are numbers: what overflowed cannot be decoded to a picture."""
    return bool(np.isfinite(latents).all())
