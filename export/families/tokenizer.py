"""The text encoder's tokenizer as one file of the ``tokenizers`` library, which needs no transformers to run."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from dnp.engine.bundle.manifest import TokenizerSpec
from dnp.engine.errors import ExportError
from dnp.export.families.source import Source

FILE = "tokenizers/prompt.json"

# Texts that tell tokenizers apart: case, spaces, accents composed or not, scripts, marks, digits, special tokens.
PROBES = (
    "",
    "a photo of an astronaut riding a horse on mars",
    "  A  Small\tRED circle,\n(left of) a 2nd square!?  ",
    "Crème brûlée, cafe\u0301, ﬁne ²",
    "红色的圆 и синий квадрат 🎨👩‍🚀",
    "it's <|endoftext|> they'll <|startoftext|> don't",
    "low quality, worst quality, " * 40,
)


def prompt_tokenizer(source: Source) -> tuple[Tokenizer, TokenizerSpec]:
    """Convert the CLIP tokenizer of ``source`` and compare its ids with transformers' on ``PROBES``.

    The result neither pads nor truncates. Raises ExportError when the tokenizer cannot be loaded, has ids that the
    text encoder lacks, or gives other ids.
    """
    import transformers

    folder = source.folder / "tokenizer"
    try:
        theirs: Any = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ExportError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    ours = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    ours.no_padding()
    ours.no_truncation()
    bos, eos, pad = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    if len(theirs) > source.vocabulary:
        raise ExportError(f"the tokenizer in {folder} has {len(theirs)} tokens, the text encoder {source.vocabulary}")
    length = source.length
    for text in PROBES:
        ids = list(ours.encode(text).ids)
        if len(ids) > length:
            ids = [*ids[: length - 1], ids[-1]]
        ids += [pad] * (length - len(ids))
        expected = theirs(text, padding="max_length", truncation=True, max_length=length)["input_ids"]
        if ids != expected or ids[0] != bos or eos not in ids:
            raise ExportError(f"the tokenizer in {folder} cannot be converted: {text!r} gives {ids}, not {expected}")
    return ours, TokenizerSpec(FILE, bos, eos, pad)
