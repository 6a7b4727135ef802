"""Text to ids and back with the ``tokenizers`` library, as transformers' CLIPTokenizer and BertTokenizer do it."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from dnp.engine.bundle.bundle import Bundle
from dnp.engine.errors import BundleError, SettingsError

MAX_CHARACTERS = 100_000  # the slowest such prompt takes about a second, and at most 75 tokens of it count


def check_text(text: object, name: str = "prompt") -> str:
    """``text`` itself, when it is a string that can be tokenized.

    Raises SettingsError for anything but a string, for more than ``MAX_CHARACTERS``, and for text that holds NUL or
    half of a surrogate pair, as binary data does.
    """
    if not isinstance(text, str):
        raise SettingsError(f"the {name} must be text, not {type(text).__name__}: {reprlib.repr(text)}")
    if len(text) > MAX_CHARACTERS:
        raise SettingsError(
            f"the {name} has {len(text)} characters, at most {MAX_CHARACTERS} are read: {reprlib.repr(text)}"
        )
    if "\0" in text:
        raise SettingsError(f"the {name} holds a NUL character, so it is not text: {reprlib.repr(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SettingsError(
            f"the {name} is not text: it is no valid Unicode (or UTF-8) at {error.start}: {reprlib.repr(text)}"
        ) from None
    return text


class PromptTokenizer:
    """One tokenizer of the text encoder: CLIP's byte-level BPE, cut and padded to the windows that the model takes."""

    def __init__(self, bundle: Bundle, number: int = 0) -> None:
        spec = bundle.text.tokenizers[number]
        self._tokenizer = _load(bundle.path / spec.file)
        self._length = bundle.text.length
        self._spec = spec
        empty = self._tokenizer.encode("").ids
        if empty != [spec.bos, spec.eos]:
            raise BundleError(
                f"{bundle.path / spec.file} makes {empty} of the empty prompt, where the model wants "
                f"[{spec.bos}, {spec.eos}]; export the model again"
            )

    def encode(self, prompts: Sequence[str], windows: int = 1) -> npt.NDArray[np.int64]:
        """``prompts`` as int64 ids ``[B, windows · L]``: each window has begin, at most L − 2 tokens, end, padding.

        Of one window, equal to ``CLIPTokenizer(prompts, padding="max_length", truncation=True, max_length=L)`` of
        transformers. Tokens that fill no window are cut off. Raises SettingsError for what ``check_text`` refuses.
        """
        if isinstance(prompts, str | bytes):
            raise SettingsError(f"encode takes a list of prompts, not one: {reprlib.repr(prompts)}")
        room = self._length - 2
        ids = np.full((len(prompts), windows, self._length), self._spec.pad, np.int64)
        for of_prompt, encoding in zip(ids, self._encode(prompts), strict=True):
            tokens = encoding.ids[1:-1]
            for number, window in enumerate(of_prompt):
                part = [self._spec.bos, *tokens[number * room : (number + 1) * room], self._spec.eos]
                window[: len(part)] = part
        return ids.reshape(len(prompts), windows * self._length)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> str:
        """The text of one row of ids, begin, end and padding left out; lower case, as the tokenizer sees it."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text.replace("</w>", " ").strip()

    def truncated(self, prompt: str, windows: int = 1) -> str | None:
        """The end of ``prompt`` that ``encode`` cuts off, as it was written; ``None`` when everything fits."""
        (encoding,) = self._encode([prompt])
        room = windows * (self._length - 2)
        if len(encoding.ids) - 2 <= room:
            return None
        return prompt[encoding.offsets[room + 1][0] :]

    def count(self, prompt: str, windows: int = 1) -> int:
        """How many tokens of ``prompt`` the model reads, begin and end left out."""
        (encoding,) = self._encode([prompt])
        return min(len(encoding.ids) - 2, windows * (self._length - 2))

    def _encode(self, prompts: Sequence[str]) -> list[Encoding]:
        # One after the other: encode_batch wakes a pool of threads, for longer than a few prompts take.
        return [self._tokenizer.encode(check_text(prompt)) for prompt in prompts]


class CaptionTokenizer:
    """The captioner's tokenizer: BERT's WordPiece."""

    def __init__(self, bundle: Bundle) -> None:
        self._tokenizer = _load(bundle.path / bundle.caption.tokenizer)

    def encode(self, prefix: str) -> list[int]:
        """The ids of ``prefix``, without [CLS] and [SEP]. Raises SettingsError for what ``check_text`` refuses."""
        ids = self._tokenizer.encode(check_text(prefix, "caption prefix"), add_special_tokens=False).ids
        return [int(i) for i in ids]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> str:
        """The text of ``ids``, equal to transformers' ``BertTokenizer.decode(ids, skip_special_tokens=True)``.

        Ids that the tokenizer does not know, as BLIP's own begin token, are left out.
        """
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))


def _load(path: Path) -> Any:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"{path} is no tokenizer that the tokenizers library can read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
