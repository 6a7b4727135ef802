"""Stable Diffusion 1.5 and BLIP base at full size with random weights, and the tokenizers of the default model.

``python benchmarks/random_models.py FOLDER`` writes ``FOLDER/sd15`` and ``FOLDER/blip`` in the formats of diffusers and
transformers. What a network computes takes as long whatever its weights are, so nothing has to be downloaded.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

MODELS = Path(__file__).parents[1] / "models" / "tiny"
UNSAID = -30.0  # added to the logit of a word that the tokenizer does not have, so that every caption has words


def make_models(work: Path) -> None:
    """The published architectures, weights of a fixed seed that fp16 holds exactly, saved as fp16."""
    make_diffusion(work)
    make_captioner(work)


def make_diffusion(work: Path) -> None:
    """``work/sd15``, a diffusers folder of Stable Diffusion 1.5; complete or not there."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(MODELS / "stable-diffusion" / "tokenizer", model_max_length=77)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=77, pad_token_id=tokenizer.eos_token_id, **special,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    # The published folder names PNDM, on the same schedule; with DDIM every engine starts from one sampler.
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae.half(), text.half(), tokenizer, unet.half(), scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(work / "sd15.partial")  # fmt: skip
    for name in ("vocab.json", "merges.txt"):  # what transformers 4 reads, and transformers 5 no longer writes
        shutil.copy2(MODELS / "stable-diffusion" / "tokenizer" / name, work / "sd15.partial" / "tokenizer")
    _finish(work / "sd15")


def make_captioner(work: Path) -> None:
    """``work/blip``, a transformers folder of BLIP base; complete or not there."""
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration

    tiny = json.loads((MODELS / "blip" / "config.json").read_text())["text_config"]
    tokens = {name: tiny[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")}
    config = BlipConfig(
        text_config={"vocab_size": 30524, "encoder_hidden_size": 768, **tokens},
        vision_config={"image_size": 384},
    )
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[tiny["vocab_size"] :] = UNSAID
    model.half().save_pretrained(work / "blip.partial")
    for path in (MODELS / "blip").iterdir():
        if path.name not in ("config.json", "model.safetensors", "generation_config.json"):
            text_of = path.read_text().replace('"height": 64', '"height": 384').replace('"width": 64', '"width": 384')
            (work / "blip.partial" / path.name).write_text(text_of)
    _finish(work / "blip")


def _finish(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(f"{folder.name}.partial").rename(folder)


if __name__ == "__main__":
    make_models(Path(sys.argv[1]))
