"""Train the scorer, which reads attributes from pictures. It judges the other models and is not one of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from networks import Scorer
from pictures import load_labels, load_pictures
from scenes import ATTRIBUTES, Scene, from_labels
from torch import nn
from torch.nn import functional
from train_vae import to_model
from training import DTYPE, Recipe

RECIPE = Recipe("scorer", steps=500, rate=2e-3, average=0.98)
BATCH = 96


def degrade(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur half of the pictures, shift the tint of all and add noise, so that soft samples can be read too."""
    count = len(x)
    blurred = functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, blurred, x)
    tint = 0.12 * torch.randn(count, 3, 1, 1, generator=generator)
    noise = 0.25 * torch.rand(count, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    return (x + tint + noise).clamp(-1, 1)


class Reading:
    """Cross-entropy of every attribute on degraded pictures."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def build(self) -> nn.Module:
        return Scorer()

    def loss(self, module: nn.Module, generator: torch.Generator, step: int) -> torch.Tensor:
        rows = torch.randint(len(load_pictures(self.work)), (BATCH,), generator=generator)
        logits = module(degrade(to_model(load_pictures(self.work)[rows]), generator).to(DTYPE))
        labels = load_labels(self.work)[rows]
        losses = [
            functional.cross_entropy(logits[name].float(), labels[:, n], ignore_index=-1)
            for n, name in enumerate(ATTRIBUTES)
        ]
        return torch.stack(losses).mean()


@torch.inference_mode()
def read(scorer: Scorer, pictures: np.ndarray) -> list[Scene]:
    """What the scorer sees in uint8 pictures ``[N, 64, 64, 3]``."""
    scenes = []
    for chunk in torch.from_numpy(np.ascontiguousarray(pictures)).split(250):
        logits = scorer(to_model(chunk))
        labels = torch.stack([logits[name].argmax(1) for name in ATTRIBUTES], dim=1)
        scenes += [from_labels(row) for row in labels.numpy()]
    return scenes
