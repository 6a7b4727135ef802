"""The denoising loop: one graph, replayed once a row of the samplers' tables, whatever the samplers are."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dnp.engine.backends.session import Session
from dnp.engine.bundle.columns import SLOTS
from dnp.runtime.sampling.noise import TorchNoise
from dnp.runtime.sampling.samplers import SamplerTable, stack_tables


@dataclass(frozen=True)
class Sample:
    """One sample of a batch: its sampler table and the seed its noise comes from.

    Samples of one batch may differ in everything here: sampler, steps, the size and the sign of the guidance.
    """

    table: SamplerTable
    seed: int


def load_samples(session: Session, samples: Sequence[Sample], latents_shape: tuple[int, int, int]) -> int:
    """Shape the ``denoise`` session for ``samples``, write their state, tables and noise, and make it a loop: each run
    leaves the state and the row index where the next one reads them.

    The text contexts are the caller's to fill in, which leaves them on the device. Noise is drawn per sample in
    torch's order, ``randn(1, C, h, w)`` for the start and one more for each row that draws, as a diffusers pipeline
    with one generator per image does.

    Returns the number of rows, which is how often the graph has to run.
    """
    tables = stack_tables([sample.table for sample in samples])  # [B, rows, 30]
    batch, rows = len(tables), max(len(sample.table.rows) for sample in samples)
    draws = session.bucket("draws", rows if any(sample.table.stochastic for sample in samples) else 1)
    tables = np.pad(tables, [(0, 0), (0, session.bucket("rows", rows) - rows), (0, 0)])  # never reached
    state = np.zeros((batch, SLOTS, *latents_shape), np.float32)
    noise = np.zeros((batch, draws, *latents_shape), np.float32)
    for b, sample in enumerate(samples):
        generator = TorchNoise(sample.seed)
        state[b, 0] = generator.randn((1, *latents_shape))[0] * np.float32(sample.table.init_noise_sigma)
        for row in sample.table.noise_rows:
            noise[b, row] = generator.randn((1, *latents_shape))[0]

    session.feed_back("state", "next_state")
    session.feed_back("index", "next_index")
    _, height, width = latents_shape
    session.reshape(batch=batch, rows=tables.shape[1], draws=draws, height=height, width=width)
    session.inputs["table"].write(tables)
    session.inputs["noise"].write(noise)
    session.inputs["state"].write(state)
    session.inputs["index"].write(np.zeros(batch, np.int64))
    return rows


def denoise(session: Session, rows: int) -> Generator[int, None, None]:
    """Run a loaded ``denoise`` session ``rows`` times; yields the number of rows done, from 1.

    Nothing crosses to the host in between, and nothing is waited for. Whoever iterates may stop at any yield;
    ``session.outputs["latents"]`` then holds the latents as far as they got.
    """
    for row in range(rows):
        session.run()
        yield row + 1


def finite(latents: npt.NDArray[np.float32]) -> bool:
    """Whether the latents ``[B, C, h, w]`` are numbers: what overflowed cannot be decoded to a picture."""
    return bool(np.isfinite(latents).all())
