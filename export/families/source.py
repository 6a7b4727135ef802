"""A Stable Diffusion folder as diffusers saves it: what it declares, and why some cannot be exported.

Everything here reads JSON and file names only, so that a model that cannot be exported is refused at once. A
configuration is read as its own library reads it: what it leaves out is the default of the class, and what
StableDiffusionPipeline rewrites in old ones is rewritten here. (StableDiffusionXLPipeline rewrites nothing.)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from packaging.version import InvalidVersion, Version
from transformers import CLIPTextConfig
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from dnp.engine.errors import ExportError, SettingsError
from dnp.export.families.lora import Lora
from dnp.export.files import PICKLES, find_weights, read_json
from dnp.runtime.sampling.samplers import sampler_of
from dnp.runtime.sampling.schedule import NoiseSchedule, is_flow
from dnp.runtime.sampling.settings import KEYS, SCHEDULE_KEYS


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a pipeline, and what of it the UNet is given.

    Attributes:
        folder, tokenizer: the components' names.
        kind: its class in transformers.
        layer: which of its hidden states, from the end and without the final norm; None is the last one, normalised.
    """

    folder: str
    tokenizer: str
    kind: str
    layer: int | None = None


@dataclass(frozen=True)
class Family:
    """What a class of pipelines in diffusers does, where it is not in the configurations of its components.

    Attributes:
        name: what bundles of it are called.
        encoders: their hidden states lie beside one another in the text that the UNet attends to.
        added: the UNet's ``addition_embed_type``: None, or ``text_time``, the last encoder's pooled text and six sizes.
        float32_decoder: whether it heeds the VAE's ``force_upcast``.
        zeros: whether it has zeros for the empty negative prompt, unless ``model_index.json`` says otherwise.
        rewrites: whether it rewrites old configurations: ``sample_size``, ``steps_offset``, ``clip_sample``.
        size: the side of its latents where the UNet does not say.
    """

    name: str
    encoders: tuple[TextEncoder, ...]
    added: str | None = None
    float32_decoder: bool = False
    zeros: bool = False
    rewrites: bool = False
    size: int = 64


FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": Family(
        "stable-diffusion", (TextEncoder("text_encoder", "tokenizer", "CLIPTextModel"),), rewrites=True
    ),
    "StableDiffusionXLPipeline": Family(
        "stable-diffusion-xl",
        (
            TextEncoder("text_encoder", "tokenizer", "CLIPTextModel", -2),
            TextEncoder("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", -2),
        ),
        added="text_time",
        float32_decoder=True,
        zeros=True,
        size=128,
    ),
}
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
SIZES = 6  # numbers of the size conditioning: see ConditioningSpec
MAX_LATENTS = 64  # the least that a bundle allows; a larger model allows twice its own size

_MODELS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
_SINGLE_FILE = (
    "convert a single checkpoint file with diffusers first: StableDiffusionPipeline.from_single_file(FILE)"
    ".save_pretrained(FOLDER, safe_serialization=True)"
)

FALLBACK_SAMPLER = "ddim"  # where the folder's scheduler is not among the samplers

# component: {key: (the values that can be exported, what others mean)}. A missing key is the first value.
_EXPECTED: Mapping[str, Mapping[str, tuple[tuple[Any, ...], str]]] = {
    "text_encoder": {"use_attention_mask": ((None, False), "a text encoder that is given a mask")},
    "unet": {
        "class_embed_type": ((None,), "class embeddings"),
        "num_class_embeds": ((None,), "class embeddings"),
        "encoder_hid_dim_type": ((None,), "a projection of the text"),
        "encoder_hid_dim": ((None,), "a projection of the text"),
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
        configs: the configuration of each component, the defaults of its class filled in.
        variants: the weight variant of each component, ``"fp16"`` where only that one is present.
        channels: latent channels C.
        height, width: the model's own latent size.
        levels: resolutions that the UNet works at, each half of the one before.
        pixels: image pixels per latent and axis, f.
        length, dim: windows of L tokens of D channels make the text that the UNet attends to.
        pooled: channels of the pooled text, where the UNet takes it and the sizes.
        embedded: whether the UNet takes the guidance scale, as of some distilled models.
        zeros: whether the empty prompt is zeros.
        float32_decoder: whether the decoder is float32 in every precision.
        scaling: latents are multiplied by it after encoding, divided by it before decoding.
        schedule: the keys of the scheduler's configuration that a bundle keeps: those that count for some sampler.
        sampler: the one that gives what the folder's own scheduler does.
        notes: sentences on what was read in another way than it is written.
        loras: what is merged into the weights, in this order.
        methods: whether the step graph shall have what guidance methods need.
    """

    folder: Path
    family: Family
    configs: Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, str | None]
    channels: int
    height: int
    width: int
    levels: int
    pixels: int
    length: int
    dim: int
    pooled: int | None
    embedded: bool
    zeros: bool
    float32_decoder: bool
    scaling: float
    schedule: Mapping[str, Any]
    sampler: str
    notes: tuple[str, ...] = ()
    loras: tuple[Lora, ...] = ()
    methods: bool = False

    def latents_manifest(self) -> dict[str, int]:
        """The ``latents`` section of ``bundle.json``."""
        return {
            "channels": self.channels,
            "height": self.height,
            "width": self.width,
            "multiple": 1,
            "max_height": max(MAX_LATENTS, 2 * self.height),
            "max_width": max(MAX_LATENTS, 2 * self.width),
            "vae_scale_factor": self.pixels,
        }

    def conditioning_manifest(self) -> dict[str, Any]:
        """The ``conditioning`` section of ``bundle.json``, in the order of the UNet's arguments."""
        section: dict[str, Any] = {"embeddings": {"shape": ["tokens", self.dim], "source": "text"}}
        if self.pooled is not None:
            section["pooled"] = {"shape": [self.pooled], "source": "text"}
            section["sizes"] = {"shape": [SIZES], "source": "size"}
        return section

    def guidance_manifest(self) -> dict[str, Any]:
        """The ``guidance`` section of ``bundle.json``."""
        return {"roles": 3 if self.methods else 2, "methods": self.methods, "embedded": self.embedded}


def read_source(folder: Path) -> Source:
    """Read and check the declarations of ``folder``.

    Raises ExportError when it is no Stable Diffusion folder, is incomplete, holds pickled weights only,
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
    index = read_json(folder / "model_index.json")
    family = _check_index(index)
    configs = {
        **{encoder.folder: _text_config(folder / encoder.folder) for encoder in family.encoders},
        "unet": _with_defaults(diffusers.UNet2DConditionModel, read_json(folder / "unet" / "config.json")),
        "vae": _with_defaults(diffusers.AutoencoderKL, read_json(folder / "vae" / "config.json")),
    }
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    for component in configs:
        for key, (allowed, meaning) in _EXPECTED.get(component, _EXPECTED["text_encoder"]).items():
            value = configs[component].get(key, allowed[0])
            if value not in allowed:
                raise ExportError(f"{component}: {key} = {value!r} means {meaning}; this is not supported")
    stems = {name: "diffusion_pytorch_model" if name in _MODELS else "model" for name in configs}
    variants = {name: find_weights(folder / name, stem) for name, stem in stems.items()}
    try:
        return _interpret(folder, family, index, configs, scheduler, variants)
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{folder}: a configuration file is incomplete or damaged: {error!r}") from error


def _check_index(index: Mapping[str, Any]) -> Family:
    """The family of a ``model_index.json``. Raises ExportError for one that is not known, or has other components."""
    kind = index.get("_class_name")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise ExportError(
            f"the source is a {kind}; only {' and '.join(FAMILIES)} (text to image) can be exported, "
            "not inpainting, ControlNet or other pipelines"
        )
    components: dict[str, tuple[str, ...]] = {name: (model,) for name, model in _MODELS.items()}
    components |= {encoder.folder: (encoder.kind,) for encoder in family.encoders}
    components |= {encoder.tokenizer: TOKENIZERS for encoder in family.encoders}
    for component, classes in components.items():
        found = _class_of(index, component)
        if found not in classes:
            raise ExportError(f"model_index.json: {component} is {found!r}; it must be {' or '.join(classes)}")
    return family


def _class_of(index: Mapping[str, Any], component: str) -> Any:
    entry = index.get(component)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else entry


def _with_defaults(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` as diffusers' class ``kind`` takes it: what it leaves out has the value of the class's signature."""
    parameters = inspect.signature(kind.__init__).parameters.items()
    defaults = {name: parameter.default for name, parameter in parameters if parameter.default is not parameter.empty}
    return {**defaults, **config}


def _text_config(folder: Path) -> dict[str, Any]:
    """The text encoder's configuration as transformers reads it, nested in that of a whole CLIP too."""
    read_json(folder / "config.json")
    try:
        config: dict[str, Any] = CLIPTextConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except Exception as error:  # whatever transformers finds wrong with a configuration
        raise ExportError(f"{folder / 'config.json'}: the configuration is incomplete or damaged: {error}") from error
    return config


def _latent_size(family: Family, unet: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The UNet's ``sample_size`` as the family's pipeline takes it, and what to say of that."""
    size = unet["sample_size"] or family.size
    try:
        old = Version(Version(str(unet["_diffusers_version"])).base_version) < Version("0.9.0.dev0")
    except (KeyError, InvalidVersion):
        old = False
    if family.rewrites and old and isinstance(size, int) and size < 64:
        return 64, [
            f"the UNet's sample_size is taken as 64 instead of {size}, as StableDiffusionPipeline takes it in "
            "configurations from before diffusers 0.9"
        ]
    return size, []


def _read_scheduler(family: Family, kind: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], str, list[str]]:
    """What a bundle keeps of the scheduler's configuration, the sampler that it means, and what to say of it.

    The schedule's own keys are filled in with the defaults of the class, for they are the model's. The others are
    not: another sampler has defaults of its own.
    """
    scheduler = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    if scheduler is None:
        raise ExportError(f"model_index.json: scheduler is {kind!r}, which diffusers {diffusers.__version__} lacks")
    if not issubclass(scheduler, diffusers.SchedulerMixin) or "Inverse" in kind:
        raise ExportError(f"model_index.json: scheduler is {kind!r}, which is no sampler from noise to images")
    whole, notes = _with_defaults(scheduler, config), []
    if is_flow({**whole, "_class_name": kind}):
        raise ExportError(
            f"the scheduler, a {kind}, is one of flow matching, and a UNet of this family was trained otherwise; name "
            "the scheduler that the model was trained with, e.g. DDIMScheduler"
        )
    rewritten = {"steps_offset": 1, "clip_sample": False} if family.rewrites else {}
    for key, wanted in rewritten.items():
        if whole.get(key, wanted) != wanted:
            notes.append(
                f"the scheduler's {key} is taken as {wanted} instead of {whole[key]}, as StableDiffusionPipeline "
                "takes it"
            )
    named = (*SCHEDULE_KEYS, "clip_sample")  # what is clipped by default is clipped where the pipeline does not say
    config = {**{key: whole[key] for key in named if key in whole}, **config}
    config |= rewritten
    try:
        NoiseSchedule.from_config(config)
        sampler = sampler_of(kind, config)
    except SettingsError as error:
        raise ExportError(f"scheduler/scheduler_config.json: {error}") from error
    if sampler is None:
        sampler = FALLBACK_SAMPLER
        notes.append(f"the folder's {kind} is not among the samplers; {sampler} is the bundle's default instead")
    kept = {key: value for key, value in config.items() if key in KEYS and value not in (math.inf, -math.inf)}
    return kept, sampler, notes


def _interpret(
    folder: Path,
    family: Family,
    index: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    scheduler: Mapping[str, Any],
    variants: Mapping[str, str | None],
) -> Source:
    unet, vae = configs["unet"], configs["vae"]
    texts = [configs[encoder.folder] for encoder in family.encoders]
    channels, inputs = int(vae["latent_channels"]), int(unet["in_channels"])
    if inputs != channels or int(unet["out_channels"]) != channels:
        kind = {9: " (an inpainting model)", 8: " (an image-editing model)"}.get(inputs, "")
        raise ExportError(
            f"the UNet takes {inputs} channels{kind}, gives {unet['out_channels']}; the VAE has {channels}: "
            "only text-to-image models, where all three are equal, can be exported"
        )
    dim = sum(int(text["hidden_size"]) for text in texts)
    width = unet["cross_attention_dim"]
    if set(width if isinstance(width, list | tuple) else [width]) != {dim}:
        raise ExportError(f"the UNet expects text of {width} channels, the text encoder gives {dim}")
    pooled = _pooled(family, texts[-1], unet)
    lengths = [_length(folder / encoder.tokenizer) for encoder in family.encoders]
    length, positions = max(lengths), min(int(text["max_position_embeddings"]) for text in texts)
    if not 3 <= length <= positions:
        raise ExportError(
            f"the tokenizer's model_max_length is {length}, the text encoder has {positions} positions; "
            "set model_max_length in tokenizer/tokenizer_config.json to what the model was trained with"
        )
    if len(set(lengths)) > 1:
        raise ExportError(f"the tokenizers' model_max_length is not the same: {lengths}")
    size, notes = _latent_size(family, unet)
    height, width = (size, size) if isinstance(size, int) else (int(side) for side in size)
    kind = str(_class_of(index, "scheduler") or scheduler.get("_class_name"))
    schedule, sampler, said = _read_scheduler(family, kind, scheduler)
    return Source(
        folder=folder,
        family=family,
        configs=configs,
        variants=variants,
        channels=channels,
        height=height,
        width=width,
        levels=len(unet["block_out_channels"]),
        pixels=2 ** (len(vae["block_out_channels"]) - 1),
        length=length,
        dim=dim,
        pooled=pooled,
        embedded=unet["time_cond_proj_dim"] is not None,
        zeros=bool(index.get("force_zeros_for_empty_prompt", family.zeros)),
        float32_decoder=family.float32_decoder and bool(vae["force_upcast"]),
        scaling=float(vae["scaling_factor"]),
        schedule=schedule,
        sampler=sampler,
        notes=(*notes, *said),
    )


def _length(folder: Path) -> int:
    """Tokens of a window, as the tokenizer in ``folder`` says."""
    return int(read_json(folder / "tokenizer_config.json").get("model_max_length", VERY_LARGE_INTEGER))


def _pooled(family: Family, text: Mapping[str, Any], unet: Mapping[str, Any]) -> int | None:
    """The channels of the pooled text, of the last encoder's configuration ``text``, where the UNet takes it.

    Raises ExportError when the UNet takes another conditioning than the family's.
    """
    added = unet["addition_embed_type"]
    if added != family.added:
        raise ExportError(
            f"unet: addition_embed_type = {added!r} means added embeddings, {family.name} has {family.added!r}; "
            "this is not supported"
        )
    if added is None:
        return None
    pooled, takes = int(text["projection_dim"]), int(unet["projection_class_embeddings_input_dim"])
    if takes != pooled + SIZES * int(unet["addition_time_embed_dim"]):
        raise ExportError(
            f"the UNet takes {takes} channels of pooled text and sizes, which is not {pooled} of the text encoder and "
            f"{SIZES} sizes of {unet['addition_time_embed_dim']}"
        )
    return pooled
