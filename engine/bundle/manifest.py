"""What ``bundle.json`` holds, as frozen dataclasses, and the check that turns JSON into them.

The one place that knows the schema: the keys, what the five graphs must take and give, and what is refused.
Everything wrong with a manifest is a ``BundleError`` that names the key, the value and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from dnp.engine.bundle.columns import ROW, SLOTS
from dnp.engine.bundle.schema import REMEDY, SHAPE_ENTRY, Bytes, Id, Shape, Size, mapping, record, same_names, shown
from dnp.engine.errors import BundleError, SettingsError

SCHEMA: Final = 1
FP16_LARGEST: Final = 65504.0


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph. A shape entry is an integer, ``"batch"`` or ``"4*height"``."""

    shape: Shape
    dtype: Literal["float32", "float16", "int64", "uint8"] = "float32"

    def resolve(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in integers. Raises SettingsError when a symbol has no value in ``dims``."""
        return tuple(entry if isinstance(entry, int) else _evaluate(entry, dims) for entry in self.shape)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols of the shape, in order, each once."""
        return tuple(dict.fromkeys(_split(e)[1] for e in self.shape if isinstance(e, str)))

    def to_dict(self) -> dict[str, Any]:
        """The tensor as ``bundle.json`` holds it."""
        return {"shape": list(self.shape), "dtype": self.dtype}


@dataclass(frozen=True)
class Parity:
    """How far an output was from PyTorch's at export, and how far it might have been."""

    max_abs_error: float
    bound: float


@dataclass(frozen=True)
class Ranges:
    """What whole DNP requests needed of an fp16 graph's number range, measured in float32 at export.

    Attributes:
        largest: the largest magnitude of any activation that fp16 would hold.
        at: the value in the graph that reached it.
        limit: the magnitude from which a value was put back to float32; fp16 itself ends at 65,504.
        error: the largest error of the graph as it is against float32, relative to an output's largest value or 1.
        precision: ``fp32`` where so many values passed the limit that the whole graph was exported in float32.
        float32: the values put back to float32 one by one, in the graph's order.
    """

    largest: float
    at: str
    limit: float
    error: float
    precision: Literal["fp16", "fp32"] = "fp16"
    float32: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The largest activation as a share of what fp16 holds; from 1 on, fp16 alone would overflow."""
        return self.largest / FP16_LARGEST

    def to_dict(self) -> dict[str, Any]:
        """The ranges as ``bundle.json`` holds them."""
        return {**asdict(self), "float32": list(self.float32)}


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its file, its inputs and outputs by name, and what was measured of it at export."""

    name: str
    path: Path
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    parity: dict[str, Parity] = field(default_factory=dict)
    ranges: Ranges | None = None

    @property
    def symbols(self) -> tuple[str, ...]:
        """Every symbol of the graph's shapes, each once: what ``Session.reshape`` wants to know."""
        tensors = [*self.inputs.values(), *self.outputs.values()]
        return tuple(dict.fromkeys(symbol for tensor in tensors for symbol in tensor.symbols))

    @property
    def nbytes(self) -> int:
        """Bytes of the file and of the weights beside it: what the weights take, where they are kept as they are."""
        files = [self.path, self.path.with_name(f"{self.path.name}.data")]
        return sum(file.stat().st_size for file in files if file.exists())


@dataclass(frozen=True)
class TextSpec:
    """The prompt encoder: ``length`` tokens in, ``[B, length, dim]`` out."""

    length: Size
    dim: Size
    bos: Id
    eos: Id
    pad: Id
    tokenizer: str


@dataclass(frozen=True)
class LatentSpec:
    """Latents ``[B, channels, h, w]``: default and largest sizes; a latent is ``pixels`` by ``pixels`` pixels."""

    channels: Size
    height: Size
    width: Size
    multiple: Size
    max_height: Size
    max_width: Size
    pixels: Size


@dataclass(frozen=True)
class CaptionSpec:
    """The captioner: ``image_size``, a cache of ``length`` positions, ``tokens`` of vision features."""

    image_size: Size
    length: Size
    layers: Size
    heads: Size
    head_dim: Size
    tokens: Size
    vocab: Size
    bos: Id
    eos: Id
    pad: Id
    max_length: Annotated[int, 2]  # the begin token and one more
    tokenizer: str


@dataclass(frozen=True)
class Defaults:
    """What a request uses where it says nothing: guidance w of the final pass, s of the DNS pass."""

    sampler: str
    steps: Size
    guidance: float
    dns_sampler: str
    dns_steps: Size
    dns_guidance: float


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (64 hexadecimal digits) of one file."""

    size: Bytes
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All of ``bundle.json``. ``schedule`` stays a plain dict: it is the samplers' to read."""

    schema: Size
    name: str
    family: Literal["stable-diffusion-1"]
    precision: Literal["fp32", "fp16"]
    created_with: dict[str, str]
    text: TextSpec
    latents: LatentSpec
    schedule: dict[str, Any]
    caption: CaptionSpec
    defaults: Defaults
    graphs: dict[str, GraphSpec]
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class _GraphEntry:
    file: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    parity: dict[str, Parity] = field(default_factory=dict)
    ranges: Ranges | None = None


def parse(data: Any, root: Path) -> Manifest:
    """Check the JSON value of a ``bundle.json`` in the folder ``root``. Raises BundleError."""
    where = str(root / "bundle.json")
    if not isinstance(data, dict):
        raise BundleError(f"{where}: not a manifest but {shown(data)}; {REMEDY}")
    schema = data.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise BundleError(f"{where}: no bundle manifest, its 'schema' is {shown(schema)}; {REMEDY}")
    if schema > SCHEMA:
        made_with = data.get("created_with")
        writer = made_with.get("dnp-engine") if isinstance(made_with, dict) else None
        known = f" by dnp-engine {shown(writer)}" if writer else ""
        raise BundleError(
            f"{where}: written{known} in schema {shown(schema)}, and dnp-engine {version('dnp-engine')} reads up to "
            f"schema {SCHEMA}; open it with the dnp-engine that wrote it, or {REMEDY} with this one"
        )
    entries = mapping(_GraphEntry, data.get("graphs", {}), f"{where}: graphs")
    graphs = {
        name: GraphSpec(name, root / e.file, e.inputs, e.outputs, e.parity, e.ranges) for name, e in entries.items()
    }
    manifest = record(Manifest, data, where, ready={"graphs": graphs})
    listed = [(f"graphs.{name}.file", entry.file) for name, entry in entries.items()]
    listed += [("text.tokenizer", manifest.text.tokenizer), ("caption.tokenizer", manifest.caption.tokenizer)]
    for key, file in listed:
        if file not in manifest.files:
            raise BundleError(f"{where}: {key} names {shown(file)}, which 'files' does not list; {REMEDY}")
    _check_numbers(manifest, where)
    _check_graphs(manifest, where)
    return manifest


def graph_signatures(
    text: TextSpec, latents: LatentSpec, caption: CaptionSpec, precision: str
) -> dict[str, tuple[dict[str, TensorSpec], dict[str, TensorSpec]]]:
    """The contract of the five graphs: inputs and outputs of each, in order, for a model of these sizes."""
    grid: Shape = (latents.channels, "height", "width")
    cache: Literal["float16", "float32"] = "float16" if precision == "fp16" else "float32"

    def f32(*shape: int | str) -> TensorSpec:
        return TensorSpec(shape)

    def kv(positions: int, rows: str = "batch") -> TensorSpec:
        return TensorSpec((rows, caption.layers, caption.heads, positions, caption.head_dim), cache)

    ids, index = TensorSpec(("batch", text.length), "int64"), TensorSpec(("batch",), "int64")
    context, state = f32("batch", text.length, text.dim), f32("batch", SLOTS, *grid)
    own, cross, per_image = kv(caption.length), kv(caption.tokens), kv(caption.tokens, "images")
    photo = TensorSpec(("batch", "image_height", "image_width", 3), "uint8")
    sides = ("height", "width") if latents.pixels == 1 else tuple(f"{latents.pixels}*{s}" for s in ("height", "width"))
    return {
        "encode_text": ({"ids": ids}, {"context": context}),
        "denoise": (
            {
                "state": state,
                "index": index,
                "table": f32("batch", "rows", ROW),
                "noise": f32("batch", "draws", *grid),
                "base_context": context,
                "prompt_context": context,
            },
            {"next_state": state, "next_index": index, "latents": f32("batch", *grid)},
        ),
        "decode_latents": (
            {"latents": f32("batch", *grid)},
            {"image": TensorSpec(("batch", *sides, 3), "uint8")},
        ),
        "encode_image": (
            {
                "image": photo,
                "resize_columns": f32("image_width", caption.image_size),
                "resize_rows": f32(caption.image_size, "image_height"),
            },
            {"cross_keys": cross, "cross_values": cross},
        ),
        "caption_step": (
            {
                "token": index,
                "position": index,
                "parent": index,
                "keys": own,
                "values": own,
                "cross_keys": per_image,
                "cross_values": per_image,
            },
            {
                "logits": f32("batch", caption.vocab),
                "next_token": index,
                "next_keys": own,
                "next_values": own,
            },
        ),
    }


def _check_numbers(m: Manifest, where: str) -> None:
    for side, most in (("height", "max_height"), ("width", "max_width")):
        size, limit = getattr(m.latents, side), getattr(m.latents, most)
        if size > limit or size % m.latents.multiple:
            raise BundleError(
                f"{where}: latents.{side} is {size}; it must be a multiple of {m.latents.multiple} "
                f"and at most {limit} (latents.{most}); {REMEDY}"
            )
    if m.caption.max_length > m.caption.length:
        raise BundleError(
            f"{where}: caption.max_length is {m.caption.max_length}, but the cache holds {m.caption.length}; {REMEDY}"
        )
    for key in ("bos", "eos", "pad"):
        if getattr(m.caption, key) >= m.caption.vocab:
            raise BundleError(f"{where}: caption.{key} is outside the vocabulary of {m.caption.vocab}; {REMEDY}")
    for name, file in m.files.items():
        if not re.fullmatch(r"[0-9a-f]{64}", file.sha256):
            raise BundleError(f"{where}: files.{name!r}.sha256 is no hash: {shown(file.sha256)}; {REMEDY}")


def _check_graphs(m: Manifest, where: str) -> None:
    signatures = graph_signatures(m.text, m.latents, m.caption, m.precision)
    same_names(m.graphs, signatures, f"{where}: graphs")
    for name, sides in signatures.items():
        for side, expected in zip(("inputs", "outputs"), sides, strict=True):
            found, key = getattr(m.graphs[name], side), f"{where}: graphs.{name}.{side}"
            same_names(found, expected, key)
            for tensor, spec in expected.items():
                if found[tensor] != spec:
                    raise BundleError(
                        f"{key}.{tensor} is {found[tensor].to_dict()} and must be {spec.to_dict()}; {REMEDY}"
                    )


def _split(entry: str) -> tuple[int, str]:
    match = SHAPE_ENTRY.fullmatch(entry)
    if match is None:
        raise SettingsError(f"{entry!r} is no shape entry; write an integer, 'symbol' or '4*symbol'")
    return int(match[1] or 1), match[2]


def _evaluate(entry: str, dims: Mapping[str, int]) -> int:
    factor, symbol = _split(entry)
    if symbol not in dims:
        raise SettingsError(f"the size {symbol!r} is not given, which the shape entry {entry!r} needs")
    return factor * dims[symbol]
