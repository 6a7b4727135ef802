"""A Stable Diffusion 1.x folder as diffusers saves it: what it declares, and why some cannot be exported.

Everything here reads JSON and file names only, so that a model that cannot be exported is refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnp.engine.errors import ExportError, SettingsError
from dnp.export.families.lora import Lora
from dnp.export.files import PICKLES, find_weights, read_json
from dnp.runtime.sampling.schedule import NoiseSchedule

PIPELINE = "StableDiffusionPipeline"
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "steps_offset",
    "set_alpha_to_one",
    "timestep_spacing",
    "rescale_betas_zero_snr",
)
SD1_SCALING = 0.18215  # what diffusers assumes; the published Stable Diffusion 1.x VAEs do not say
MAX_LATENTS = 64  # the least that a bundle allows; a larger model allows twice its own size

_WEIGHTS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
_SINGLE_FILE = (
    "convert a single checkpoint file with diffusers first: StableDiffusionPipeline.from_single_file(FILE)"
    ".save_pretrained(FOLDER, safe_serialization=True)"
)

# component: {key: (the values that can be exported, what others mean)}. A missing key is the first value.
_EXPECTED: Mapping[str, Mapping[str, tuple[tuple[Any, ...], str]]] = {
    "text_encoder": {"use_attention_mask": ((None, False), "a text encoder that is given a mask")},
    "unet": {
        "class_embed_type": ((None,), "class embeddings"),
        "num_class_embeds": ((None,), "class embeddings"),
        "addition_embed_type": ((None,), "added embeddings, as Stable Diffusion XL has them"),
        "encoder_hid_dim_type": ((None,), "a projection of the text"),
        "encoder_hid_dim": ((None,), "a projection of the text"),
        "time_cond_proj_dim": ((None,), "guidance as a network input, as distilled models have it"),
        "attention_type": (("default",), "grounded attention (GLIGEN)"),
    },
    "vae": {
        "out_channels": ((3,), "images that are not RGB"),
        "shift_factor": ((None, 0, 0.0), "shifted latents"),
        "latents_mean": ((None,), "latents normalised by channel"),
        "latents_std": ((None,), "latents normalised by channel"),
    },
}


@dataclass(frozen=True)
class Source:
    """What a source folder declares, checked.

    Attributes:
        configs: the JSON configuration of each component.
        variants: the weight variant of each component, ``"fp16"`` where only that one is present.
        channels: latent channels C.
        height, width: the model's own latent size.
        multiple: latent sizes are multiples of it, for the UNet halves them that often.
        pixels: image pixels per latent and axis, f.
        length, dim: L tokens of D channels make the text context.
        vocabulary: how many token ids there are.
        scaling: latents are multiplied by it after encoding, divided by it before decoding.
        schedule: the keys of the scheduler's configuration that a bundle keeps.
        loras: what is merged into the weights, in this order.
    """

    folder: Path
    configs: Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, str | None]
    channels: int
    height: int
    width: int
    multiple: int
    pixels: int
    length: int
    dim: int
    vocabulary: int
    scaling: float
    schedule: Mapping[str, Any]
    loras: tuple[Lora, ...] = ()

    def latents_manifest(self) -> dict[str, int]:
        """The ``latents`` section of ``bundle.json``."""
        return {
            "channels": self.channels,
            "height": self.height,
            "width": self.width,
            "multiple": self.multiple,
            "max_height": _most(self.height, self.multiple),
            "max_width": _most(self.width, self.multiple),
            "pixels": self.pixels,
        }


def read_source(folder: Path) -> Source:
    """Read and check the declarations of ``folder``.

    Raises ExportError when it is no Stable Diffusion 1.x folder, is incomplete, holds pickled weights only,
    or is of a kind that the five graphs do not cover.
    """
    if folder.is_file():
        raise ExportError(f"{folder} is a file, not a diffusers folder; {_SINGLE_FILE}")
    if not folder.is_dir():
        raise ExportError(f"{folder} does not exist; give a folder that diffusers' save_pretrained wrote")
    if not (folder / "model_index.json").is_file():
        loose = [f.name for pattern in ("*.safetensors", *PICKLES) for f in folder.glob(pattern)]
        hint = f"it holds {loose[0]}: {_SINGLE_FILE}" if loose else "give a folder that save_pretrained wrote"
        raise ExportError(f"{folder} has no model_index.json; {hint}")
    _check_index(read_json(folder / "model_index.json"))
    configs = {name: read_json(folder / name / "config.json") for name in _WEIGHTS}
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    for component, expected in _EXPECTED.items():
        for key, (allowed, meaning) in expected.items():
            value = configs[component].get(key, allowed[0])
            if value not in allowed:
                raise ExportError(f"{component}: {key} = {value!r} means {meaning}; this is not supported")
    variants = {name: find_weights(folder / name, stem) for name, stem in _WEIGHTS.items()}
    try:
        return _interpret(folder, configs, variants)
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{folder}: a configuration file is incomplete or damaged: {error!r}") from error


def _check_index(index: Mapping[str, Any]) -> None:
    kind = index.get("_class_name")
    if kind != PIPELINE:
        raise ExportError(
            f"the source is a {kind}; only {PIPELINE} (Stable Diffusion 1.x, text to image) can be exported, "
            "not XL, inpainting, ControlNet or other pipelines"
        )
    for component, classes in COMPONENTS.items():
        entry = index.get(component)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if found not in classes:
            raise ExportError(f"model_index.json: {component} is {found!r}; it must be {' or '.join(classes)}")


def _interpret(folder: Path, configs: Mapping[str, Mapping[str, Any]], variants: Mapping[str, str | None]) -> Source:
    text, unet, vae, scheduler = (configs[n] for n in ("text_encoder", "unet", "vae", "scheduler"))
    tokenizer = read_json(folder / "tokenizer" / "tokenizer_config.json")
    channels, inputs = int(vae.get("latent_channels", 4)), int(unet["in_channels"])
    if inputs != channels or int(unet["out_channels"]) != channels:
        kind = {9: " (an inpainting model)", 8: " (an image-editing model)"}.get(inputs, "")
        raise ExportError(
            f"the UNet takes {inputs} channels{kind}, gives {unet['out_channels']}; the VAE has {channels}: "
            "only text-to-image models, where all three are equal, can be exported"
        )
    dim = int(text["hidden_size"])
    if unet["cross_attention_dim"] != dim:
        raise ExportError(
            f"the UNet expects text of {unet['cross_attention_dim']} channels, the text encoder gives {dim}"
        )
    length, positions = int(tokenizer["model_max_length"]), int(text["max_position_embeddings"])
    if not 3 <= length <= positions:
        raise ExportError(
            f"the tokenizer's model_max_length is {length}, the text encoder has {positions} positions; "
            "set model_max_length in tokenizer/tokenizer_config.json to what the model was trained with"
        )
    size = unet.get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else (int(side) for side in size)
    multiple = 2 ** (len(unet["block_out_channels"]) - 1)
    if height % multiple or width % multiple:
        raise ExportError(f"the UNet's sample_size {size} is no multiple of {multiple}, its downsampling")
    try:
        NoiseSchedule.from_config(scheduler)  # the whole of it: what the samplers would refuse must not be dropped
    except SettingsError as error:
        raise ExportError(f"scheduler/scheduler_config.json: {error}") from error
    schedule = {key: scheduler[key] for key in SCHEDULE_KEYS if scheduler.get(key) is not None}
    schedule.setdefault("num_train_timesteps", 1000)
    schedule.setdefault("prediction_type", "epsilon")
    return Source(
        folder=folder,
        configs=configs,
        variants=variants,
        channels=channels,
        height=height,
        width=width,
        multiple=multiple,
        pixels=2 ** (len(vae["block_out_channels"]) - 1),
        length=length,
        dim=dim,
        vocabulary=int(text["vocab_size"]),
        scaling=float(vae.get("scaling_factor", SD1_SCALING)),
        schedule=schedule,
    )


def _most(size: int, multiple: int) -> int:
    most = max(MAX_LATENTS, 2 * size)
    return most - most % multiple
