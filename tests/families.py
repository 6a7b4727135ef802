"""Tiny models of every family that can be exported, of random weights, in diffusers' folders.

Weights are numbers that fp16 holds exactly. Heads have 16 channels, images 32 pixels, a latent is 4 × 4 of them.
"""

import json
import shutil

LENGTH = 16  # tokens of a window
DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def build(name, folder):
    """Write the model ``name``, a key of FAMILIES, to ``folder``."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(2)
        pipeline = FAMILIES[name]()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.half().float()
    pipeline.save_pretrained(folder)
    return folder


def copy_graphs(patch, report, names):
    """Have exports take the graphs called ``names`` from the bundle of ``report`` instead of making them."""
    from dnp.export import bundle

    ready = {record.name: record for record in report.graphs if record.name in names}
    real = {step: getattr(bundle, step) for step in ("write_graph", "expect", "finish_graph")}

    def write_graph(spec, folder):
        if spec.name not in ready:
            return real["write_graph"](spec, folder)
        file = ready[spec.name].manifest["file"]
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copy(report.path / file, folder / file)
        return None

    def expect(spec):
        return spec if spec.name in ready else real["expect"](spec)

    def finish_graph(expected, folder, written):
        return ready.get(expected.name) or real["finish_graph"](expected, folder, written)

    for step in (write_graph, expect, finish_graph):
        patch.setattr(bundle, step.__name__, step)


def stable_diffusion_1():
    tokenizer = make_tokenizer()
    return assemble(make_text(tokenizer), tokenizer, make_unet(), make_vae(), pndm())


def stable_diffusion_2():
    """v-prediction, OpenCLIP's activation, linear projections, a number of heads for each block; ``!`` pads."""
    from diffusers import DDIMScheduler

    tokenizer = make_tokenizer(pad="!")
    text = make_text(tokenizer, hidden_size=48, hidden_act="gelu", num_hidden_layers=3)
    unet = make_unet(cross_attention_dim=48, use_linear_projection=True)
    scheduler = DDIMScheduler(**DIFFUSION, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
    return assemble(text, tokenizer, unet, make_vae(), scheduler)


def bk_sdm():
    """As BK-SDM-small: no middle block."""
    tokenizer = make_tokenizer()
    return assemble(make_text(tokenizer), tokenizer, make_unet(mid_block_type=None), make_vae(), pndm())


def consistency():
    """As a latent consistency model: the guidance scale is an input of the UNet."""
    tokenizer = make_tokenizer()
    return assemble(make_text(tokenizer), tokenizer, make_unet(time_cond_proj_dim=24), make_vae(), pndm())


def stable_diffusion_xl(**changes):
    """Two text encoders, pooled text and sizes, ∅ as zeros."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModelWithProjection

    tokenizers = make_tokenizer(), make_tokenizer(pad="!")
    first = make_text(tokenizers[0])
    second = make_text(tokenizers[1], CLIPTextModelWithProjection, hidden_size=48, hidden_act="gelu", projection_dim=40)
    unet = make_unet(
        cross_attention_dim=80, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=88, use_linear_projection=True,
        **{"transformer_layers_per_block": (1, 2), **changes},
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=make_vae(scaling_factor=0.13025), text_encoder=first, text_encoder_2=second, tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1], unet=unet, scheduler=EulerDiscreteScheduler(**DIFFUSION, timestep_spacing="leading"),
        add_watermarker=False,
    )  # fmt: skip


def ssd():
    """As SSD-1B: another depth in every place of a block."""
    return stable_diffusion_xl(
        layers_per_block=2,
        transformer_layers_per_block=[1, [2, 1]],
        reverse_transformer_layers_per_block=[[1, 3, 1], 1],
    )


FAMILIES = {
    "sd1": stable_diffusion_1,
    "sd2": stable_diffusion_2,
    "sdxl": stable_diffusion_xl,
    "ssd": ssd,
    "bk-sdm": bk_sdm,
    "lcm": consistency,
}


def pndm():
    from diffusers import PNDMScheduler

    return PNDMScheduler(**DIFFUSION, skip_prk_steps=True)


def assemble(text_encoder, tokenizer, unet, vae, scheduler):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def make_tokenizer(pad=None):
    """A CLIP tokenizer of a few words; ``pad`` fills windows, the end token when it is None."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    scenes = ["a large red circle left of a small blue square", "a green star on a plain yellow background"]
    bytes_, end = sorted(pre_tokenizers.ByteLevel.alphabet()), "</w>"
    trained = FastTokenizer(models.BPE(end_of_word_suffix=end))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trained.train_from_iterator(scenes, trainers.BpeTrainer(end_of_word_suffix=end, show_progress=False))
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    words = [*bytes_, *(byte + end for byte in bytes_), *("".join(pair) for pair in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    special = {} if pad is None else {"pad_token": pad}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH, **special)


def make_text(tokenizer, kind=None, **changes):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": LENGTH, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    return (kind or CLIPTextModel)(CLIPTextConfig(**{**config, **changes}))


def make_unet(**changes):
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
        "cross_attention_dim": 32, "attention_head_dim": (2, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**{**config, **changes})


def make_vae(**changes):
    from diffusers import AutoencoderKL

    config = {
        "block_out_channels": (16, 16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 32,
        "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    }  # fmt: skip
    return AutoencoderKL(**{**config, **changes})
