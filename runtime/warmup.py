"""Warm-up: run the sampling graphs once at every batch size, so that no request has to wait for what is done once."""

from __future__ import annotations

from collections.abc import Sequence

from dnp.engine.bundle import Bundle
from dnp.engine.session import Session
from dnp.runtime.denoise import Sample, load_samples
from dnp.runtime.samplers import SamplerTable


def prepare_sampling(
    bundle: Bundle,
    encode_text: Session,
    denoise: Session,
    decode: Session,
    *,
    batches: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    tables: Sequence[SamplerTable],
) -> None:
    """Prepare the three sessions at every batch size, the largest first, at images of each of ``sizes``, as (height,
    width) in pixels, or the nearest that they have, and with each of ``tables``, the one that draws most noise first.

    A run's sizes depend on the sampler only in whether it draws noise on the way.
    """
    latents = bundle.latents
    shapes = [
        (
            latents.channels,
            denoise.nearest("height", h // latents.pixels),
            denoise.nearest("width", w // latents.pixels),
        )
        for h, w in sizes
    ]
    for shape in shapes:  # what grows has grown before anything is recorded, for it moves
        for batch in batches[:1]:
            load_samples(denoise, [Sample(tables[0], 0)] * batch, shape)
            decode.reshape(batch=batch, height=shape[1], width=shape[2])
    for batch in batches:
        encode_text.reshape(batch=batch)
        encode_text.prepare()
        for shape in shapes:
            for table in tables:
                load_samples(denoise, [Sample(table, 0)] * batch, shape)
                denoise.prepare()
            decode.reshape(batch=batch, height=shape[1], width=shape[2])
            decode.prepare()
