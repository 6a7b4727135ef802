"""What is asked for and what comes back: ``Request``, ``Step`` and ``Result``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dnp.engine.bundle.schema import shown
from dnp.engine.errors import SettingsError
from dnp.runtime.sampling.samplers import SamplerTable, is_guidance, sampler_table
from dnp.runtime.sampling.schedule import NoiseSchedule
from dnp.runtime.tokenizer import check_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from dnp.engine.bundle.bundle import Bundle

MAX_IMAGES = 256
Guidance = float | Sequence[float]


@dataclass(frozen=True)
class Request:
    """One request, in full. What is left ``None`` is taken from the bundle's defaults by ``resolve``.

    The DNS pass and the final pass have settings of their own; both start from the noise of ``seed`` unless
    ``dns_seed`` says otherwise. Image ``i`` of several uses ``seed + i``, as a list of diffusers generators would.

    Attributes:
        prompt: p, what the image should show.
        negative: n*, written by a person; skips DNS and captioning.
        dnp: False for plain classifier-free guidance against the empty prompt ∅.
        compare: also sample the plain image, for looking at beside the DNP one.
        guidance: w of the final pass, a number or one number a step.
        dns_guidance: s of the DNS pass, ``eps = eps(∅) + s·(eps(∅) − eps(p))`` (arXiv 2411.05473).
        eta, dns_eta: DDIM's share of fresh noise, 0 to 1.
        spacing: timestep spacing (``leading``, ``linspace``, ``trailing``); None is the sampler's usual one.
        beams, prefix, min_length, max_length: the captioner's search, lengths in tokens.
    """

    prompt: str
    negative: str | None = None
    dnp: bool = True
    compare: bool = False
    seed: int = 0
    images: int = 1
    height: int | None = None
    width: int | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: Guidance | None = None
    eta: float = 0.0
    spacing: str | None = None
    dns_seed: int | None = None
    dns_sampler: str | None = None
    dns_steps: int | None = None
    dns_guidance: Guidance | None = None
    dns_eta: float = 0.0
    dns_spacing: str | None = None
    beams: int = 1
    prefix: str = ""
    min_length: int = 0
    max_length: int | None = None

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Request:
        """The request that ``to_dict`` wrote. Raises SettingsError for an unknown or missing setting."""
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                near = get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise SettingsError(f"unknown setting {key!r}{hint}")
        if "prompt" not in settings:
            raise SettingsError("the settings name no 'prompt'; add one")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name, ready for JSON."""
        return asdict(self)

    def resolve(self, bundle: Bundle) -> Request:
        """This request with nothing left open: defaults filled in from ``bundle``, everything checked.

        Raises SettingsError for whatever cannot be honoured, before any work is done.
        """
        latents, defaults = bundle.latents, bundle.defaults
        given = replace(self, **{field.name: _plain(getattr(self, field.name)) for field in fields(self)})
        full = replace(
            given,
            height=latents.height * latents.pixels if given.height is None else given.height,
            width=latents.width * latents.pixels if given.width is None else given.width,
            sampler=defaults.sampler if given.sampler is None else given.sampler,
            steps=defaults.steps if given.steps is None else given.steps,
            guidance=_plain_numbers("guidance", defaults.guidance if given.guidance is None else given.guidance),
            dns_seed=given.seed if given.dns_seed is None else given.dns_seed,
            dns_sampler=defaults.dns_sampler if given.dns_sampler is None else given.dns_sampler,
            dns_steps=defaults.dns_steps if given.dns_steps is None else given.dns_steps,
            dns_guidance=_plain_numbers(
                "dns_guidance", defaults.dns_guidance if given.dns_guidance is None else given.dns_guidance
            ),
            max_length=bundle.caption.max_length if given.max_length is None else given.max_length,
        )
        full._check(bundle)
        return full

    @property
    def runs_dns(self) -> bool:
        """Whether n* has to be found: DNP is on and nobody wrote one."""
        return self.dnp and self.negative is None

    def final_table(self, schedule: NoiseSchedule) -> SamplerTable:
        """The sampler table of the final pass; of a resolved request."""
        assert self.sampler is not None and self.steps is not None and self.guidance is not None
        return sampler_table(schedule, self.sampler, self.steps, self.guidance, eta=self.eta, spacing=self.spacing)

    def dns_table(self, schedule: NoiseSchedule) -> SamplerTable:
        """The sampler table of the DNS pass: the guidance column is −s; of a resolved request."""
        assert self.dns_sampler is not None and self.dns_steps is not None and self.dns_guidance is not None
        s = self.dns_guidance
        w = [-v for v in s] if isinstance(s, Sequence) else -s
        try:
            return sampler_table(
                schedule, self.dns_sampler, self.dns_steps, w, eta=self.dns_eta, spacing=self.dns_spacing
            )
        except SettingsError as error:
            raise SettingsError(f"DNS pass: {error}") from error

    def _check(self, bundle: Bundle) -> None:
        _check_words("prompt", self.prompt)
        if self.negative is not None:
            _check_words("negative prompt", self.negative)
            if not self.dnp:
                raise SettingsError("a negative prompt was given, but DNP is switched off; drop one of the two")
        for flag in ("dnp", "compare"):
            if not isinstance(getattr(self, flag), bool):
                raise SettingsError(f"{flag} must be true or false, not {getattr(self, flag)!r}")
        _check_integer("images", self.images, 1, MAX_IMAGES)
        _check_integer("seed", self.seed, 0, 2**63 - MAX_IMAGES)
        _check_integer("dns_seed", self.dns_seed, 0, 2**63 - MAX_IMAGES)
        latents = bundle.latents
        grain = latents.multiple * latents.pixels
        for name, size, most in (
            ("height", self.height, latents.max_height * latents.pixels),
            ("width", self.width, latents.max_width * latents.pixels),
        ):
            _check_integer(name, size, grain, most)
            assert size is not None
            if size % grain:
                raise SettingsError(
                    f"{name} {size} does not fit the latents; use a multiple of {grain}, "
                    f"such as {max(grain, round(size / grain) * grain)}"
                )
        schedule = NoiseSchedule.from_config(bundle.schedule)
        self.final_table(schedule)
        self.dns_table(schedule)  # also where DNS does not run: what is stored with a picture is always valid


@dataclass(frozen=True)
class Step:
    """One step of the work, as a progress callback sees it.

    Attributes:
        phase: ``dns``, ``caption``, ``plain`` or ``final``.
        index: how many steps of the phase are done, from 1.
        total: how many there are (for ``caption`` the most there can be).
        preview: decodes the present latents to a uint8 ``[B, H, W, 3]`` array; costs one VAE decode. To be called
            before the next step: it shows the latents as they are then.
    """

    phase: str
    index: int
    total: int
    preview: Callable[[], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Result:
    """What a request gave.

    Attributes:
        arrays: the final images, uint8 ``[images, height, width, 3]``.
        dns_arrays, plain_arrays: the DNS and plain images in the same form; None where not asked for.
        negatives: the negative prompt of each image: n*, or ``""`` for plain guidance.
        request: the settings, all explicit; with ``bundle``, ``backend`` and ``precision`` they reproduce the images.
        seconds: time spent, by phase; ``total`` is the whole request.
        bundle: the fingerprint of the bundle.
        backend, precision: as they were asked for.
        runs_on: what really ran, as the library itself says.
    """

    arrays: npt.NDArray[np.uint8]
    dns_arrays: npt.NDArray[np.uint8] | None
    plain_arrays: npt.NDArray[np.uint8] | None
    negatives: list[str]
    request: Request
    seconds: dict[str, float]
    bundle: str
    backend: str
    precision: str | None
    runs_on: str

    @property
    def made_with(self) -> dict[str, str | None]:
        """What ran: ``bundle``, ``backend``, ``precision`` and ``runs_on``."""
        return {name: getattr(self, name) for name in ("bundle", "backend", "precision", "runs_on")}

    def save(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write every picture to ``folder`` as the ``dnp`` command does, with its settings inside, or none of them.

        They are called ``<prompt>-<seed>-<kind>.png``, the kinds being ``dnp`` (or ``plain``), ``dns`` and ``plain``;
        ``dnp generate --from-image`` reproduces each. A file that is there is replaced when it is the same picture, or
        with ``overwrite``. Returns the paths, final images first.

        Raises OutputError when the folder cannot be written to, or a file must not be replaced.
        """
        from dnp.runtime.pictures import kinds_of, output_folder, outputs, save

        folder = Path(folder)
        kinds = ["dns"] if self.dns_arrays is self.arrays else kinds_of(self.request)
        files = outputs(folder, self.request, self.made_with, kinds)
        with output_folder(folder, files, overwrite=overwrite):
            return save(self, files)

    @property
    def images(self) -> list[Image]:
        """The final images as PIL images."""
        return to_images(self.arrays)

    @property
    def dns_images(self) -> list[Image]:
        """The DNS images as PIL images; empty where DNS did not run."""
        return [] if self.dns_arrays is None else to_images(self.dns_arrays)

    @property
    def plain_images(self) -> list[Image]:
        """The plain images as PIL images; empty where they were not asked for."""
        return [] if self.plain_arrays is None else to_images(self.plain_arrays)


def to_images(arrays: npt.NDArray[np.uint8]) -> list[Image]:
    """uint8 ``[B, H, W, 3]`` to PIL images."""
    from PIL import Image

    return [Image.fromarray(array) for array in arrays]


def _plain(value: Any) -> Any:
    """A scalar of numpy as one that JSON can hold; anything else as it is."""
    if isinstance(value, np.floating):
        return float(value)  # a long double stays one under item()
    return value.item() if isinstance(value, np.generic | np.ndarray) and value.ndim == 0 else value


def _plain_numbers(name: str, guidance: Guidance) -> Guidance:
    """Numbers that JSON can hold, whatever numpy or tuple they came as. Raises SettingsError for what is no number."""
    if isinstance(guidance, np.ndarray | list | tuple):
        return [_plain_number(name, value) for value in guidance]
    return _plain_number(name, guidance)


def _plain_number(name: str, value: Any) -> float:
    if not is_guidance(value):
        raise SettingsError(f"{name} must be a finite number (or one a step), not {shown(value)}")
    return float(value)


def _check_words(name: str, text: object) -> None:
    if not check_text(text, name).strip():
        raise SettingsError(f"the {name} is empty; say what the image should {'not ' * (name != 'prompt')}show")


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise SettingsError(f"{name} must be an integer from {least} to {most}, not {shown(value)}")
