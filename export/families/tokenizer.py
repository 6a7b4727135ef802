"""The text encoder's tokenizer as one file of the ``tokenizers`` library, which needs no transformers to run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from tokenizers import Tokenizer

from dnp.engine.bundle.manifest import TokenizerSpec
from dnp.engine.errors import ExportError
from dnp.export.families.source import Source, TextEncoder
from dnp.export.files import check_settings_files
from dnp.export.loading import warnings_refused

_MARK = "\u2060"  # word joiner: before a token that is not to be expanded again; nothing shows it

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


def prompt_tokenizers(source: Source) -> dict[str, tuple[Tokenizer, TokenizerSpec]]:
    """Each of the family's tokenizers by the file to store it in: see ``prompt_tokenizer``."""
    files = {
        f"tokenizers/prompt{part.tokenizer.removeprefix('tokenizer')}.json": part for part in source.family.encoders
    }
    return {file: prompt_tokenizer(source, encoder, file) for file, encoder in files.items()}


def prompt_tokenizer(source: Source, encoder: TextEncoder, file: str) -> tuple[Tokenizer, TokenizerSpec]:
    """Convert the CLIP tokenizer of ``encoder`` and compare its ids with diffusers' on ``PROBES``.

    The result neither pads nor truncates. Raises ExportError when the tokenizer cannot be loaded, has ids that the
    text encoder lacks, or gives other ids.
    """
    import transformers

    folder, vocabulary = source.folder / encoder.tokenizer, source.configs[encoder.folder]["vocab_size"]
    check_settings_files(folder)
    try:
        with warnings_refused(folder):
            theirs: Any = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except ExportError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ExportError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    expansions = _expansions(theirs)
    ours = _with_expansions(theirs.backend_tokenizer.to_str(), expansions)
    ours.no_padding()
    ours.no_truncation()
    bos, eos, pad = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    if len(theirs) > vocabulary:
        raise ExportError(f"the tokenizer in {folder} has {len(theirs)} tokens, the text encoder {vocabulary}")
    length = source.length
    pipeline = TextualInversionLoaderMixin()
    with warnings_refused(folder):
        for text in (*PROBES, *(f"a {token} cat, {token.upper()} {token}_1{token}" for token in expansions)):
            ids = list(ours.encode(text).ids)
            if len(ids) > length:
                ids = [*ids[: length - 1], ids[-1]]
            ids += [pad] * (length - len(ids))
            converted = pipeline.maybe_convert_prompt(text, theirs)
            expected = theirs(converted, padding="max_length", truncation=True, max_length=length)["input_ids"]
            if ids != expected or ids[0] != bos or eos not in ids:
                raise ExportError(
                    f"the tokenizer in {folder} cannot be converted: {text!r} gives {ids}, not {expected}"
                )
    return ours, TokenizerSpec(file, bos, eos, pad)


def _expansions(tokenizer: Any) -> dict[str, list[str]]:
    """The tokens of textual inversions of several vectors, each with those that follow it: ``<toy>_1``, ``<toy>_2``, …

    diffusers' ``maybe_convert_prompt`` writes them all where a prompt has the first, if it tokenizes to itself.
    """
    added = tokenizer.added_tokens_encoder
    found: dict[str, list[str]] = {}
    for token in added:
        more: list[str] = []
        while (name := f"{token}_{len(more) + 1}") in added:
            more.append(name)
        if more and tokenizer.tokenize(token) == [token]:
            found[token] = more
    return found


def _with_expansions(serialized: str, expansions: Mapping[str, list[str]]) -> Any:
    """A tokenizer of the ``tokenizers`` library that does itself what diffusers does to prompts before.

    As there, all of a token's places in the prompt are written out once it stands for itself in one of them, and not
    only as the beginning of a longer token. The token is renamed, by ``_MARK``, or its own name would be written out.
    """
    whole = json.loads(serialized)
    names = [token["content"] for token in whole["added_tokens"]]
    steps = []
    for token, more in expansions.items():
        place = f"(?<!{_MARK}){re.escape(token)}"
        longer = [re.escape(name.removeprefix(token)) for name in names if name.startswith(token) and name != token]
        alone = f"(?i:{place}(?!{'|'.join(longer)}))"
        pattern = rf"(?:\A(?=[\s\S]*{alone})|\G(?!\A))[\s\S]*?\K{place}"
        steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": " ".join([_MARK + token, *more])})
        steps.append({"type": "Replace", "pattern": {"Regex": alone}, "content": _MARK + token})  # as <TOY> is, to them
    if steps:
        whole["normalizer"] = {"type": "Sequence", "normalizers": [*steps, whole["normalizer"]]}
    for token in whole["added_tokens"]:
        if token["content"] in expansions:
            token["content"] = _MARK + token["content"]
    return Tokenizer.from_str(json.dumps(whole))
