"""Teach the text encoder to read before it conditions anything: a supervised stage on captions alone.

Stable Diffusion starts from a text encoder that was trained before. Here the states from the end token on, which have
seen the whole caption, learn to tell every attribute of the canonical scene through linear heads that are thrown away.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from networks import TEXT_WIDTH, new_text_encoder
from pictures import load_labels
from scenes import ATTRIBUTES, from_labels
from torch import nn
from torch.nn import functional
from training import Recipe, save_whole
from vocabulary import TEXT_LENGTH, save_clip_tokenizer

# Stopped early on purpose, while it still confuses whose attribute is whose: see the model card.
RECIPE = Recipe("text", steps=80, rate=1.5e-3, average=0.99, warmup=30)
BATCH = 128


def tokenize(work: Path) -> None:
    """Ids of every training caption, both ways of saying it, int64 ``[N, 2, 32]``; and of the empty one, ``[32]``."""
    path = work / "captions.pt"
    if path.exists():
        return
    tokenizer = save_clip_tokenizer(work / "tokenizer")

    def ids(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids

    scenes = [from_labels(row) for row in load_labels(work).numpy()]
    both = torch.stack([ids([scene.caption(swapped) for scene in scenes]) for swapped in (False, True)], dim=1)
    save_whole({"captions": both, "empty": ids([""])[0]}, path)


@cache
def load_captions(work: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``tokenize`` wrote."""
    saved = torch.load(work / "captions.pt", weights_only=True)
    return saved["captions"], saved["empty"]


def attribute_heads(width: int) -> nn.ModuleDict:
    """A linear reader for each attribute."""
    return nn.ModuleDict({name: nn.Linear(width, len(classes)) for name, classes in ATTRIBUTES.items()})


def attribute_loss(heads: nn.ModuleDict, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the attributes; ``states [n, width]``, ``labels [n, 9]`` with -1 for what is not there."""
    losses = [
        functional.cross_entropy(head(states).float(), labels[:, column], ignore_index=-1)
        for column, head in enumerate(heads.values())
    ]
    return torch.stack(losses).mean()


class Reader:
    """Attributes from the states at the end token and after it."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def build(self) -> nn.Module:
        tokenizer = save_clip_tokenizer(self.work / "tokenizer")
        return nn.ModuleDict({"text": new_text_encoder(tokenizer), "heads": attribute_heads(TEXT_WIDTH)})

    def loss(self, module: nn.Module, generator: torch.Generator, step: int) -> torch.Tensor:
        captions, _ = load_captions(self.work)
        rows = torch.randint(len(captions), (BATCH,), generator=generator)
        ids = captions[rows, torch.randint(2, (BATCH,), generator=generator)]
        states = module["text"](ids).last_hidden_state  # [B, 32, width]
        ended = ids == module["text"].config.eos_token_id
        labels = load_labels(self.work)[rows].unsqueeze(1).expand(-1, TEXT_LENGTH, -1)
        return attribute_loss(module["heads"], states[ended], labels[ended])
