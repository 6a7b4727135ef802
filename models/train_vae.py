"""Train the autoencoder: 64x64 pictures to 16x16x4 latents."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from networks import new_vae, plain_attention
from pictures import load_pictures
from torch import nn
from torch.nn import functional
from training import DTYPE, Recipe

RECIPE = Recipe("vae", steps=560, rate=2e-3, average=0.99, decay=0.0)
BATCH = 16  # pictures, each process


class Vae:
    """Reconstruction by L1, half as much squared error, L1 of the pixel differences, and very little KL."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def build(self) -> nn.Module:
        vae = new_vae()
        plain_attention(vae)
        with torch.no_grad():
            vae.quant_conv.bias[4:] = -5.0  # log-variances start low, or noise drowns the first steps
        return vae

    def loss(self, module: nn.Module, generator: torch.Generator, step: int) -> torch.Tensor:
        pictures = load_pictures(self.work)
        x = to_model(pictures[torch.randint(len(pictures), (BATCH,), generator=generator)])
        moments = module._encode(x.to(DTYPE)).float()
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
        out = module.decode(z.to(DTYPE), return_dict=False)[0].float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        edges = sum((out.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        sharpen = 0.1 if step < 0.3 * RECIPE.steps else 0.4
        return functional.l1_loss(out, x) + 0.5 * functional.mse_loss(out, x) + sharpen * edges + 3e-5 * kl


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Fold a shift and scale of the latents into the 1x1 convolutions beside them; the pictures stay the same.

    ``mean`` and ``deviation`` ``[4]`` are those of the latents as they are; afterwards each channel has mean 0, and all
    have the deviation that they had together, which is left to the VAE's scaling factor.
    """
    gain = deviation.square().mean().sqrt() / deviation
    before, after = vae.quant_conv, vae.post_quant_conv
    before.bias[:4] -= mean
    before.weight[:4] *= gain.view(-1, 1, 1, 1)
    before.bias[:4] *= gain
    before.bias[4:] += 2 * gain.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight /= gain.view(1, -1, 1, 1)


def to_model(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 ``[B, 64, 64, 3]`` to float32 in -1..1, ``[B, 3, 64, 64]``."""
    return pictures.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """The inverse of ``to_model``, rounded and clipped."""
    return ((pictures.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
