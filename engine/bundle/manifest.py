"""What ``bundle.json`` holds, as frozen dataclasses, and the check that turns JSON into them.

The one place that knows the keys, and what is refused; what the graphs must take and give is in ``contract.py``.
Everything wrong with a manifest is a ``BundleError`` that names the key, the value and the remedy.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from dnp.engine.bundle.contract import TensorSpec, signatures
from dnp.engine.bundle.schema import REMEDY, Bytes, Id, Shape, Size, mapping, record, same_names, shown
from dnp.engine.errors import BundleError

SCHEMA: Final = 2
FP16_LARGEST: Final = 65504.0


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
class TokenizerSpec:
    """A prompt tokenizer: its file, and the ids that begin, end and fill a window."""

    file: str
    bos: Id
    eos: Id
    pad: Id


@dataclass(frozen=True)
class TextSpec:
    """The prompt encoder: windows of ``length`` tokens, by one tokenizer for each input of ``encode_text``.

    Attributes:
        empty: what ∅ is: the empty string ``encoded``, or ``zeros`` in its place, as Stable Diffusion XL was trained.
    """

    length: Size
    tokenizers: tuple[TokenizerSpec, ...]
    empty: Literal["encoded", "zeros"]


@dataclass(frozen=True)
class ConditioningSpec:
    """Something that the network is conditioned on, for each place and role.

    Attributes:
        shape: of one entry, in which ``tokens`` is the length of the prompt.
        source: ``text``, an output of ``encode_text`` of the same name; or ``size``, six numbers: height and width of
            the image, its crop's top and left, height and width again (arXiv 2307.01952).
    """

    shape: Shape
    source: Literal["text", "size"]


@dataclass(frozen=True)
class GuidanceSpec:
    """What the ``denoise`` graph can do with the network's rows.

    Attributes:
        roles: how many a place has: 2 are the negative prompt and the prompt, 3 a third one besides.
        methods: whether the graph has the reductions of guidance methods.
        embedded: whether the guidance scale is an input of the network, as of some distilled models.
    """

    roles: Annotated[int, 2, 3]
    methods: bool
    embedded: bool


@dataclass(frozen=True)
class LatentSpec:
    """Latents ``[channels, h, w]``: default and largest sizes, multiples of ``multiple``.

    A latent is ``vae_scale_factor`` by ``vae_scale_factor`` pixels.
    """

    channels: Size
    height: Size
    width: Size
    multiple: Size
    max_height: Size
    max_width: Size
    vae_scale_factor: Size


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
class PassDefaults:
    """What a pass uses where a request says nothing. ``guidance`` is w of the final pass, s of the DNS pass."""

    sampler: str
    steps: Size
    guidance: float


@dataclass(frozen=True)
class Defaults:
    """What a request uses where it says nothing, pass by pass."""

    final: PassDefaults
    dns: PassDefaults


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
    family: str
    precision: Literal["fp32", "fp16"]
    created_with: dict[str, str]
    text: TextSpec
    conditioning: dict[str, ConditioningSpec]
    guidance: GuidanceSpec
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
    if schema < SCHEMA:
        raise BundleError(
            f"{where}: written in schema {schema}, by an earlier dnp-engine; this one reads schema {SCHEMA}: export "
            "the model anew, dnp export SOURCE OUT --captioner BLIP"
        )
    entries = mapping(_GraphEntry, data.get("graphs", {}), f"{where}: graphs")
    graphs = {
        name: GraphSpec(name, root / e.file, e.inputs, e.outputs, e.parity, e.ranges) for name, e in entries.items()
    }
    manifest = record(Manifest, data, where, ready={"graphs": graphs})
    listed = [(f"graphs.{name}.file", entry.file) for name, entry in entries.items()]
    listed += [("text.tokenizers", tokenizer.file) for tokenizer in manifest.text.tokenizers]
    listed.append(("caption.tokenizer", manifest.caption.tokenizer))
    for key, file in listed:
        if file not in manifest.files:
            raise BundleError(f"{where}: {key} names {shown(file)}, which 'files' does not list; {REMEDY}")
    _check_numbers(manifest, where)
    _check_graphs(manifest, where)
    return manifest


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
    expected = signatures(m)
    same_names(m.graphs, expected, f"{where}: graphs")
    for name, signature in expected.items():
        for side in ("inputs", "outputs"):
            found, wanted = getattr(m.graphs[name], side), getattr(signature, side)
            same_names(found, wanted, f"{where}: graphs.{name}.{side}")
            for tensor, spec in wanted.items():
                if found[tensor] != spec:
                    raise BundleError(
                        f"{where}: graphs.{name}.{side}.{tensor} is {found[tensor].to_dict()} and must be "
                        f"{spec.to_dict()}; {REMEDY}"
                    )
