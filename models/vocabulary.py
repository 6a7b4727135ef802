"""The two tokenizers of the tiny model, built from the grammar's words.

CLIP's byte-pair encoding keeps its full byte alphabet, so any Unicode string has ids; BERT's WordPiece keeps letters,
digits and punctuation. In both, each word of the grammar is one token.
"""

from __future__ import annotations

import json
import string
from collections import Counter
from itertools import pairwise
from pathlib import Path

from scenes import WORDS
from transformers import BertTokenizer, BlipImageProcessor, BlipProcessor, CLIPTokenizer

TEXT_LENGTH = 32  # tokens, both text models


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in CLIP's order: printable bytes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until each word is one token ending in ``</w>``."""
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for spelling in spellings:
            at = 0
            while at < len(spelling) - 1:
                if (spelling[at], spelling[at + 1]) == best:
                    spelling[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def save_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write CLIP's tokenizer, padded with ``<|endoftext|>`` as Stable Diffusion's is, and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet, merges = byte_alphabet(), learn_merges(WORDS)
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
    end = "<|endoftext|>"
    names = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH, "do_lower_case": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


def save_blip_processor(folder: Path, side: int) -> BlipProcessor:
    """Write BLIP's processor: CLIP's image statistics, ``side`` pixels, and a WordPiece with [DEC] and [ENC] last."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase + string.digits
    words = [word for word in WORDS if len(word) > 1]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *letters]
    tokens += [*("##" + letter for letter in letters), *words, "[DEC]", "[ENC]"]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*tokens, ""]))
    tokenizer = BertTokenizer(
        vocab={token: n for n, token in enumerate(tokens)}, do_lower_case=True, model_max_length=TEXT_LENGTH,
        bos_token="[DEC]", additional_special_tokens=["[ENC]"],
    )  # fmt: skip
    processor = BlipProcessor(BlipImageProcessor(size={"height": side, "width": side}), tokenizer)
    processor.save_pretrained(folder)
    return processor
