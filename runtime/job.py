"""A request, resolved: everything decided and checked, with the sampler tables that it runs."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from dnp.engine.bundle.bundle import Bundle
from dnp.engine.bundle.schema import shown
from dnp.engine.errors import SettingsError
from dnp.runtime.captioning.captioner import CaptionSettings
from dnp.runtime.request import MAX_IMAGES, Guidance, Request
from dnp.runtime.sampling.samplers import PERP_NEG, SamplerTable, is_guidance, sampler_table
from dnp.runtime.sampling.schedule import Schedule
from dnp.runtime.tokenizer import check_text

MAX_WINDOWS = 8


@dataclass(frozen=True, eq=False)
class Pass:
    """One sampling run's settings: of the DNS pass and the final one. ``guidance`` is w, ``-s`` of the DNS pass.

    Two are equal whose values are, to the bit and in the same types: 1 is not True, nor 0.0 the same as -0.0.

    Attributes:
        spacing: of the timesteps; None is the sampler's usual one.
        embedded: the guidance scale that a distilled model takes as an input; others do not read it.
        methods: parameters of guidance methods, by the names of ``samplers.METHODS``.
    """

    sampler: str
    steps: int
    guidance: Guidance
    eta: float
    spacing: str | None
    embedded: float
    methods: Mapping[str, float]

    @cached_property
    def _bits(self) -> bytes:
        return pickle.dumps([getattr(self, field.name) for field in fields(self)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pass) and self._bits == other._bits

    def __hash__(self) -> int:
        return hash(self._bits)

    @lru_cache(maxsize=64)  # noqa: B019  # many requests have the same settings, and a table takes milliseconds
    def table(self, schedule: Schedule) -> SamplerTable:
        """What the ``denoise`` graph runs. Raises SettingsError for what cannot be honoured."""
        return sampler_table(
            schedule,
            self.sampler,
            self.steps,
            self.guidance,
            eta=self.eta,
            spacing=self.spacing,
            embedded=self.embedded,
            methods=self.methods,
        )


@dataclass(frozen=True)
class Job:
    """What is to be done, with nothing left open.

    Attributes:
        request: the same in a user's words, every setting explicit: what is kept with a picture.
        negative: n* as a person wrote it; empty where ∅ is meant, or where DNS has to find it.
        runs_dns: whether n* has to be found.
        height, width: of the images, in pixels.
        seeds, dns_seeds: of each image.
        final, dns: the sampler tables.
    """

    request: Request
    prompt: str
    negative: str
    runs_dns: bool
    compare: bool
    height: int
    width: int
    windows: int
    seeds: tuple[int, ...]
    dns_seeds: tuple[int, ...]
    final: SamplerTable
    dns: SamplerTable
    caption: CaptionSettings

    @property
    def images(self) -> int:
        """How many images are asked for."""
        return len(self.seeds)

    @property
    def tables(self) -> tuple[SamplerTable, ...]:
        """Those that are run."""
        return (self.dns, self.final) if self.runs_dns else (self.final,)


def resolve(request: Request, bundle: Bundle, schedule: Schedule) -> Job:
    """The job that ``request`` is with the defaults of ``bundle``; the captioner's own limits are not checked here.

    Raises SettingsError for whatever cannot be honoured, before any work is done.
    """
    latents, defaults = bundle.latents, bundle.defaults
    given = replace(request, **{field.name: _plain(getattr(request, field.name)) for field in fields(request)})
    scale = latents.vae_scale_factor
    full = replace(
        given,
        height=latents.height * scale if given.height is None else given.height,
        width=latents.width * scale if given.width is None else given.width,
        sampler=defaults.final.sampler if given.sampler is None else given.sampler,
        steps=defaults.final.steps if given.steps is None else given.steps,
        guidance=_numbers("guidance", defaults.final.guidance if given.guidance is None else given.guidance),
        dns_seed=given.seed if given.dns_seed is None else given.dns_seed,
        dns_sampler=defaults.dns.sampler if given.dns_sampler is None else given.dns_sampler,
        dns_steps=defaults.dns.steps if given.dns_steps is None else given.dns_steps,
        dns_guidance=_numbers(
            "dns_guidance", defaults.dns.guidance if given.dns_guidance is None else given.dns_guidance
        ),
        max_length=bundle.caption.max_length if given.max_length is None else given.max_length,
    )
    _check(full, bundle)
    schedule = schedule.sized(_known(full.height) // scale, _known(full.width) // scale)
    final, dns = _passes(full)
    try:
        dns_table = dns.table(schedule)  # also where DNS does not run: what is stored with a picture is always valid
    except SettingsError as error:
        raise SettingsError(f"DNS pass: {error}") from error
    return Job(
        request=full,
        prompt=full.prompt,
        negative=full.negative or "",
        runs_dns=full.runs_dns,
        compare=full.compare,
        height=_known(full.height),
        width=_known(full.width),
        windows=full.windows,
        seeds=tuple(range(full.seed, full.seed + full.images)),
        dns_seeds=tuple(range(_known(full.dns_seed), _known(full.dns_seed) + full.images)),
        final=final.table(schedule),
        dns=dns_table,
        caption=CaptionSettings(full.beams, full.prefix, full.min_length, _known(full.max_length)),
    )


def _passes(full: Request) -> tuple[Pass, Pass]:
    """The final pass and the DNS pass, whose guidance has the opposite sign: eps = eps(∅) + s (eps(∅) − eps(p))."""
    assert full.sampler is not None and full.guidance is not None
    assert full.dns_sampler is not None and full.dns_guidance is not None
    s = full.dns_guidance
    w = [-v for v in s] if isinstance(s, Sequence) else -s
    shared = full.embedded_guidance
    return (
        Pass(full.sampler, _known(full.steps), full.guidance, full.eta, full.spacing, shared, full.methods),
        Pass(full.dns_sampler, _known(full.dns_steps), w, full.dns_eta, full.dns_spacing, shared, {}),
    )


def _check(full: Request, bundle: Bundle) -> None:
    if full.negative is None:
        _check_words("prompt", full.prompt)
    else:
        check_text(full.prompt, "prompt")  # an empty one is ∅: what n* alone does
        _check_words("negative prompt", full.negative)
        if not full.dnp:
            raise SettingsError("a negative prompt was given, but DNP is switched off; drop one of the two")
    for flag in ("dnp", "compare"):
        if not isinstance(getattr(full, flag), bool):
            raise SettingsError(f"{flag} must be true or false, not {getattr(full, flag)!r}")
    _check_integer("images", full.images, 1, MAX_IMAGES)
    _check_integer("windows", full.windows, 1, MAX_WINDOWS)
    _check_integer("seed", full.seed, 0, 2**63 - MAX_IMAGES)
    _check_integer("dns_seed", full.dns_seed, 0, 2**63 - MAX_IMAGES)
    latents = bundle.latents
    grain = latents.multiple * latents.vae_scale_factor
    for name, size, most in (
        ("height", full.height, latents.max_height * latents.vae_scale_factor),
        ("width", full.width, latents.max_width * latents.vae_scale_factor),
    ):
        _check_integer(name, size, grain, most)
        if _known(size) % grain:
            raise SettingsError(
                f"{name} {size} does not fit the latents; use a multiple of {grain}, "
                f"such as {max(grain, round(_known(size) / grain) * grain)}"
            )
    if not is_guidance(full.embedded_guidance):
        raise SettingsError(f"embedded_guidance must be a finite number, not {shown(full.embedded_guidance)}")
    if full.embedded_guidance != 1 and not bundle.guidance.embedded:
        raise SettingsError("embedded_guidance is for distilled models whose network takes it; use guidance")
    if not isinstance(full.methods, dict) or not all(is_guidance(value) for value in full.methods.values()):
        raise SettingsError(f"methods must be numbers by name, such as {{'rescale': 0.7}}, not {shown(full.methods)}")
    if full.methods and not bundle.guidance.methods:
        raise SettingsError(
            "this bundle's graph has no guidance methods; export the model again with --guidance-methods"
        )
    if PERP_NEG in full.methods and bundle.guidance.roles < 3:
        raise SettingsError(
            "perp_neg needs a third branch, and this bundle's graph has two; export the model again with "
            "--guidance-methods"
        )
    if PERP_NEG in full.methods and not full.dnp:
        raise SettingsError("perp_neg weighs a negative prompt, but DNP is switched off; drop one of the two")


def _known(value: int | None) -> int:
    """A number that defaults have filled in by now."""
    assert value is not None
    return value


def _plain(value: Any) -> Any:
    """A scalar of numpy as one that JSON can hold; anything else as it is."""
    if isinstance(value, np.floating):
        return float(value)  # a long double stays one under item()
    return value.item() if isinstance(value, np.generic | np.ndarray) and value.ndim == 0 else value


def _numbers(name: str, guidance: Guidance) -> Guidance:
    """Numbers that JSON can hold, whatever numpy or tuple they came as. Raises SettingsError for what is no number."""
    if isinstance(guidance, np.ndarray | list | tuple):
        return [_number(name, value) for value in guidance]
    return _number(name, guidance)


def _number(name: str, value: Any) -> float:
    if not is_guidance(value):
        raise SettingsError(f"{name} must be a finite number (or one a step), not {shown(value)}")
    return float(value)


def _check_words(name: str, text: object) -> None:
    remedy = "say what the image should " + ("show" if name == "prompt" else "not show, or switch DNP off (--no-dnp)")
    if not check_text(text, name).strip():
        raise SettingsError(f"the {name} is empty; {remedy}")


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise SettingsError(f"{name} must be an integer from {least} to {most}, not {shown(value)}")
