"""What is asked for and what comes back: ``Request``, ``Step`` and ``Result``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dnp.engine.errors import SettingsError

if TYPE_CHECKING:
    from PIL.Image import Image


MAX_IMAGES = 256
Guidance = float | Sequence[float]


@dataclass(frozen=True)
class Request:
    """One request, in a user's words. What is left ``None`` is taken from the bundle's defaults.

    The DNS pass and the final pass have settings of their own; both start from the noise of ``seed`` unless
    ``dns_seed`` says otherwise. Image ``i`` of several uses ``seed + i``, as a list of diffusers generators would.

    Attributes:
        prompt: p, what the image should show.
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
