"""What the network is conditioned on: texts, encoded, and the image's size, written into a denoiser's bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dnp.engine.backends.session import Buffer, Session
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.bundle.contract import text_inputs
from dnp.runtime.tokenizer import PromptTokenizer


class Conditioner:
    """The ``encode_text`` session of a bundle, with its tokenizers."""

    def __init__(self, bundle: Bundle, session: Session, tokenizers: Sequence[PromptTokenizer]) -> None:
        self._bundle, self._session = bundle, session
        self._tokenizers = dict(zip(text_inputs(bundle), tokenizers, strict=True))

    def write(
        self,
        bank: Mapping[str, Buffer],
        role: int,
        texts: Sequence[str],
        *,
        size: tuple[int, int],
        windows: int = 1,
        first: int = 0,
    ) -> None:
        """Write one text after the other into the entries of ``role`` in the places from ``first`` on.

        The empty text is ∅. ``size`` is (height, width) of the images, in pixels. Each text is encoded once; what is
        encoded stays on the device.
        """
        different = list(dict.fromkeys(texts))
        count = self._session.limits.nearest("batch", len(different))  # a plan may be for no fewer
        encoded = [*different, *[""] * (count - len(different))]
        self._session.reshape(batch=count, tokens=windows * self._bundle.text.length)
        for name, tokenizer in self._tokenizers.items():
            self._session.inputs[name].write(tokenizer.encode(encoded, windows))
        self._session.run()
        for name, entry in self._bundle.conditioning.items():
            for place, text in enumerate(texts, first):
                target = bank[name].at(place, role)
                if entry.source == "size":
                    target.write(np.array([*size, 0, 0, *size], np.float32))
                elif not text and self._bundle.text.empty == "zeros":
                    target.write(np.zeros(target.shape, target.dtype))
                else:
                    target.copy(self._session.outputs[name].at(different.index(text)))
