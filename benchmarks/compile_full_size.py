"""Stable Diffusion 1.5 and BLIP base at full size, random weights: exported in fp16 and compiled, with no GPU.

``python benchmarks/compile_full_size.py --work FOLDER`` takes some 15 GB of disk, 14 GB of memory and half an hour on
two cores. What is there in FOLDER is not made again. Each graph is compiled in a process of its own, so that the peak
memory is its own, too.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

MODELS = Path(__file__).parents[1] / "models" / "tiny"
GRAPHS = ("encode_text", "denoise", "decode_latents", "encode_image", "caption_step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="models, bundle and plans")
    parser.add_argument("--sm", default="89", help="architectures, as for `dnp build`")
    parser.add_argument("--batch", default="1:8", help="batches, as for `dnp build`")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compile-full-size.json")
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    if not (work / "blip").exists():
        make_models(work)
    if not (work / "bundle").exists():
        run("export", work / "sd15", work / "bundle", "--captioner", work / "blip", "--precision", "fp16")
    rows = []
    for name in GRAPHS:
        engines = work / "engines" / name
        sizes = ["--sm", chosen.sm, "--batch", chosen.batch, "--engines", engines, "--graph", name]
        (plan,) = json.loads(run("build", work / "bundle", *sizes, "--json"))["plans"]
        rows.append(plan)
        print(line(plan), flush=True)
    report = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": processor(),
        "python": platform.python_version(),
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
        "plans": [{"spec": plan["spec"], "facts": plan["facts"], "plan_bytes": plan["bytes"]} for plan in rows],
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {chosen.out}")


def make_models(work: Path) -> None:
    """The published architectures with random weights, and the tokenizers of the default model."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import BlipConfig, BlipForConditionalGeneration, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    StableDiffusionPipeline(
        vae.half(), text.half(), tokenizer, unet.half(), scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(work / "sd15")  # fmt: skip
    del text, unet, vae
    tiny = json.loads((MODELS / "blip" / "config.json").read_text())["text_config"]
    tokens = {name: tiny[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")}
    config = BlipConfig(
        text_config={"vocab_size": 30524, "encoder_hidden_size": 768, **tokens},
        vision_config={"image_size": 384},
    )
    BlipForConditionalGeneration(config).half().save_pretrained(work / "blip.partial")
    for path in (MODELS / "blip").iterdir():
        if path.name not in ("config.json", "model.safetensors", "generation_config.json"):
            text_of = path.read_text().replace('"height": 64', '"height": 384').replace('"width": 64', '"width": 384')
            (work / "blip.partial" / path.name).write_text(text_of)
    (work / "blip.partial").rename(work / "blip")


def run(*arguments: object) -> str:
    """The ``dnp`` of this environment; its messages are shown, its output returned."""
    command = [str(Path(sys.executable).with_name("dnp")), *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def line(plan: dict) -> str:
    facts = plan["facts"]
    return (
        f"{plan['spec']['graph']:<15} {facts['seconds']:6.1f} s, plan {plan['bytes'] / 1e6:7.1f} MB, weights "
        f"{facts['weights_bytes'] / 1e6:7.1f} MB, activations {facts['activation_bytes'] / 1e6:7.1f} MB, peak memory "
        f"{facts['peak_memory_bytes'] / 1e9:.2f} GB"
    )


def processor() -> str:
    from dnp.engine.processor import core_count, processor_name

    return f"{processor_name()}, {core_count()} cores"


if __name__ == "__main__":
    main()
