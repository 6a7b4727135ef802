"""Stable Diffusion 1.5, 2.1 and XL, and BLIP base, at full size with random weights.

``python benchmarks/random_models.py FOLDER NAME...`` writes ``FOLDER/NAME`` in the formats of diffusers and
transformers. Names are ``sd15``, ``sd21``, ``sdxl`` and ``blip``; ``sd15`` and ``blip`` when none is given. The
tokenizers are those of the default model. What a network computes takes as long whatever its weights are, so nothing
has to be downloaded.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TINY = Path(__file__).parents[1] / "models" / "tiny"
UNSAID = -30.0  # added to the logit of a word that the tokenizer does not have, so that every caption has words

# The published Stable Diffusion 1.5 names PNDM, on the same schedule; with DDIM every engine starts from one sampler.
NOISE: Mapping[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
}  # fmt: skip


def make_models(work: Path, names: Sequence[str]) -> None:
    """The published architectures in ``work``, weights of a fixed seed in fp16; each complete or not there.

    Weights are made in fp16: a model takes the memory of what is written.
    """
    import torch

    for name in names:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float16)
        try:
            MODELS[name](work / f"{name}.partial")
        finally:
            torch.set_default_dtype(torch.float32)
        shutil.rmtree(work / name, ignore_errors=True)
        (work / f"{name}.partial").rename(work / name)


def make_sd15(folder: Path) -> None:
    """Stable Diffusion 1.5."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    scheduler = DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False)
    _save(folder, [_text(768, 12)], unet, _vae(512), scheduler)


def make_sd21(folder: Path) -> None:
    """Stable Diffusion 2.1 for 768x768 pixels: v-prediction, OpenCLIP without its last layer."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True,
        upcast_attention=True,
    )  # fmt: skip
    scheduler = DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
    _save(folder, [_text(1024, 23, hidden_act="gelu")], unet, _vae(768), scheduler)


def make_sdxl(folder: Path) -> None:
    """Stable Diffusion XL base."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=128, cross_attention_dim=2048, attention_head_dim=[5, 10, 20], use_linear_projection=True,
        block_out_channels=(320, 640, 1280), transformer_layers_per_block=[1, 2, 10],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    texts = [_text(768, 12), _text(1280, 32, hidden_act="gelu", projection_dim=1280)]
    vae = _vae(1024, scaling_factor=0.13025, force_upcast=True)
    _save(folder, texts, unet, vae, EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"))


def make_blip(folder: Path) -> None:
    """BLIP base."""
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration

    tiny = json.loads((TINY / "blip" / "config.json").read_text())["text_config"]
    tokens = {name: tiny[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")}
    config = BlipConfig(
        text_config={"vocab_size": 30524, "encoder_hidden_size": 768, **tokens},
        vision_config={"image_size": 384},
    )
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[tiny["vocab_size"] :] = UNSAID
    model.save_pretrained(folder)
    for path in (TINY / "blip").iterdir():
        if path.name not in ("config.json", "model.safetensors", "generation_config.json"):
            text_of = path.read_text().replace('"height": 64', '"height": 384').replace('"width": 64', '"width": 384')
            (folder / path.name).write_text(text_of)


MODELS: Mapping[str, Callable[[Path], None]] = {
    "sd15": make_sd15,
    "sd21": make_sd21,
    "sdxl": make_sdxl,
    "blip": make_blip,
}


def _text(width: int, layers: int, **changes: Any) -> Any:
    """A text encoder of heads of 64 channels; the last one of XL projects what it pools."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ids = _tokenizer()
    kind = CLIPTextModelWithProjection if "projection_dim" in changes else CLIPTextModel
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=77, bos_token_id=ids.bos_token_id,
        eos_token_id=ids.eos_token_id, pad_token_id=ids.eos_token_id, **changes,
    )  # fmt: skip
    return kind(config)


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TINY / "stable-diffusion" / "tokenizer", model_max_length=77)


def _vae(size: int, **changes: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=size,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **changes,
    )  # fmt: skip


def _save(folder: Path, texts: Sequence[Any], unet: Any, vae: Any, scheduler: Any) -> None:
    """Write a folder of the pipeline that has as many text encoders."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if len(texts) == 1:
        pipeline: Any = StableDiffusionPipeline(
            vae, texts[0], _tokenizer(), unet, scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    else:
        pipeline = StableDiffusionXLPipeline(
            vae, *texts, _tokenizer(), _tokenizer(), unet, scheduler, add_watermarker=False
        )
    pipeline.save_pretrained(folder)
    for tokenizer in folder.glob("tokenizer*"):
        for name in ("vocab.json", "merges.txt"):  # what transformers 4 reads, and transformers 5 no longer writes
            shutil.copy2(TINY / "stable-diffusion" / "tokenizer" / name, tokenizer)


if __name__ == "__main__":
    make_models(Path(sys.argv[1]), sys.argv[2:] or ("sd15", "blip"))
