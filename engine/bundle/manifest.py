"""What ``bundle.json`` holds, as frozen dataclasses: the one place that knows the keys.

What the graphs must take and give is in ``contract.py``; ``reading.py`` checks a manifest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from dnp.engine.bundle.schema import Bytes, Id, Shape, Size
from dnp.engine.bundle.tensors import TensorSpec

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
