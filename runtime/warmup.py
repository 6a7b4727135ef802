"""Warm-up: run the sampling graphs once at every batch size, so that no request has to wait for what is done once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    batches: Iterable[int],
    tables: Sequence[SamplerTable],
) -> None:
    """Prepare the three sessions at the bundle's default size, or the nearest that they have, with each of ``tables``.

    A run's sizes depend on the sampler only in whether it draws noise on the way.
    """
    latents = bundle.latents
    height, width = denoise.nearest("height", latents.height), denoise.nearest("width", latents.width)
    shape = (latents.channels, height, width)
    for batch in batches:
        encode_text.reshape(batch=batch)
        encode_text.prepare()
        for table in tables:
            load_samples(denoise, [Sample(table, 0)] * batch, shape)
            denoise.prepare()
        decode.reshape(batch=batch, height=height, width=width)
        decode.prepare()
