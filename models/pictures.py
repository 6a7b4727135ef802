"""The rendered training set on disk: pictures, labels and what each patch shows."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from scenes import SIDE, examples
from tqdm import tqdm

TRAIN = 120_000
HELD_OUT = 2_000


def render(work: Path, seed: int = 0) -> None:
    """Draw both splits into ``work`` as memory-mapped arrays; nothing is done where they exist."""
    for split, count in (("train", TRAIN), ("held_out", HELD_OUT)):
        if (work / f"{split}_labels.npy").exists():
            continue
        work.mkdir(parents=True, exist_ok=True)
        pictures = np.empty((count, SIDE, SIDE, 3), np.uint8)
        labels, patches = [], np.empty((count, 8, 8), np.uint8)
        drawn = tqdm(examples(seed, count, split == "held_out"), total=count, desc=f"render {split}", mininterval=2)
        for n, (scene, picture, masks) in enumerate(drawn):
            pictures[n] = picture
            labels.append(scene.labels())
            share = masks.reshape(-1, 8, 8, 8, 8).mean((2, 4))  # [objects, 8, 8]
            patches[n] = np.where(share.max(0) > 0.15, share.argmax(0) + 1, 0)
        np.save(work / f"{split}_pictures.npy", pictures)
        np.save(work / f"{split}_patches.npy", patches)
        np.save(work / f"{split}_labels.npy", np.stack(labels))


@cache
def _load(work: Path, name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(work / f"{name}.npy", mmap_mode="c"))


def load_pictures(work: Path, split: str = "train") -> torch.Tensor:
    """uint8 ``[N, 64, 64, 3]``."""
    return _load(work, f"{split}_pictures")


def load_labels(work: Path, split: str = "train") -> torch.Tensor:
    """int64 ``[N, 9]``, columns as in ATTRIBUTES."""
    return _load(work, f"{split}_labels")


def load_patches(work: Path, split: str = "train") -> torch.Tensor:
    """uint8 ``[N, 8, 8]``: which object (1 or 2) a patch shows, 0 for the background."""
    return _load(work, f"{split}_patches")
