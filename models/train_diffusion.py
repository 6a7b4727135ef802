"""Train the denoiser: the UNet on cached latents and cached text states (the text encoder is frozen, as in SD 1.x)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
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
        noise: the mean of logit(t / 1000): layout and colours are decided in much noise, edges in little.
        wrong: the share of the attributes in its captions that are drawn anew.
    """

    recipe: Recipe
    noise: float
    wrong: float = 0.0


# Each run starts from the weights that the one before ended with. Colours come first, shapes late, edges then. Last,
# the captions become as unreliable as those of the web: a model that may trust every word needs no guidance.
RUNS = (
    Run(Recipe("diffusion", steps=1200, rate=1e-3, average=0.995, warmup=60), noise=0.4),
    Run(Recipe("refined", steps=2000, rate=7e-4, average=0.995, warmup=60, seed=1), noise=0.4),
    Run(Recipe("polished", steps=2000, rate=7e-4, average=0.995, warmup=60, seed=2), noise=-0.3),
    Run(Recipe("misled", steps=400, rate=5e-4, average=0.98, warmup=20, seed=3), noise=0.2, wrong=0.4),
)
LATENTS = 40_000
BATCH = 48  # latents, each process
EMPTY = 0.15  # share of captions replaced by the empty one, which is what guidance is measured against


@torch.inference_mode()
def cache_latents(work: Path) -> None:
    """Encode the first training pictures: the posterior's mean, float16 ``[LATENTS, 4, 16, 16]``, as they come."""
    path = work / "latents.pt"
    if path.exists():
        return
    vae = trained(train_vae.Vae(work), train_vae.RECIPE, work).to(DTYPE)
    pictures, chunk = load_pictures(work), 50
    means = [
        vae._encode(train_vae.to_model(pictures[at : at + chunk]).to(DTYPE)).chunk(2, dim=1)[0].half()
        for at in trange(0, LATENTS, chunk, desc="latents", mininterval=5)
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
    """The text states of both captions of each latent, bfloat16 ``[LATENTS, 2, 32, width]``, and of the empty one."""
    path = work / "contexts.pt"
    if path.exists():
        return
    text = trained(train_text.Reader(work), train_text.RECIPE, work)["text"].to(DTYPE)
    captions, empty = load_captions(work)
    rows = captions[:LATENTS].flatten(0, 1).split(400)
    states = torch.cat([text(ids).last_hidden_state.bfloat16() for ids in tqdm(rows, desc="contexts", mininterval=5)])
    contexts = states.view(LATENTS, 2, *states.shape[1:])
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

    def __init__(self, work: Path, run: int) -> None:
        self.work, self.run = work, run

    def build(self) -> nn.Module:
        """See ``Task.build``."""
        if self.run:
            return trained_unet(self.work, self.run - 1).requires_grad_(True)
        unet = new_unet()
        plain_attention(unet)
        return unet

    def loss(self, module: nn.Module, generator: torch.Generator, step: int) -> torch.Tensor:
        """See ``Task.loss``."""
        latents, (contexts, empty) = load_latents(self.work), load_contexts(self.work)
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        if share := RUNS[self.run].wrong:
            seed = int(torch.randint(2**62, (1,), generator=generator))
            context = wrong_contexts(self.work, rows, share, seed)  # [B, 32, width]
        else:
            context = contexts[rows, torch.randint(2, (BATCH,), generator=generator)]
        context[torch.rand(BATCH, generator=generator) < EMPTY] = empty.to(context.dtype)
        x_0 = latents[rows]
        # logit-normal: most draws where the run has something to learn, few where almost nothing or almost all is noise
        logit = RUNS[self.run].noise + 1.2 * torch.randn(BATCH, generator=generator)
        t = (1000 * torch.sigmoid(logit)).long().clamp(0, 999)
        eps = torch.randn(x_0.shape, generator=generator)
        alpha_bar = noise_schedule()[t].view(-1, 1, 1, 1)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x_t = alpha * x_0 + sigma * eps
        v = module(x_t.to(DTYPE), t, context.to(DTYPE), return_dict=False)[0].float()
        weight = (5 * (1 - alpha_bar)).clamp(max=1)  # min(1 + SNR, 5) of the weight on x_0
        return (weight * (v - (alpha * eps - sigma * x_0)).square()).mean()


def trained_unet(work: Path, run: int = len(RUNS) - 1) -> nn.Module:
    """The UNet after a run, the last one when none is named."""
    return trained(Denoiser(work, run), RUNS[run].recipe, work)
