"""What a LoRA file says: each pair of tensors, with the factor that its own format defines.

A file is used whole, or refused with a sentence:

    kohya       ``lora_unet_….lora_down.weight``, ``.lora_up.weight``, ``.alpha``; linear and convolution   α/r, or 1
    peft        ``….lora_A.weight``, ``.lora_B.weight``; α, ranks and rsLoRA in the header   α/r or α/√r, or 1
    diffusers   ``….lora.down.weight``, ``….lora_linear_layer.down.weight``, ``….processor.to_q_lora.down.weight``   1
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnp.engine.errors import ExportError
from dnp.export.files import check_content

# How a key begins, and what it belongs to. kohya's text encoders count from 1 where there are two.
_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "diffusion_model.": "unet",
    "lora_transformer_": "transformer",  # of another family
    "transformer.": "transformer",
}
_PEFT_MODEL = "base_model.model."  # before each name that peft itself writes
_TEXT_MODEL = ("text_model.", "encoder.layers.")  # so begins what names a text encoder's layer without saying so

_PAIR = re.compile(r"(.+?)\.lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default)?\.weight")
_ALPHA = re.compile(r"(.+?)(?:\.lora)?\.alpha")
_PROCESSOR = re.compile(r"(?:\.processor)?\.(to_(?:q|k|v|out))_lora\.")  # before diffusers 0.22

# What is no plain LoRA, by a part of its keys.
_KINDS = (
    (r"\.(dora_scale|lora_magnitude_vector)\b", "a DoRA"),
    (r"\bhada_", "a LoHa"),
    (r"\blokr_", "a LoKr"),
    (r"\b(oft_|boft_)", "an OFT"),
    (r"\.[ab][12]\.weight$", "a GLoRA"),
    (r"\.lora_mid\.", "a LoCon with a Tucker core"),
    (r"\.(diff|diff_b|w_norm|b_norm|set_weight)$", "a file with full differences of weights"),
    (r"\.on_input$", "an (IA)³"),
    (r"\b(vera_lambda|ia3_l|lora_embedding_|trainable_tokens)", "a peft adapter of another kind"),
    (r"\.lora[._](up|B)(\.default)?\.bias$", "a LoRA with biases"),
    (r"^(emb_params|string_to_param|bundle_emb|clip_l$|clip_g$)", "a textual inversion"),
)

# Settings of peft that change no weight once it is trained. Others must be peft's own defaults.
_TRAINING = frozenset(
    {
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
        "layers_to_transform", "layers_pattern", "lora_dropout", "inference_mode", "base_model_name_or_path",
        "revision", "task_type", "peft_type", "peft_version", "auto_mapping", "ensure_weight_tying",
    }
)  # fmt: skip
_KEEPS_WEIGHTS = (True, False, "gaussian", "orthogonal", "eva")  # of init_lora_weights; others change W as they begin


@dataclass(frozen=True)
class Change:
    """What a file says of one layer: ΔW = factor·B·A.

    Attributes:
        layer: the layer's name in the file, without what says the component.
        key: one of its keys, for messages.
        down, up: A ``[r, …]`` and B ``[out, r, …]``.
    """

    layer: str
    key: str
    down: Any
    up: Any
    factor: float

    def fits(self, weight: Any) -> bool:
        """Whether ΔW has the shape of ``weight``; a linear layer and a 1×1 convolution are the same."""
        rank, out = self.down.shape[0], weight.shape[0]
        return _trim(self.down.shape) == _trim((rank, *weight.shape[1:])) and _trim(self.up.shape) == _trim((out, rank))

    def added_to(self, weight: Any) -> Any:
        """ΔW in float32, of the shape of ``weight``."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.factor * product.reshape(weight.shape)


def read_changes(file: Path) -> dict[str, list[Change]]:
    """What the file changes in each component. Raises ExportError unless every key has a known meaning."""
    state, header = _load(file)
    parts: dict[tuple[str, str], dict[str, str]] = {}
    unknown = []
    for key in state:
        component, name = _split(key)
        name = _PROCESSOR.sub(r".\1.lora.", name)
        if pair := _PAIR.fullmatch(name):
            part = {"A": "down", "B": "up"}.get(pair[2], pair[2])
        elif pair := _ALPHA.fullmatch(name):
            part = "alpha"
        else:
            unknown.append(key)
            continue
        if parts.setdefault((component, pair[1]), {}).setdefault(part, key) != key:
            raise ExportError(f"{file} names one tensor twice, as {key!r} and otherwise")
    if unknown:
        raise ExportError(f"{file} is {_kind(state, unknown)}")
    if not parts:
        raise ExportError(f"{file} holds no tensors; download it again")
    if alone := [key for found in parts.values() for key in found.values() if not {"down", "up"} <= {*found}]:
        raise ExportError(f"{file} is not complete, {some(alone)} have no counterpart; download it again")
    settings = _settings(file, header, state)
    for component, said in settings.items():
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(said.get(name) or {}, dict):
                raise ExportError(f"{file}: the {name} of its settings is {said[name]!r}, not numbers by layer")
        for pattern in [*(said.get("rank_pattern") or {}), *(said.get("alpha_pattern") or {})]:
            if not any(_names(pattern, layer) for part, layer in parts if part == component):
                raise ExportError(f"{file} has settings for {pattern!r} in the {component}, but no such layer")
    changes: dict[str, list[Change]] = {}
    for (component, layer), keys in parts.items():
        down, up = state[keys["down"]], state[keys["up"]]
        if not (down.is_floating_point() and up.is_floating_point() and down.ndim > 1 and up.ndim > 1):
            raise ExportError(f"{file}: {keys['down']!r} and its pair are no matrices of floats; download it again")
        alpha = state[keys["alpha"]] if "alpha" in keys else None
        factor = _factor(file, keys["down"], layer, down.shape[0], alpha, settings.get(component))
        changes.setdefault(component, []).append(Change(layer, keys["down"], down, up, factor))
    return changes


def _load(file: Path) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The tensors and the header of a safetensors file. Raises ExportError, also for NaN and infinity."""
    from safetensors import safe_open

    if file.suffix != ".safetensors":
        raise ExportError(f"{file} is no .safetensors file; pickle is never loaded, it can run any code")
    if not file.is_file():
        raise ExportError(f"{file} does not exist; name the LoRA's .safetensors file")
    check_content(file)
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  it is no mapping
    except Exception as error:  # safetensors has one class for a damaged file, the system others
        raise ExportError(f"{file} cannot be read as safetensors: {error}") from error
    if broken := [key for key, tensor in state.items() if not tensor.float().isfinite().all()]:
        raise ExportError(f"{file} holds NaN or infinity in {some(broken)}; its training failed, no precision helps")
    return state, header


def _split(key: str) -> tuple[str, str]:
    """The component that a key belongs to, and the rest of it. Files from before diffusers 0.18 say no component."""
    for prefix, component in _PREFIXES.items():
        if key.startswith(prefix):
            return component, key.removeprefix(prefix).removeprefix(_PEFT_MODEL)
    name = key.removeprefix(_PEFT_MODEL)
    return "text_encoder" if name.startswith(_TEXT_MODEL) else "unet", name


def _kind(state: Iterable[str], unknown: list[str]) -> str:
    """What a file is that holds keys of no plain LoRA, as a sentence's end."""
    for pattern, kind in _KINDS:
        if found := [key for key in state if re.search(pattern, key)]:
            return (
                f"{kind} (its keys: {some(found)}), and only plain LoRAs can be merged; merge it with the program "
                "that made it, and export the model that this gives"
            )
    return f"no LoRA for Stable Diffusion that is known: {some(unknown)} mean nothing here"


def _settings(file: Path, header: Mapping[str, str], keys: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """peft's settings of each component: from the header that diffusers writes, or from the file that peft does."""
    found: dict[str, dict[str, Any]] = {}
    bare = [key for key in keys if key.startswith(_PEFT_MODEL)]
    try:
        for key, value in json.loads(header.get("lora_adapter_metadata", "{}")).items():
            component, point, setting = key.partition(".")
            if not point:
                raise ValueError(f"{key!r} does not say of which component")
            found.setdefault(component, {})[setting] = value
        if bare:
            component, _ = _split(bare[0])
            found[component] = json.loads((file.parent / "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(
            f"{file} was written by peft, which keeps alpha in an adapter_config.json beside it, and there is none"
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise ExportError(f"the settings of {file} cannot be read: {error}") from error
    for component, settings in found.items():
        _check_settings(file, component, settings)
    return {**found}


def _check_settings(file: Path, component: str, settings: Mapping[str, Any]) -> None:
    """Raises ExportError for settings of peft under which a pair means something else than factor·B·A."""
    from peft import LoraConfig

    usual = vars(LoraConfig())
    for key, value in settings.items():
        if key == "init_lora_weights":
            fine = value in _KEEPS_WEIGHTS
        else:
            fine = key in _TRAINING or value == usual.get(key) or not value
        if not fine:
            raise ExportError(f"{file} was trained with {key} = {value!r} for the {component}, which cannot be merged")


def _factor(file: Path, key: str, layer: str, rank: int, alpha: Any, settings: Mapping[str, Any] | None) -> float:
    """What B·A is multiplied by: α/r, α/√r with rsLoRA, or 1 where nothing says α."""
    if settings is None:
        value, root = rank if alpha is None else alpha, False
    elif alpha is not None:
        raise ExportError(f"{file} says alpha twice, in its header and beside {key!r}")
    else:

        def of(setting: str, pattern: str, otherwise: int) -> Any:
            own = [value for name, value in (settings.get(pattern) or {}).items() if _names(name, layer)]
            if any(value != own[0] for value in own):  # peft takes the first, in an order that no file keeps
                raise ExportError(f"the {pattern} of {file} says {own} of {key!r}, so which is meant is not known")
            return own[0] if own else settings.get(setting, otherwise)

        declared = of("r", "rank_pattern", 8)  # peft's defaults
        if declared != rank:
            raise ExportError(f"the header of {file} says rank {declared} of {key!r}, whose tensor has rank {rank}")
        value, root = of("lora_alpha", "alpha_pattern", 8), bool(settings.get("use_rslora"))
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        number = 0.0
    if not rank:
        raise ExportError(f"{file}: {key!r} has rank 0, and changes nothing; download it again, or leave it out")
    if not number or not math.isfinite(number):
        raise ExportError(f"{file} has the alpha {value!r} for {key!r}; it must be a number other than 0")
    return number / (math.sqrt(rank) if root else rank)


def _names(pattern: str, layer: str) -> bool:
    """Whether a pattern of peft's settings means ``layer``."""
    from peft.utils.other import get_pattern_key

    try:
        return bool(get_pattern_key([pattern], layer) == pattern)
    except re.error as error:
        raise ExportError(f"the LoRA's settings hold {pattern!r}, which is no pattern ({error})") from error


def _trim(shape: Iterable[int]) -> list[int]:
    """``shape`` without the ones at its end."""
    sizes = [*shape]
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return sizes


def some(keys: Iterable[str]) -> str:
    """For a message: the first of ``keys``, and how many there are more."""
    first, *more = map(repr, keys)
    return f"{', '.join([first, *more[:2]])}" + (f" and {len(more) - 2} more" if len(more) > 2 else "")
