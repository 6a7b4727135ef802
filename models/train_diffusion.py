"""Train the denoiser: the UNet on cached latents and cached text states (the text encoder is frozen, as in SD 1.x)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import train_text
import train_vae
from diffusers import AutoencoderKL
from networks import new_scheduler, new_unet, plain_attention
from pictures import load_labels, load_pictures
from scenes import from_labels, redrawn
from torch import nn
from tqdm import tqdm, trange
from train_text import load_captions
from training import DTYPE, Recipe, save_whole, trained
from transformers import CLIPTextModel, PreTrainedTokenizerBase
from vocabulary import TEXT_LENGTH, save_clip_tokenizer


@dataclass(frozen=True)
class Run:
    """One run of the denoiser's training.

    Attributes:
        noise: the mean of logit(t / 1000) at the first and at the last step: layout and colours are decided in much
            noise, edges in little.
        spread: its standard deviation.
        batch: latents of one step, all processes together.
        scenes: how many scenes the latents are drawn from, the first ones.
        empty: the share of captions replaced by the empty one, which is what guidance is measured against.
        wrong: the share of the attributes in its captions that are drawn anew.
    """

    recipe: Recipe
    noise: tuple[float, float]
    spread: float = 1.2
    batch: int = 96
    scenes: int = 40_000
    empty: float = 0.15
    wrong: float = 0.0


# Each run starts from the weights that the one before ended with. Colours come first, shapes late, edges then. The
# fourth made the captions as unreliable as those of the web. The last trusts them again, on more scenes and for
# seventeen times as many samples as any other: hours on a processor, minutes on a GPU.
RUNS = (
    Run(Recipe("diffusion", steps=1200, rate=1e-3, average=0.995, warmup=60), noise=(0.4, 0.4)),
    Run(Recipe("refined", steps=2000, rate=7e-4, average=0.995, warmup=60, seed=1), noise=(0.4, 0.4)),
    Run(Recipe("polished", steps=2000, rate=7e-4, average=0.995, warmup=60, seed=2), noise=(-0.3, -0.3)),
    Run(Recipe("misled", steps=400, rate=5e-4, average=0.98, warmup=20, seed=3), noise=(0.2, 0.2), wrong=0.4),
    Run(
        Recipe("trained_on", steps=3300, rate=1e-3, average=0.999, warmup=200, seed=4, beta=0.99),
        noise=(0.4, -0.3), spread=1.3, batch=1024, scenes=120_000, empty=0.12,
    ),
)  # fmt: skip


@torch.inference_mode()
def cache_latents(work: Path) -> None:
    """Encode the training pictures: the posterior's mean, float16 ``[N, 4, 16, 16]``, as they come."""
    path = work / "latents.pt"
    if path.exists():
        return
    vae = trained(train_vae.Vae(work), train_vae.RECIPE, work).to(DTYPE)
    pictures, chunk = load_pictures(work), 50
    means = [
        vae._encode(train_vae.to_model(pictures[at : at + chunk]).to(DTYPE)).chunk(2, dim=1)[0].half()
        for at in trange(0, len(pictures), chunk, desc="latents", mininterval=5)
    ]
    save_whole(torch.cat(means), path)


@cache
def load_latents(work: Path) -> torch.Tensor:
    """The cached latents as the UNet sees them: each channel with mean 0 and deviation 1."""
    latents = torch.load(work / "latents.pt", weights_only=True).float()
    mean, deviation = _statistics(latents)
    return (latents - mean.view(-1, 1, 1)) / deviation.view(-1, 1, 1)


def _statistics(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


def standard_vae(work: Path) -> AutoencoderKL:
    """The trained VAE with standardised latents and the scaling factor that gives them unit deviation."""
    vae = trained(train_vae.Vae(work), train_vae.RECIPE, work)
    mean, deviation = _statistics(torch.load(work / "latents.pt", weights_only=True).float())
    train_vae.standardise(vae, mean, deviation)
    vae.register_to_config(scaling_factor=round(1 / deviation.square().mean().sqrt().item(), 5))
    return vae


@torch.inference_mode()
def cache_contexts(work: Path) -> None:
    """The text states of both captions of each scene, bfloat16 ``[N, 2, 32, width]``, and of the empty one."""
    path = work / "contexts.pt"
    if path.exists():
        return
    text = trained(train_text.Reader(work), train_text.RECIPE, work)["text"].to(DTYPE)
    captions, empty = load_captions(work)
    rows = captions.flatten(0, 1).split(400)
    states = torch.cat([text(ids).last_hidden_state.bfloat16() for ids in tqdm(rows, desc="contexts", mininterval=5)])
    contexts = states.view(*captions.shape[:2], *states.shape[1:])
    save_whole({"contexts": contexts, "empty": text(empty[None]).last_hidden_state[0].bfloat16()}, path)


@cache
def load_contexts(work: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``cache_contexts`` wrote."""
    saved = torch.load(work / "contexts.pt", weights_only=True, mmap=True)
    return saved["contexts"], saved["empty"]


@cache
def load_text_encoder(work: Path) -> tuple[PreTrainedTokenizerBase, CLIPTextModel]:
    """The tokenizer and the trained text encoder, in the dtype of training."""
    encoder = trained(train_text.Reader(work), train_text.RECIPE, work)["text"]
    return save_clip_tokenizer(work / "tokenizer"), encoder.to(DTYPE)


@torch.no_grad()
def wrong_contexts(work: Path, rows: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Text states of captions of the scenes ``rows``, ``share`` of their attributes drawn anew, ``[B, 32, width]``."""
    tokenizer, encoder = load_text_encoder(work)
    rng = np.random.default_rng(seed)
    scenes = [redrawn(from_labels(row), share, rng) for row in load_labels(work)[rows].numpy()]
    captions = [scene.caption(swapped=bool(rng.integers(2))) for scene in scenes]
    ids = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    return encoder(ids).last_hidden_state


@cache
def noise_schedule() -> torch.Tensor:
    """alpha_bar of each timestep, float32 ``[1000]``."""
    return new_scheduler().alphas_cumprod


class Denoiser:
    """The denoiser's loss, in the units of v = alpha eps - sigma x_0, so that x_0 counts at every noise level.

    The squared error of epsilon hides x_0 behind the noise at high timesteps, where a scene's colours and layout are
    decided. Where little noise is left, the weight is capped (min-SNR, 5).
    """

    def __init__(self, work: Path, runs: tuple[Run, ...]) -> None:
        """Train the last of ``runs``; the others are those before it."""
        self.work, self.before, self.run = work, runs[:-1], runs[-1]

    def build(self) -> nn.Module:
        if self.before:
            return trained_unet(self.work, self.before).requires_grad_(True)
        unet = new_unet()
        plain_attention(unet)
        return unet

    def loss(self, module: nn.Module, generator: torch.Generator, step: int) -> torch.Tensor:
        run, batch = self.run, self.run.batch // (dist.get_world_size() if dist.is_initialized() else 1)
        latents, (contexts, empty) = load_latents(self.work), load_contexts(self.work)
        rows = torch.randint(run.scenes, (batch,), generator=generator)
        if run.wrong:
            seed = int(torch.randint(2**62, (1,), generator=generator))
            context = wrong_contexts(self.work, rows, run.wrong, seed)  # [B, 32, width]
        else:
            context = contexts[rows, torch.randint(2, (batch,), generator=generator)]
        context[torch.rand(batch, generator=generator) < run.empty] = empty.to(context.dtype)
        x_0 = latents[rows]
        # logit-normal: most draws where the run has something to learn, few where almost nothing or almost all is noise
        first, last = run.noise
        logit = first + (last - first) * step / run.recipe.steps + run.spread * torch.randn(batch, generator=generator)
        t = (1000 * torch.sigmoid(logit)).long().clamp(0, 999)
        eps = torch.randn(x_0.shape, generator=generator)
        alpha_bar = noise_schedule()[t].view(-1, 1, 1, 1)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x_t, v = alpha * x_0 + sigma * eps, alpha * eps - sigma * x_0
        weight = (5 * (1 - alpha_bar)).clamp(max=1)  # min(1 + SNR, 5) of the weight on x_0
        there = {"device": module.device, "dtype": module.dtype}
        out = module(x_t.to(**there), t.to(module.device), context.to(**there), return_dict=False)[0].float()
        return (weight.to(out.device) * (out - v.to(out.device)).square()).mean()


def trained_unet(work: Path, runs: tuple[Run, ...] = RUNS) -> nn.Module:
    """The UNet after the last of ``runs``."""
    return trained(Denoiser(work, runs), runs[-1].recipe, work)
