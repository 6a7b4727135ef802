"""What the network is conditioned on: texts, encoded, and the image's size, written into a denoiser's bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dnp.engine.backends.session import Buffer, Session
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.bundle.contract import text_inputs
from dnp.runtime.tokenizer import PromptTokenizer

Bank = Mapping[str, Buffer]
Entry = tuple[str, tuple[int, int], int]  # text, (height, width), windows


class Conditioner:
    """The ``encode_text`` session of a bundle, with its tokenizers.

    It remembers what it wrote into a bank, by its identity: a text that lies in one place of it is copied to another,
    not encoded again.
    """

    def __init__(self, bundle: Bundle, session: Session, tokenizers: Sequence[PromptTokenizer]) -> None:
        self._bundle, self._session = bundle, session
        self._tokenizers = dict(zip(text_inputs(bundle), tokenizers, strict=True))
        self._written: dict[tuple[int, int], Entry] = {}  # by (place, role)
        self._bank: Bank = {}  # that they were written into

    def write(
        self, bank: Bank, places: Mapping[int, Sequence[str]], *, size: tuple[int, int], windows: int = 1
    ) -> None:
        """Write the texts of some places into the bank: one for each role, in order.

        The empty text is ∅. ``size`` is (height, width) of the images, in pixels. Each text is encoded once; what is
        encoded stays on the device.
        """
        if bank is not self._bank:
            self.forget()
            self._bank = bank
        wanted = {
            (place, role): (text, size, windows) for place, texts in places.items() for role, text in enumerate(texts)
        }
        missing = {at: entry for at, entry in wanted.items() if self._written.get(at) != entry}
        for at in missing:
            self._written.pop(at, None)
        there = {entry: at for at, entry in self._written.items()}
        for at, entry in missing.items():
            if entry in there:
                for buffer in bank.values():
                    buffer.at(*at).copy(buffer.at(*there[entry]))
            else:
                self._encode(bank, at, entry)
                there[entry] = at
            self._written[at] = entry

    def forget(self) -> None:
        """Encode everything anew: the weights have changed, or what the bank holds."""
        self._written.clear()

    def _encode(self, bank: Bank, at: tuple[int, int], entry: Entry) -> None:
        """Encode a text by itself, so that what it gives depends on no other, and put it into its place of the bank."""
        text, size, windows = entry
        count = self._session.limits.nearest("batch", 1)  # a plan may be for no fewer
        self._session.reshape(batch=count, tokens=windows * self._bundle.text.length)
        for name, tokenizer in self._tokenizers.items():
            self._session.inputs[name].write(tokenizer.encode([text] * count, windows))
        self._session.run()
        for name, spec in self._bundle.conditioning.items():
            target = bank[name].at(*at)
            if spec.source == "size":
                target.write(np.array([*size, 0, 0, *size], np.float32))
            elif not text and self._bundle.text.empty == "zeros":
                target.write(np.zeros(target.shape, target.dtype))
            else:
                target.copy(self._session.outputs[name].at(0))
