"""A LoRA (arXiv 2106.09685) merged into the weights that are exported: W' = W + scale·factor·B·A.

A bundle knows nothing of it but its numbers: the graphs are those of the source, node by node.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnp.engine.errors import ExportError
from dnp.engine.system.imports import missing_extra
from dnp.export.families.lora_file import Change, read_changes, some

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")  # that a LoRA may change

# Layers outside of blocks, and inside of them, by the names of the original Stable Diffusion: kohya's scripts keep them
# for XL.
_ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
# Ends of names, and what they were when diffusers' attention processors held the LoRA.
_PROCESSORS = {
    ".q_proj": ".to_q",
    ".k_proj": ".to_k",
    ".v_proj": ".to_v",
    ".out_proj": ".to_out",
    ".to_out.0": ".to_out",
}


@dataclass(frozen=True)
class Lora:
    """A LoRA file in safetensors, as kohya's scripts, peft or diffusers write it, and how much of it is added."""

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
    """Raises ExportError for a file that is not wholly understood or changes nothing, BackendError without peft."""
    if not loras:
        return
    try:
        import peft  # noqa: F401  which knows what the header of a file means
    except ModuleNotFoundError as error:
        raise missing_extra("peft", "cpu,export", "merging a LoRA") from error
    for lora in loras:
        for component, changes in read_changes(lora.file).items():
            if component not in COMPONENTS:
                raise ExportError(
                    f"{lora.file} is no LoRA for Stable Diffusion: it changes a {component}, such as by "
                    f"{changes[0].key!r}; export the model that it was trained for"
                )


def check_fit(models: Mapping[str, Any], loras: Iterable[Lora]) -> None:
    """Raises ExportError for what ``merge`` would refuse, and for changes of what is not among ``models``.

    They may be without weights, on torch's meta device.
    """
    for lora in loras:
        for component, changes in read_changes(lora.file).items():
            if component not in models:
                raise ExportError(
                    f"{lora.file} is no LoRA for this model, which has no {component}; it is changed by "
                    f"{changes[0].key!r}; export the model that it was trained for"
                )
            _matched(models[component], component, lora)


def merge(model: Any, component: str, lora: Lora) -> None:
    """Add ``lora`` to the weights of ``model``, the source's ``component`` in float32, where it changes any.

    Raises ExportError when it changes layers that the model lacks or has in another shape.
    """
    for change, weight in _matched(model, component, lora):
        weight.data += lora.scale * change.added_to(weight)
        if not weight.isfinite().all():
            raise ExportError(
                f"{lora.file}, merged as {lora.scale:g}, makes numbers of {change.layer} in the {component} that "
                "float32 cannot hold; choose a smaller scale"
            )


def _matched(model: Any, component: str, lora: Lora) -> list[tuple[Change, Any]]:
    """Each change of ``component`` that ``lora`` makes, with the weight of ``model`` that it changes."""
    changes = read_changes(lora.file).get(component, [])
    if not changes:
        return []
    misfit = f"{lora.file} does not fit the {component} of this model"
    weights = _weights(model)
    if lacking := [change.key for change in changes if _flat(change.layer) not in weights]:
        raise ExportError(f"{misfit}, which lacks {len(lacking)} of the layers that are changed: {some(lacking)}")
    matched = [(change, weights[_flat(change.layer)]) for change in changes]
    keys: dict[int, str] = {}
    for change, weight in matched:
        if not change.fits(weight):
            raise ExportError(
                f"{misfit}: {change.key!r} and its pair have the shapes {[*change.down.shape]} and "
                f"{[*change.up.shape]}, the weight {[*weight.shape]}"
            )
        if (other := keys.setdefault(id(weight), change.key)) != change.key:
            raise ExportError(f"{misfit}: {other!r} and {change.key!r} both change the same layer")
    return matched


def _weights(model: Any) -> dict[str, Any]:
    """The weights of linear layers and convolutions, by every name that a file may give them, as ``_flat`` has it."""
    from torch import nn

    blocks = _original_blocks(model)
    weights: dict[str, Any] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        names = [path, path.removeprefix("text_model."), f"text_model.{path}", _ORIGINAL.get(path, path)]
        for ours, theirs in blocks.items():
            if path == ours or path.startswith(f"{ours}."):
                layer = path[len(ours) + 1 :]
                names.append(f"{theirs}.{_ORIGINAL.get(layer, layer)}".removesuffix("."))
        for ours, theirs in _PROCESSORS.items():
            names += [name.removesuffix(ours) + theirs for name in names if name.endswith(ours)]
        weights |= {_flat(name): module.weight for name in names}
    return weights


def _original_blocks(unet: Any) -> dict[str, str]:
    """The blocks of a UNet by diffusers' names, with those of the original Stable Diffusion. Empty for other models."""
    if not hasattr(unet, "down_blocks"):
        return {}
    mid = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
    names = {f"mid_block.{ours}": f"middle_block.{theirs}" for ours, theirs in mid.items()}
    place = 1  # 0 is conv_in
    for b, block in enumerate(unet.down_blocks):
        for r in range(len(block.resnets)):
            names[f"down_blocks.{b}.resnets.{r}"] = f"input_blocks.{place}.0"
            names[f"down_blocks.{b}.attentions.{r}"] = f"input_blocks.{place}.1"
            place += 1
        names[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
        place += block.downsamplers is not None
    place = 0
    for b, block in enumerate(unet.up_blocks):
        for r in range(len(block.resnets)):
            names[f"up_blocks.{b}.resnets.{r}"] = f"output_blocks.{place}.0"
            names[f"up_blocks.{b}.attentions.{r}"] = f"output_blocks.{place}.1"
            place += 1
        after = 2 if getattr(block, "attentions", None) else 1
        names[f"up_blocks.{b}.upsamplers.0"] = f"output_blocks.{place - 1}.{after}"
    return names


def _flat(name: str) -> str:
    """A layer's name as kohya's scripts write it."""
    return name.replace(".", "_")
