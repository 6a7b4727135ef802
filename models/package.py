"""Write the models in the folder layouts of diffusers and transformers, as float16 safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import train_blip
import train_diffusion
import train_scorer
import train_text
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from networks import new_scheduler
from safetensors.torch import save_file
from scenes import SIDE
from train_diffusion import standard_vae
from training import checkpoint, trained
from transformers import BlipForConditionalGeneration, CLIPTextModel
from vocabulary import save_blip_processor, save_clip_tokenizer


def _open_as_float32(path: Path) -> None:
    """Have transformers widen the weights on loading, as diffusers does, or the parts disagree in dtype."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def save_stable_diffusion(
    folder: Path, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, vae: AutoencoderKL
) -> None:
    """A StableDiffusionPipeline folder without a safety checker."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=save_clip_tokenizer(folder / "tokenizer"),
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    _open_as_float32(folder / "text_encoder" / "config.json")


def save_blip(folder: Path, model: BlipForConditionalGeneration) -> None:
    """A BlipForConditionalGeneration folder with its processor."""
    processor = save_blip_processor(folder, SIDE)
    model.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    _open_as_float32(folder / "config.json")
    # Published BLIP folders keep the image settings in a file of their own; write it too for readers that expect it.
    image = processor.image_processor.to_dict() | {"image_processor_type": "BlipImageProcessor"}
    keep = ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_processor_type")
    keep += ("image_std", "resample", "rescale_factor", "size")
    settings = {name: image[name] for name in keep} | {"size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def package(work: Path, out: Path) -> None:
    """Assemble what is trained so far into ``out/tiny`` and ``out/scorer``."""
    text = trained(train_text.Reader(work), train_text.RECIPE, work)["text"]
    unet = train_diffusion.trained_unet(work)
    save_stable_diffusion(out / "tiny" / "stable-diffusion", text, unet, standard_vae(work))
    if checkpoint(train_blip.CAPTIONS, work).exists():
        blip = trained(train_blip.Captioning(work), train_blip.CAPTIONS, work)
        save_blip(out / "tiny" / "blip", blip)
    scorer = trained(train_scorer.Reading(work), train_scorer.RECIPE, work)
    (out / "scorer").mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in scorer.state_dict().items()}
    save_file(weights, out / "scorer" / "scorer.safetensors")
