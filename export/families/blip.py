"""A BLIP captioner: what is read of its folder, its two graphs, its entry in the manifest, its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders
from transformers import AutoTokenizer, BlipForConditionalGeneration
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import SizeDict
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from dnp.engine.bundle.contract import Signature
from dnp.engine.errors import ExportError
from dnp.export.families.blip_modules import CaptionStep, EncodeImage, OriginalDecoder, OriginalEncoder
from dnp.export.files import check_settings_files, find_weights
from dnp.export.fp16.precision import Precision
from dnp.export.graph import Array, Dims, GraphExport
from dnp.export.loading import load_model, warnings_refused
from dnp.runtime.captioning.resize import resize_matrices

MAX_CAPTION = 64  # cache slots, unless the model has fewer positions: real BLIP has 512, its captions about 20 tokens
PROCESSOR = "BlipImageProcessor"
BICUBIC = 3  # Pillow's number for it

# transformers' clean_up_tokenization, in its order.
_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
             (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


@dataclass(frozen=True)
class BlipParts:
    """A captioner as loaded: the model in float32, its tokenizer, and its image normalisation.

    Attributes:
        mean, std: per channel, for pixels scaled to 0..1.
    """

    model: Any
    tokenizer: Any
    mean: list[float]
    std: list[float]


def load_blip(folder: Path) -> BlipParts:
    """Load a ``BlipForConditionalGeneration`` folder: safetensors only, no code from it, nothing from the network.

    Raises ExportError when the folder is no such model, has pickled weights only, or prepares images in another way
    than BLIP does (bicubic to a square, scaled, normalised).
    """
    if not (folder / "config.json").is_file():
        raise ExportError(f"{folder} is no model folder: it has no config.json")
    variant = find_weights(folder, "model")
    check_settings_files(folder)
    model = load_model(BlipForConditionalGeneration, folder, variant=variant, dtype=torch.float32)
    try:
        with warnings_refused(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            image, _ = ImageProcessingMixin.get_image_processor_dict(folder, local_files_only=True)
    except ExportError:
        raise
    except Exception as error:  # whatever transformers finds wrong with a folder
        raise ExportError(f"cannot load a BLIP captioner from {folder}: {error}") from error
    mean, std = _read_processor(image, model.config.vision_config.image_size, folder)
    return BlipParts(model, tokenizer, mean, std)


def caption_manifest(parts: BlipParts) -> dict[str, Any]:
    """The ``caption`` object of the manifest. ``eos`` is BLIP's [SEP]; ``length`` is M, the slots of the caches."""
    text, vision = parts.model.config.text_config, parts.model.config.vision_config
    length = min(MAX_CAPTION, text.max_position_embeddings)
    return {
        "image_size": vision.image_size,
        "length": length,
        "layers": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "head_dim": text.hidden_size // text.num_attention_heads,
        "tokens": (vision.image_size // vision.patch_size) ** 2 + 1,
        "vocab": text.vocab_size,
        "bos": text.bos_token_id,
        "eos": text.sep_token_id,
        "pad": text.pad_token_id,
        "max_length": length,
        "tokenizer": "tokenizers/caption.json",
    }


def caption_tokenizer(parts: BlipParts) -> Tokenizer:
    """The tokenizer to store: no padding or truncation, transformers' clean-up of spaces built into its decoder."""
    tokenizer = Tokenizer.from_str(parts.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if parts.tokenizer.clean_up_tokenization_spaces:
        replacements = [decoders.Replace(old, new) for old, new in _CLEAN_UP]
        tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Fuse(), *replacements])
    return tokenizer


def encode_image(parts: BlipParts, signature: Signature, precision: Precision) -> GraphExport:
    """The vision transformer's graph, compared with transformers' own forward pass in float32."""
    model, exact = parts.model, precision == "fp32"
    size = model.config.vision_config.image_size

    def images(rng: np.random.Generator, dims: Dims) -> dict[str, Array]:
        shape = signature.inputs["image"].resolve(dims)
        columns, rows = resize_matrices(shape[1], shape[2], size)
        return {
            "image": rng.integers(0, 256, shape, np.uint8),
            "resize_columns": np.ascontiguousarray(columns),
            "resize_rows": np.array(rows),
        }

    return GraphExport(
        name="encode_image",
        module=EncodeImage(model.vision_model, model.text_decoder, parts.mean, parts.std).eval(),
        signature=signature,
        fresh_inputs=images,
        example={"batch": 2, "image_height": size + 8, "image_width": size + 16},
        checks=[
            {"batch": 2, "image_height": size + 8, "image_width": size + 16},
            {"batch": 1, "image_height": 2 * size, "image_width": size // 2},
            {"batch": 3, "image_height": size, "image_width": size},
        ],
        bounds=dict.fromkeys(signature.outputs, 1e-3 if exact else 0.05),
        precision=precision,
        reference=OriginalEncoder(model.vision_model, model.text_decoder, parts.mean, parts.std).eval(),
    )


def caption_step(parts: BlipParts, signature: Signature, precision: Precision) -> GraphExport:
    """The caption decoder's graph, compared with transformers' own forward pass in float32."""
    model, exact = parts.model, precision == "fp32"
    vocab, eos = model.config.text_config.vocab_size, model.config.text_config.sep_token_id

    def states(rng: np.random.Generator, dims: Dims) -> dict[str, Array]:
        inputs = signature.inputs
        count, slots = inputs["tokens"].resolve(dims)
        ends = [0, slots - 1]  # the first and the last position are always among those tried
        arrays = {
            "tokens": rng.integers(0, vocab, (count, slots)),
            "position": np.resize([*ends, *rng.integers(0, slots, count)], count),
            "prompt_length": rng.integers(1, slots, count),
            "min_length": rng.integers(0, slots, count),
            "parent": rng.integers(0, count, count),
        }
        for name in ("keys", "values", "cross_keys", "cross_values"):
            arrays[name] = rng.standard_normal(inputs[name].resolve(dims)).astype(inputs[name].dtype)
        return arrays

    # In fp16 two nearly equal logits may change places, so there the next token is bounded by the logits alone.
    whole = {"next_tokens": 0.0 if exact else float(vocab), "next_position": 0.0}
    return GraphExport(
        name="caption_step",
        module=CaptionStep(model.text_decoder, eos).eval(),
        signature=signature,
        fresh_inputs=states,
        example={"sequences": 6, "images": 2},
        checks=[{"sequences": rows, "images": count} for rows, count in ((6, 2), (1, 1), (4, 4), (5, 1))],
        bounds={name: whole.get(name, 1e-3 if exact else 0.05) for name in signature.outputs},
        precision=precision,
        reference=OriginalDecoder(model.text_decoder, eos).eval(),
    )


GRAPHS: Mapping[str, Callable[[BlipParts, Signature, Precision], GraphExport]] = {
    "encode_image": encode_image,
    "caption_step": caption_step,
}


def _read_processor(settings: Mapping[str, Any], size: int, folder: Path) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel, for pixels scaled to 0..1, by which the folder's image processor normalises.

    ``settings`` are read by transformers' own class: older forms of a size, and what is left out. Raises ExportError
    when images of ``size`` are prepared by more than a bicubic resize, a factor, a mean and a deviation.
    """
    kind = str(settings.get("image_processor_type", PROCESSOR)).removesuffix("Fast").removesuffix("Pil")
    if kind != PROCESSOR:
        raise ExportError(f"{folder} prepares images with a {kind}; only {PROCESSOR} can be exported")
    try:
        read = BlipImageProcessorPil(**settings)
    except Exception as error:  # whatever transformers finds wrong with a setting
        raise ExportError(f"{folder}: the settings of the image processor cannot be read: {error}") from error
    square = {"height": size, "width": size}
    for switch, key, value in (("do_resize", "size", square), ("do_resize", "resample", BICUBIC),
                               ("do_center_crop", "crop_size", square), ("do_pad", "pad_size", square)):  # fmt: skip
        on, found = getattr(read, switch), getattr(read, key)
        found = dict(found) if isinstance(found, SizeDict) else found
        if switch == "do_resize" and not on:
            raise ExportError(f"{folder} prepares images with do_resize = {on}; only True can be exported")
        if on and found != value and not (switch == "do_pad" and found is None):
            raise ExportError(f"{folder} prepares images with {key} = {found}; only {value} can be exported")
    factor = 255 * (read.rescale_factor if read.do_rescale else 1)
    mean, std = (read.image_mean, read.image_std) if read.do_normalize else (0.0, 1.0)
    channels = [np.asarray(values, np.float64) / factor for values in (mean, std)]
    if any(values.shape not in ((), (3,)) for values in channels) or not channels[1].all():
        raise ExportError(
            f"{folder} normalises images with image_mean = {mean} and image_std = {std}; "
            "give three numbers each, no deviation zero"
        )
    return np.broadcast_to(channels[0], 3).tolist(), np.broadcast_to(channels[1], 3).tolist()
