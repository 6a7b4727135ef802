"""The networks' shapes: Stable Diffusion 1.x and BLIP, scaled down, and the scorer.

Attention heads keep at least 16 channels, since smaller ones have no fused kernel on GPUs. Beware that in diffusers'
UNet ``attention_head_dim`` is the *number* of heads, as in Stable Diffusion 1.x's own configuration.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from scenes import ATTRIBUTES, SIDE
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerBase,
)
from vocabulary import TEXT_LENGTH

LATENT_SIDE = SIDE // 4
TEXT_WIDTH = 128
PATCH = 8  # pixels, side of a BLIP patch


def new_vae() -> AutoencoderKL:
    """64x64x3 pictures to 16x16x4 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )


def new_text_encoder(tokenizer: PreTrainedTokenizerBase) -> CLIPTextModel:
    """CLIP's text model: 3 layers, 4 heads of 32 channels."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """Three levels (16, 8, 4 latents a side); cross-attention at the lower two and in the middle."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.x's noise schedule; the network predicts v, which learns in far fewer samples than epsilon."""
    return DDIMScheduler(
        prediction_type="v_prediction",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def new_blip(tokenizer: PreTrainedTokenizerBase) -> BlipForConditionalGeneration:
    """BLIP: a ViT on 8x8 patches and a decoder, both with 4 heads of 32 channels."""
    width = 128
    decode, sep = tokenizer.convert_tokens_to_ids("[DEC]"), tokenizer.sep_token_id
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        initializer_range=0.02,  # BLIP's own default, 1e-10, is made for loading weights, not for learning
    )
    text = BlipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        encoder_hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=decode,
        eos_token_id=sep,
        sep_token_id=sep,
        pad_token_id=tokenizer.pad_token_id,
        label_smoothing=0.0,
    )
    model = BlipForConditionalGeneration(
        BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=width)
    )
    settings = {"bos_token_id": decode, "eos_token_id": sep, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config.update(**settings, max_length=TEXT_LENGTH)
    return model


class Scorer(nn.Module):
    """A small convolutional reader of attributes: pictures to logits, one head for each of ATTRIBUTES."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 96)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):  # 64 -> 4 pixels a side
            layers += [
                nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
                nn.GroupNorm(8, n_out),
                nn.ReLU(),
                nn.Conv2d(n_out, n_out, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(8, n_out),
                nn.ReLU(),
            ]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * widths[-1], 160), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(160, len(classes)) for name, classes in ATTRIBUTES.items()})

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures in -1..1, ``[B, 3, 64, 64]``, to logits ``{attribute: [B, classes]}``."""
        features = self.trunk(pictures)
        return {name: head(features) for name, head in self.heads.items()}


def plain_attention(model: nn.Module) -> None:
    """Use matrix products for attention: on CPUs the backward pass of the fused kernel is several times slower."""
    model.set_attn_processor(AttnProcessor())
