"""Train the captioner in two stages: the vision tower with dense supervision, then the whole on captions.

A captioner that starts from nothing learns colours and little else, since a caption says too indirectly where to look.
So each patch first learns to tell which object it shows, and the class token to tell the whole scene, through linear
heads that are thrown away.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import train_diffusion
import train_vae
from networks import new_blip
from pictures import load_labels, load_patches, load_pictures
from scenes import COLOUR_NAMES, SHAPES, SIDE, SIZE_NAMES, from_labels
from torch import nn
from torch.nn import functional
from tqdm import trange
from train_text import attribute_heads, attribute_loss
from training import DTYPE, Recipe, trained
from vocabulary import save_blip_processor

VISION = Recipe("blip_vision", steps=1500, rate=1.5e-3, average=0.99)
CAPTIONS = Recipe("blip", steps=900, rate=1e-3, average=0.995)
BATCH = 64
DECODED = 12_000  # pictures that went through the VAE
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@torch.inference_mode()
def decode_some(work: Path) -> None:
    """Decode the first latents, half of them noised or smoothed, to uint8: what the captioner meets in practice."""
    path = work / "decoded.npy"
    if path.exists():
        return
    latents, vae = train_diffusion.load_latents(work), train_diffusion.standard_vae(work)
    scale = vae.config.scaling_factor
    vae.to(DTYPE)
    generator, chunk = torch.Generator().manual_seed(0), 100
    pictures = np.empty((DECODED, SIDE, SIDE, 3), np.uint8)
    for at in trange(0, DECODED, chunk, desc="decode", mininterval=5):
        z = latents[at : at + chunk].float()
        smooth = functional.avg_pool2d(functional.pad(z, (1, 1, 1, 1), mode="replicate"), 3, 1)
        blend, noise = torch.rand(2, chunk, 1, 1, 1, generator=generator) * torch.tensor([0.8, 0.5]).view(2, 1, 1, 1, 1)
        odd = torch.rand(chunk, 1, 1, 1, generator=generator) < 0.5
        worn = z.lerp(smooth, blend) + noise * torch.randn(z.shape, generator=generator)
        z = torch.where(odd, worn, z) / scale
        pictures[at : at + chunk] = train_vae.to_uint8(vae.decode(z.to(DTYPE), return_dict=False)[0]).numpy()
    part = path.with_suffix(".part.npy")
    np.save(part, pictures)
    part.replace(path)


@cache
def load_decoded(work: Path) -> torch.Tensor:
    """What ``decode_some`` wrote, uint8 ``[DECODED, 64, 64, 3]``."""
    return torch.from_numpy(np.load(work / "decoded.npy", mmap_mode="c"))


@cache
def load_targets(work: Path) -> torch.Tensor:
    """Canonical captions as the decoder's tokens, ``[DEC] ... [SEP]`` padded, int64 ``[N, longest]``."""
    tokenizer = save_blip_processor(work / "blip_processor", SIDE).tokenizer
    texts = [from_labels(row).caption() for row in load_labels(work).numpy()]
    ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    ids[:, 0] = tokenizer.bos_token_id
    return ids


def draw(work: Path, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and normalised pictures ``[B, 3, 64, 64]``: half drawn, half decoded, all a little noisy."""
    decoded, drawn = load_decoded(work), load_pictures(work)
    half = BATCH // 2
    rows = torch.cat([torch.randint(len(some), (half,), generator=generator) for some in (drawn, decoded)])
    pictures = torch.cat([drawn[rows[:half]], decoded[rows[half:]]]).permute(0, 3, 1, 2).contiguous().float() / 255
    pictures += 0.03 * torch.randn(pictures.shape, generator=generator)
    return rows, ((pictures - MEAN) / DEVIATION).to(DTYPE)


class Looking:
    """The vision tower alone."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def build(self) -> nn.Module:
        blip = new_blip(save_blip_processor(self.work / "blip_processor", SIDE).tokenizer)
        width = blip.config.vision_config.hidden_size
        patch = {"slot": 3, "size": len(SIZE_NAMES), "colour": len(COLOUR_NAMES), "shape": len(SHAPES)}
        return nn.ModuleDict(
            {
                "vision": blip.vision_model,
                "scene": attribute_heads(width),
                "patch": nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in patch.items()}),
            }
        )

    def loss(self, module: nn.Module, generator: torch.Generator, step: int) -> torch.Tensor:
        rows, pictures = draw(self.work, generator)
        states = module["vision"](pictures).last_hidden_state  # [B, 1 + 64, width]
        labels, slots = load_labels(self.work)[rows], load_patches(self.work)[rows].flatten(1).long()
        things = labels[:, 3:].view(-1, 2, 3)  # [B, object, (size, colour, shape)]
        covering = (slots - 1).clamp(min=0).unsqueeze(-1).expand(-1, -1, 3)  # which object to look up
        shown = torch.where(slots.unsqueeze(-1) > 0, things.gather(1, covering), -1)
        targets = torch.cat([slots[..., None], shown], dim=-1)  # [B, 64, 4]
        patch = [
            functional.cross_entropy(
                head(states[:, 1:]).float().flatten(0, 1), targets[..., n].flatten(), ignore_index=-1
            )
            for n, head in enumerate(module["patch"].values())
        ]
        return attribute_loss(module["scene"], states[:, 0], labels) + torch.stack(patch).mean()


class Captioning:
    """Vision tower and decoder together, on canonical captions."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def build(self) -> nn.Module:
        blip = new_blip(save_blip_processor(self.work / "blip_processor", SIDE).tokenizer)
        vision = trained(Looking(self.work), VISION, self.work)["vision"]
        blip.vision_model.load_state_dict(vision.state_dict())
        return blip

    def loss(self, module: nn.Module, generator: torch.Generator, step: int) -> torch.Tensor:
        rows, pictures = draw(self.work, generator)
        ids = load_targets(self.work)[rows]
        pad = module.config.text_config.pad_token_id
        seen = module.vision_model(pictures).last_hidden_state
        logits = module.text_decoder(
            input_ids=ids[:, :-1],
            attention_mask=(ids[:, :-1] != pad).long(),
            encoder_hidden_states=seen,
        ).logits.float()
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad)
