"""A LoRA (arXiv 2106.09685) merged into the weights that are exported: W' = W + scale·(α/r)·B·A.

A bundle knows nothing of it but its numbers: the graphs are those of the source, node by node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnp.engine.errors import ExportError
from dnp.engine.system.imports import missing_extra

COMPONENTS = ("unet", "text_encoder")  # that a LoRA may change


@dataclass(frozen=True)
class Lora:
    """A LoRA file in safetensors, as diffusers or kohya's scripts write it, and how much of it is added."""

    file: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """``FILE`` or ``FILE:SCALE``. Raises ExportError for a scale that is no finite number."""
        file, colon, scale = text.rpartition(":")
        if not colon or "/" in scale or scale.endswith(".safetensors"):
            return cls(Path(text))
        try:
            lora = cls(Path(file), float(scale))
        except ValueError:
            lora = cls(Path(file), math.nan)
        if not math.isfinite(lora.scale):
            raise ExportError(f"the scale of a LoRA must be a number, not {scale!r}; write FILE or FILE:0.8")
        return lora


def check_loras(loras: tuple[Lora, ...]) -> None:
    """Raises ExportError for what is no safetensors file or changes nothing, BackendError when peft is missing."""
    if not loras:
        return
    try:
        import peft  # noqa: F401  diffusers' loader stands on it
    except ModuleNotFoundError as error:
        raise missing_extra("peft", "cpu,export", "merging a LoRA") from error
    for lora in loras:
        if lora.file.suffix != ".safetensors":
            raise ExportError(f"{lora.file} is no .safetensors file; pickle is never loaded, it can run any code")
        state, _ = _read(lora)
        if not any(key.startswith(f"{component}.") for key in state for component in COMPONENTS):
            raise ExportError(
                f"{lora.file} is no LoRA for Stable Diffusion 1.x: it changes neither UNet nor text encoder"
            )


def merge(model: Any, component: str, lora: Lora) -> None:
    """Add ``lora`` to the weights of ``model``, the source's ``component``, where it changes any.

    Raises ExportError when it does not fit the model.
    """
    state, alphas = _read(lora)
    if not any(key.startswith(f"{component}.") for key in state):
        return
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker"))
    pipeline = _loader()(**{**parts, component: model}, feature_extractor=None, requires_safety_checker=False)
    try:
        if component == "unet":
            pipeline.load_lora_into_unet(state, alphas, unet=model)
        else:
            pipeline.load_lora_into_text_encoder(state, alphas, text_encoder=model, prefix=component)
        pipeline.fuse_lora(components=[component], lora_scale=lora.scale)
    except Exception as error:  # whatever diffusers and peft find wrong with a file
        raise ExportError(f"{lora.file} does not fit the {component} of this model: {error}") from error
    pipeline.unload_lora_weights()


def _read(lora: Lora) -> tuple[dict[str, Any], Any]:
    """The tensors by diffusers' names, and the alphas where they are apart. Raises ExportError."""
    if not lora.file.is_file():
        raise ExportError(f"{lora.file} does not exist; name the LoRA's .safetensors file")
    try:
        state, alphas = _loader().lora_state_dict(
            str(lora.file.parent), weight_name=lora.file.name, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # whatever safetensors and diffusers find wrong with a file
        raise ExportError(f"{lora.file} cannot be read as a LoRA: {error}") from error
    return state, alphas


def _loader() -> Any:
    """The class of diffusers that reads LoRA files and puts them beside a model's weights."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline
