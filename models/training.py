"""One training loop for every stage: float32 weights, data-parallel processes of one thread each, or one and a GPU.

The weights live in one flat float32 vector, which makes the gradient exchange, clipping,
AdamW, the moving average and the checkpoint one operation each. Batches are drawn from ``(seed, step, rank)``, so a
run that was stopped continues as if it had not been.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from tqdm import tqdm

_processor = torch.cpu.get_capabilities()
DTYPE = torch.bfloat16 if _processor.get("avx512_bf16") or _processor.get("amx_bf16") else torch.float32
"""What modules compute in, on float32 master weights: a processor without bf16 takes 20 times as long in it."""
CPU = torch.device("cpu")
GPU = torch.device("cuda")


@dataclass(frozen=True)
class Recipe:
    """Settings of one stage."""

    name: str
    steps: int
    rate: float
    warmup: int = 100
    seed: int = 0
    decay: float = 0.01
    clip: float = 1.0
    beta: float = 0.98  # AdamW's second
    average: float = 0.999  # moving average of the weights
    checkpoint_s: float = 120.0

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to 2 % of the peak."""
        cosine = 0.51 + 0.49 * math.cos(math.pi * min(1.0, step / self.steps))
        return self.rate * min(1.0, (step + 1) / self.warmup) * cosine


class Task(Protocol):
    """What a stage trains, and on what. Pickled into each worker, so it holds paths, not tensors.

    A stage that may run on a GPU takes the device and the dtype of its computations from the module.
    """

    def build(self) -> nn.Module:
        """The module to train; called with the seed set."""

    def loss(self, module: nn.Module, generator: torch.Generator, step: int) -> torch.Tensor:
        """The loss of one batch drawn with ``generator``."""


class FlatWeights:
    """The float32 weights of a module as one flat vector, their moving average, and their optimiser."""

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.vector = torch.cat([p.detach().flatten() for p in self.parameters]).float()
        self.average = self.vector.clone()
        self.optimiser = torch.optim.AdamW(
            [self.vector], weight_decay=recipe.decay, betas=(0.9, recipe.beta), fused=True
        )

    def show(self, vector: torch.Tensor) -> None:
        """Copy ``vector`` into the module."""
        for p, part in zip(self.parameters, vector.split([p.numel() for p in self.parameters]), strict=True):
            p.data.copy_(part.view_as(p))

    def update(self, step: int) -> float:
        """One AdamW step from the module's gradients, averaged over the processes; returns the gradient's norm."""
        self.vector.grad = torch.cat([p.grad.flatten() for p in self.parameters]).float()
        for p in self.parameters:
            p.grad = None
        if dist.is_initialized():
            dist.all_reduce(self.vector.grad)
            self.vector.grad /= dist.get_world_size()
        norm = nn.utils.clip_grad_norm_(self.vector, self.recipe.clip)
        self.optimiser.param_groups[0]["lr"] = self.recipe.rate_at(step)
        self.optimiser.step()
        self.average.lerp_(self.vector, 1 - min(self.recipe.average, (step + 1) / (step + 10)))
        self.show(self.vector)
        return float(norm)

    def state(self, step: int) -> dict[str, object]:
        """What a checkpoint holds after ``step`` steps."""
        return {
            "step": step,
            "vectors": [self.vector],
            "averages": [self.average],
            "optimiser": self.optimiser.state_dict(),
        }

    def load(self, state: dict) -> int:
        """Continue from a checkpoint; returns its step."""
        self.vector.copy_(state["vectors"][0])
        self.average.copy_(state["averages"][0])
        self.optimiser.load_state_dict(state["optimiser"])
        self.show(self.vector)
        return int(state["step"])


def save_whole(data: object, path: Path) -> None:
    """``torch.save`` to a temporary name, then renamed: what is there is complete."""
    part = path.with_suffix(".part")
    torch.save(data, part)
    part.replace(path)


def checkpoint(recipe: Recipe, work: Path) -> Path:
    """Where a stage keeps its state."""
    return work / f"{recipe.name}.pt"


def trained(task: Task, recipe: Recipe, work: Path) -> nn.Module:
    """The module with the averaged float32 weights of the last checkpoint, ready for inference."""
    module = task.build()
    weights = FlatWeights(module, recipe)
    weights.load(torch.load(checkpoint(recipe, work), map_location=CPU, weights_only=True, mmap=True))
    weights.show(weights.average)
    return module.eval().requires_grad_(False)


def fit(task: Task, recipe: Recipe, work: Path, workers: int, device: torch.device = CPU) -> None:
    """Train, or continue to train, to ``recipe.steps``. Progress is shown; the state is kept in ``work``.

    The batches are drawn on the processor whatever ``device`` the module is on, so they are the same ones. On a GPU it
    computes in bf16.
    """
    work.mkdir(parents=True, exist_ok=True)
    rendezvous = work / f"{recipe.name}.{os.getpid()}.rendezvous"
    rendezvous.unlink(missing_ok=True)
    mp.spawn(_worker, (task, recipe, work, workers, device, rendezvous), nprocs=workers)


def _worker(
    rank: int, task: Task, recipe: Recipe, work: Path, workers: int, device: torch.device, rendezvous: Path
) -> None:
    torch.set_num_threads(1)  # threads of one process wait for each other badly when the cores are shared
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers)
    torch.manual_seed(recipe.seed)
    module = task.build().train().to(device)
    weights = FlatWeights(module, recipe)
    module.to(DTYPE if device == CPU else torch.bfloat16)
    weights.show(weights.vector)
    path = checkpoint(recipe, work)
    step = weights.load(torch.load(path, map_location=CPU, weights_only=True)) if path.exists() else 0

    mean, first, saved = 0.0, step, time.monotonic()
    with tqdm(total=recipe.steps, initial=step, desc=recipe.name, disable=rank > 0, mininterval=5) as bar:
        while step < recipe.steps:
            generator = torch.Generator().manual_seed((recipe.seed * 1_000_003 + step) * 64 + rank)
            loss = task.loss(module, generator, step)
            loss.backward()
            norm = weights.update(step)
            mean = 0.98 * mean + 0.02 * loss.item()
            step += 1
            bar.set_postfix(loss=f"{mean / (1 - 0.98 ** (step - first)):.4f}", norm=f"{norm:.2f}", refresh=False)
            bar.update()
            if rank == 0 and (step == recipe.steps or time.monotonic() - saved > recipe.checkpoint_s):
                saved = time.monotonic()
                save_whole(weights.state(step), path)
    if workers > 1:
        dist.destroy_process_group()
