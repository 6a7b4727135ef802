"""What ``/v1`` takes and gives: OpenAI's fields, diffusers' names for what OpenAI has none for, and our own."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator
from typing_extensions import Self

from dnp.engine.errors import SettingsError
from dnp.runtime.request import Request
from dnp.serving.errors import ApiError

Whole = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Guidance = Number | Annotated[list[Number], Field(max_length=1000)]

_SEEDS: Final = 2**32  # a random seed is below it: JavaScript holds every one exactly
_SIZE: Final = r"^(auto|[1-9][0-9]{0,5}x[1-9][0-9]{0,5})$"
# Names of other programs for our settings. The first name is ours, and the one that is documented.
SAME: Final = {
    "n": ("batch_size", "images"),
    "steps": ("num_inference_steps", "step"),
    "guidance": ("guidance_scale", "cfg_scale"),
    "sampler": ("sampler_name", "scheduler"),
    "negative_prompt": ("negative",),
}
# Fields of OpenAI's that change nothing here.
_IGNORED: Final = (
    "user", "safety_identifier", "style", "moderation", "quality", "complexity", "frame_count", "frame_duration_ms",
    "svg", "stream_options", "metadata",
)  # fmt: skip


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    _sent: frozenset[str] = frozenset()

    @property
    def sent(self) -> frozenset[str]:
        """The names of the fields as they were sent."""
        return self._sent

    @model_validator(mode="wrap")
    @classmethod
    def _remember(cls, data: Any, make: ModelWrapValidatorHandler[Self]) -> Self:
        body = make(data)
        body._sent = frozenset(data) if isinstance(data, dict) else frozenset()
        return body

    @model_validator(mode="before")
    @classmethod
    def _one_name_each(cls, data: Any) -> Any:
        """Fold the other names into ours; null is as good as left out. Raises ValueError where two names differ."""
        if not isinstance(data, dict):
            return data
        found = {name: value for name, value in data.items() if value is not None and name not in _IGNORED}
        for ours, others in SAME.items():
            if ours not in cls.model_fields:
                continue
            given = {name: found.pop(name) for name in (ours, *others) if name in found}
            if len({repr(value) for value in given.values()}) > 1:
                raise ValueError(f"{' and '.join(given)} say different things; say one of them")
            if given:
                found[ours] = next(iter(given.values()))
        return found


class Settings(_Body):
    """The settings that pictures and DNS images share, by the names of ``dnp.Request``."""

    prompt: Annotated[Text, Field(max_length=32_000, description="What the image should show.")]
    model: Annotated[Text, Field(max_length=200)] | None = Field(None, description="A name of /v1/models.")
    n: Annotated[Whole, Field(ge=1, le=256)] | None = Field(
        None, description="How many images, of seeds counted up. Also: batch_size."
    )
    size: Annotated[Text, Field(pattern=_SIZE)] | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto.")
    width: Whole | None = None
    height: Whole | None = None
    seed: Whole | None = Field(None, description="Random when left out or -1; the answer tells it.")
    windows: Whole | None = Field(None, description="Read so many times the text encoder's length.")
    dns_seed: Whole | None = None
    dns_sampler: Text | None = None
    dns_steps: Whole | None = None
    dns_guidance: Guidance | None = Field(None, description="s of the DNS pass.")
    dns_eta: Number | None = None
    dns_spacing: Text | None = None
    embedded_guidance: Number | None = None
    beams: Whole | None = None
    prefix: Annotated[Text, Field(max_length=2_000)] | None = None
    min_length: Whole | None = None
    max_length: Whole | None = None
    priority: Annotated[Whole, Field(ge=-100, le=100)] | None = Field(None, description="Higher ones come first.")
    deadline: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="Seconds after which nobody wants the answer any more."
    )
    stream: Flag | None = Field(None, description="Answer with server-sent events.")
    progress: Flag | None = Field(
        None, description="In a stream: tell of every step, every pass, n* and the DNS image as soon as they are there."
    )
    partial_images: Annotated[Whole, Field(ge=0, le=3)] | None = Field(
        None, description="Partial pictures of each image in a stream; of each pass with progress."
    )
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp", "gif", "svg"] | None = Field(
        None, description="png (the default), jpeg or webp; only a PNG carries its settings."
    )
    output_compression: Annotated[Whole, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of jpeg and webp, 100 when left out."
    )
    background: Literal["transparent", "opaque", "auto"] | None = None

    @property
    def format(self) -> str:
        """How pictures are written. Raises ApiError for formats that there are not here."""
        if self.response_format == "url":
            raise _unsupported("response_format", "this server keeps no pictures to point at; ask for b64_json")
        if self.output_format in ("gif", "svg"):
            raise _unsupported("output_format", f"{self.output_format} is not written here; ask for png, jpeg or webp")
        if self.background == "transparent":
            raise _unsupported("background", "the models here paint the whole picture; ask for opaque or auto")
        return self.output_format or "png"

    def request(self, most: int, **more: Any) -> Request:
        """What is asked for, its seed chosen. Raises ApiError for more images than ``most``, or two sizes."""
        settings: dict[str, Any] = {"images": 1 if self.n is None else self.n, **more}
        if settings["images"] > most:
            raise ApiError(
                400, "invalid_value", f"n is {self.n}, this server makes at most {most} images at once; send more "
                "requests", "n"
            )  # fmt: skip
        settings["seed"] = random_seed() if self.seed in (None, -1) else self.seed
        if self.size not in (None, "auto"):
            width, height = map(int, str(self.size).split("x"))
            if (self.width or width, self.height or height) != (width, height):
                raise ApiError(
                    400, "invalid_value", f"size says {self.size}, width and height {self.width} x {self.height}; "
                    "say one of them", "size"
                )  # fmt: skip
            settings |= {"width": width, "height": height}
        own = {field.name for field in fields(Request)} & type(self).model_fields.keys()
        for name in sorted(own - settings.keys()):
            if (value := getattr(self, name)) is not None:
                settings[name] = value
        return Request(**settings)


class ImagesBody(Settings):
    """POST /v1/images/generations."""

    negative_prompt: Annotated[Text, Field(max_length=32_000)] | None = Field(
        None, description="Your own n*, which skips DNS; the empty text is plain guidance against ∅."
    )
    dnp: Flag | None = Field(None, description="False: plain guidance, without n*.")
    compare: Flag | None = Field(None, description="Also make the plain image.")
    sampler: Text | None = Field(None, description="Of the final pass. Also: sampler_name, scheduler.")
    steps: Whole | None = Field(None, description="Of the final pass. Also: num_inference_steps.")
    guidance: Guidance | None = Field(None, description="w of the final pass. Also: guidance_scale, cfg_scale.")
    eta: Number | None = None
    spacing: Text | None = None
    methods: Annotated[dict[str, Number], Field(max_length=16)] | None = None
    show: Annotated[list[Literal["dns", "plain"]], Field(max_length=2)] | None = Field(
        None, description="Give these images back besides."
    )

    def request(self, most: int, **more: Any) -> Request:
        """As of ``Settings``; showing the plain image asks for it."""
        if self.negative_prompt == "":
            more["dnp"] = False
        elif self.negative_prompt is not None:
            more["negative"] = self.negative_prompt
        if "plain" in (self.show or []):
            more["compare"] = True
        return super().request(most, **more)


class NegativesBody(Settings):
    """POST /v1/images/negatives: the DNS images and n* alone."""


class CaptionsBody(_Body):
    """POST /v1/captions."""

    image: Text | None = Field(None, description="An image file in base64, or as a data URL.")
    images: Annotated[list[Text], Field(min_length=1, max_length=64)] | None = None
    model: Annotated[Text, Field(max_length=200)] | None = None
    beams: Whole | None = None
    prefix: Annotated[Text, Field(max_length=2_000)] | None = None
    min_length: Whole | None = None
    max_length: Whole | None = None
    priority: Annotated[Whole, Field(ge=-100, le=100)] | None = None
    deadline: Annotated[Number, Field(gt=0)] | None = None


class PictureAnswer(BaseModel):
    """A picture in base64."""

    b64_json: str


class ImageAnswer(PictureAnswer):
    """One image, and how it came about."""

    revised_prompt: None = None
    seed: int
    negative_prompt: str
    dns_image: PictureAnswer | None = None
    plain_image: PictureAnswer | None = None


class TokenDetails(BaseModel):
    """What kinds of tokens there were."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """OpenAI's count of tokens; images are not made of tokens here."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class Warned(BaseModel):
    """What was not honoured to the letter."""

    param: str
    message: str


class Made(BaseModel):
    """What every answer tells of how it was made."""

    usage: Usage
    request: dict[str, Any] = Field(description="Every setting, explicit.")
    timings: dict[str, float] = Field(description="Seconds by phase.")
    warnings: list[Warned]
    model: str
    bundle: str
    backend: str
    precision: str | None
    runs_on: str
    id: str


class ImagesAnswer(Made):
    """Images, in OpenAI's form."""

    created: int
    data: list[ImageAnswer]
    output_format: str
    size: str
    quality: str
    background: str


class CaptionAnswer(BaseModel):
    """An image in words."""

    text: str


class CaptionsAnswer(BaseModel):
    """Captions, in the order of the images."""

    data: list[CaptionAnswer]
    id: str


class Model(BaseModel):
    """A name that ``model`` may have."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str = Field(description="The model that the name means.")
    dnp: dict[str, Any] | None = Field(None, description="What it is and what it takes; absent for an alias.")


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


def random_seed() -> int:
    """A seed for whoever names none."""
    return secrets.randbelow(_SEEDS)


def param_of(error: SettingsError, sent: Collection[str], names: Mapping[str, str]) -> str | None:
    """The field that ``error`` is about, as it was sent: of those that its sentence names the first, and one that was
    sent rather than others; None where none is named.

    ``names`` are the names that sentences use, by those of the body.
    """
    text = str(error).replace("negative prompt", "negative")
    if text.startswith("DNS pass: "):  # what follows names its settings as those of a pass
        names = {field: ours.removeprefix("dns_") for field, ours in names.items() if ours.startswith("dns_")}
    found = []
    for field, ours in names.items():
        word = "images must" if ours == "images" else ours  # a sentence may well be about images of some size
        if at := re.search(rf"\b{word}\b", text):
            if field in ("width", "height") and field not in sent and "size" in sent:
                field = "size"
            said = [name for name in (field, *SAME.get(field, ())) if name in sent]
            found.append((not said, at.start(), said[0] if said else field))
    return min(found)[2] if found else None


def _unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, "unsupported_value", f"{param}: {message}", param)
