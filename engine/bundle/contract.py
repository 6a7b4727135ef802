"""The contract of the five graphs: what each takes and gives, for a model of given sizes. Written here, and once.

Exporters make their graphs after it, a manifest is held against it, backends and compilers read its sizes. Names of
sizes (symbols) stand in shapes: ``"height"``, or ``"8*height"``.

Places and rows
    ``denoise`` has P *places*, each with a sample or idle, and computes R *rows* of the network a step. A row is a pair
    (place, role): role 0 is the negative prompt, 1 the prompt, 2 a third one. Whose row is whose is data
    (``row_place``, ``row_role``, and back ``place_rows``), so that a request joins by writing one place, and leaves by
    freeing it. The embeddings of every place and role lie in a *bank*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from dnp.engine.bundle.columns import ROW, SLOTS
from dnp.engine.bundle.manifest import Manifest
from dnp.engine.bundle.schema import Shape
from dnp.engine.bundle.tensors import TensorSpec

BATCH: Final = 8  # images at once: a constant, for the number of rows decides the last bits of an image on some devices
BEAMS: Final = 4  # sequences of the caption decoder for each image
STEPS: Final = 128  # rows of a sampler table that is usual: 63 steps of a sampler that runs the network twice a step
WINDOWS: Final = 1  # windows of a prompt: what the text encoder takes at once


class Signature(NamedTuple):
    """What a graph takes and gives, by name and in order."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


@dataclass(frozen=True)
class Symbol:
    """A size that is known only when a graph is run, and how users speak of it.

    Attributes:
        option: what it is called in ``dnp build --OPTION`` and in ``build_plans(ranges=…)``.
        least, usual, most: what the smallest, the best and the largest size that a user names are multiplied with:
            2 rows of the network for an image.
        divisor: pixels for one unit of the size: 8 for latents.
        multiple: sizes are multiples of it.
        captured: the sizes that are captured, of which the next one holds what lies between: all of them when empty.
        largest: whether the largest size is captured too.
    """

    option: str
    least: int = 1
    usual: int = 1
    most: int = 1
    divisor: int = 1
    multiple: int = 1
    captured: tuple[int, ...] = ()
    largest: bool = False

    def fit(self, size: int, high: int) -> int:
        """The size to run ``size`` at where ``high`` is the largest; the caller fills up what lies between.

        ``size`` itself when it is beyond ``high``: what checks sizes tells so.
        """
        sizes = [*(s for s in self.captured if s < high), *([high] if self.largest else [])]
        return min((s for s in sizes if s >= size), default=size)


def symbols(manifest: Manifest) -> dict[str, Symbol]:
    """Every symbol in the shapes of the model's graphs."""
    scale, grain = manifest.latents.vae_scale_factor, manifest.latents.multiple
    roles, length = manifest.guidance.roles, manifest.text.length
    latents = Symbol("height", divisor=scale, multiple=grain)
    return {
        "batch": Symbol("batch"),
        "places": Symbol("batch", largest=True),
        "rows": Symbol("batch", usual=2, most=roles, captured=(1, 2, 3, 4, 6, 8, 12, 16, 24), largest=True),
        "steps": Symbol("steps", largest=True),
        "noise_steps": Symbol("steps", captured=(1,), largest=True),
        "height": latents,
        "width": Symbol("width", divisor=scale, multiple=grain),
        "tokens": Symbol("windows", length, length, length, multiple=length),
        "image_height": Symbol("image_height"),
        "image_width": Symbol("image_width"),
        "images": Symbol("batch"),
        "sequences": Symbol("batch", most=BEAMS),
    }


def signatures(manifest: Manifest) -> dict[str, Signature]:
    """Inputs and outputs of each of the five graphs."""
    return {
        "encode_text": _encode_text(manifest),
        "denoise": _denoise(manifest),
        "decode_latents": _decode_latents(manifest),
        "encode_image": _encode_image(manifest),
        "caption_step": _caption_step(manifest),
    }


def text_inputs(manifest: Manifest) -> list[str]:
    """The inputs of ``encode_text``, one for each tokenizer."""
    return ["ids", *(f"ids_{number}" for number in range(2, len(manifest.text.tokenizers) + 1))]


def _encode_text(m: Manifest) -> Signature:
    """ids of each tokenizer → what the network is conditioned on, as far as it comes from the text."""
    ids = dict.fromkeys(text_inputs(m), TensorSpec(("batch", "tokens"), "int64"))
    of_text = {name: entry for name, entry in m.conditioning.items() if entry.source == "text"}
    return Signature(ids, {name: TensorSpec(("batch", *entry.shape)) for name, entry in of_text.items()})


def _denoise(m: Manifest) -> Signature:
    """One sampler step for each place, whichever sampler it uses: see ``columns.py``."""
    grid: Shape = (m.latents.channels, "height", "width")
    roles = m.guidance.roles
    state, index = TensorSpec(("places", SLOTS, *grid)), TensorSpec(("places",), "int64")
    row = TensorSpec(("rows",), "int64")
    bank = {name: TensorSpec(("places", roles, *entry.shape)) for name, entry in m.conditioning.items()}
    latents = TensorSpec(("places", *grid))
    return Signature(
        {
            "state": state,
            "index": index,
            "table": TensorSpec(("places", "steps", ROW)),
            "noise": TensorSpec(("places", "noise_steps", *grid)),
            "row_place": row,
            "row_role": row,
            "place_rows": TensorSpec(("places", roles), "int64"),
            **bank,
        },
        {"next_state": state, "next_index": index, "latents": latents, "clean_latents": latents},
    )


def _decode_latents(m: Manifest) -> Signature:
    """The latents of some places to images; the others go on."""
    sides = _scaled(m.latents.vae_scale_factor, "height"), _scaled(m.latents.vae_scale_factor, "width")
    return Signature(
        {
            "latents": TensorSpec(("places", m.latents.channels, "height", "width")),
            "decoded": TensorSpec(("batch",), "int64"),
        },
        {"image": TensorSpec(("batch", *sides, 3), "uint8")},
    )


def _encode_image(m: Manifest) -> Signature:
    """Images, resized by two matrices, to the caption decoder's cross-attention keys and values."""
    cross = _cache(m, "batch", m.caption.tokens)
    return Signature(
        {
            "image": TensorSpec(("batch", "image_height", "image_width", 3), "uint8"),
            "resize_columns": TensorSpec(("image_width", m.caption.image_size)),
            "resize_rows": TensorSpec((m.caption.image_size, "image_height")),
        },
        {"cross_keys": cross, "cross_values": cross},
    )


def _caption_step(m: Manifest) -> Signature:
    """The token at ``position`` of each sequence in, the next one chosen and written beside it.

    ``tokens`` before ``prompt_length`` are given and stay; the end token is not chosen before ``min_length``. With
    ``tokens``, ``position`` and the caches fed back, a greedy caption needs nothing of the host until it is read. Beam
    search writes ``tokens`` itself; ``parent`` puts the caches, and nothing else, in the order of its beams.
    """
    number = TensorSpec(("sequences",), "int64")
    tokens, own = TensorSpec(("sequences", m.caption.length), "int64"), _cache(m, "sequences", m.caption.length)
    cross = _cache(m, "images", m.caption.tokens)
    return Signature(
        {
            "tokens": tokens,
            "position": number,
            "prompt_length": number,
            "min_length": number,
            "parent": number,
            "keys": own,
            "values": own,
            "cross_keys": cross,
            "cross_values": cross,
        },
        {
            "logits": TensorSpec(("sequences", m.caption.vocab)),
            "next_tokens": tokens,
            "next_position": number,
            "next_keys": own,
            "next_values": own,
        },
    )


def _cache(m: Manifest, entries: str, positions: int) -> TensorSpec:
    dtype: Literal["float16", "float32"] = "float16" if m.precision == "fp16" else "float32"
    return TensorSpec((entries, m.caption.layers, m.caption.heads, positions, m.caption.head_dim), dtype)


def _scaled(factor: int, symbol: str) -> str:
    return symbol if factor == 1 else f"{factor}*{symbol}"
