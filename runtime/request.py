"""What is asked for: ``Request``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from dnp.engine.errors import SettingsError

MAX_IMAGES = 256
Guidance = float | Sequence[float]


@dataclass(frozen=True)
class Request:
    """One request, in a user's words. What is left ``None`` is taken from the bundle's defaults.

    The DNS pass and the final pass have settings of their own; both start from the noise of ``seed`` unless
    ``dns_seed`` says otherwise. Image ``i`` of several uses ``seed + i``, as a list of diffusers generators would.

    Attributes:
        prompt: p, what the image should show. Beside a negative prompt it may be empty: ∅, for n* alone.
        negative: n*, written by a person; skips DNS and captioning.
        dnp: False for plain classifier-free guidance against the empty prompt ∅.
        windows: how many windows of the text encoder (75 tokens, of Stable Diffusion) a prompt may fill.
        compare: also sample the plain image, for looking at beside the DNP one.
        guidance: w of the final pass, a number or one number a step.
        dns_guidance: s of the DNS pass, ``eps = eps(∅) + s·(eps(∅) − eps(p))`` (arXiv 2411.05473).
        eta, dns_eta: DDIM's share of fresh noise, 0 to 1.
        spacing: timestep spacing (``leading``, ``linspace``, ``trailing``); None is the sampler's usual one.
        embedded_guidance: the guidance scale that the network of a distilled model takes as an input.
        methods: parameters of guidance methods in the final pass, for bundles exported with them: ``rescale`` (φ),
            ``norm_limit`` and ``parallel`` (APG's r and η), ``zero_star`` (1: CFG-Zero*), ``norm_cap``, ``perp_neg``
            (Perp-Neg's weight of the negative prompt, which the other branch then leaves to ∅).
        beams, prefix, min_length, max_length: the captioner's search, lengths in tokens.
    """

    prompt: str
    negative: str | None = None
    dnp: bool = True
    compare: bool = False
    seed: int = 0
    images: int = 1
    windows: int = 1
    height: int | None = None
    width: int | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: Guidance | None = None
    eta: float = 0.0
    spacing: str | None = None
    embedded_guidance: float = 1.0
    methods: dict[str, float] = field(default_factory=dict)
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

    @property
    def runs_dns(self) -> bool:
        """Whether n* has to be found: DNP is on and nobody wrote one."""
        return self.dnp and self.negative is None
