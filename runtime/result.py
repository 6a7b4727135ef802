"""What comes back: each ``Step`` of the work, and the ``Result``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from dnp.engine.errors import SettingsError
from dnp.runtime.pictures import kinds_of, output_folder, outputs, save
from dnp.runtime.request import Request

MADE_WITH: Final = ("bundle", "backend", "precision", "runs_on")
"""The fields of a ``Result`` that say what ran."""


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
        """What ran, by the names of ``MADE_WITH``."""
        return {name: getattr(self, name) for name in MADE_WITH}

    def save(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write every picture to ``folder`` as the ``dnp`` command does, with its settings inside, or none of them.

        They are called ``<prompt>-<seed>-<kind>.png``, the kinds being ``dnp`` (or ``plain``), ``dns`` and ``plain``;
        ``dnp generate --from-image`` reproduces each. A file that is there is replaced when it is the same picture, or
        with ``overwrite``. Returns the paths, final images first.

        Raises OutputError when the folder cannot be written to, or a file must not be replaced.
        """
        folder = Path(folder)
        kinds = ["dns"] if self.dns_arrays is self.arrays else kinds_of(self.request)
        files = outputs(folder, self.request, self.made_with, kinds)
        with output_folder(folder, files, overwrite=overwrite):
            return save(files, self.by_kind, self.negatives)

    @property
    def by_kind(self) -> dict[str, list[Image.Image]]:
        """The pictures by their kinds, the final images first: ``dnp`` or ``plain``, ``dns``, ``plain``."""
        final = "dnp" if self.request.dnp else "plain"
        return {"plain": self.plain_images, "dns": self.dns_images, final: self.images}

    @property
    def images(self) -> list[Image.Image]:
        """The final images as PIL images."""
        return to_images(self.arrays)

    @property
    def dns_images(self) -> list[Image.Image]:
        """The DNS images as PIL images; empty where DNS did not run."""
        return [] if self.dns_arrays is None else to_images(self.dns_arrays)

    @property
    def plain_images(self) -> list[Image.Image]:
        """The plain images as PIL images; empty where they were not asked for."""
        return [] if self.plain_arrays is None else to_images(self.plain_arrays)


def to_images(arrays: npt.NDArray[np.uint8]) -> list[Image.Image]:
    """uint8 ``[B, H, W, 3]`` to PIL images."""
    return [Image.fromarray(array) for array in arrays]


def pixels_of(images: Iterable[Image.Image]) -> list[npt.NDArray[np.uint8]]:
    """PIL images, whose sizes may differ, to uint8 ``[H, W, 3]`` each. Raises SettingsError for what is none."""
    if isinstance(images, Image.Image) or not isinstance(images, Iterable):
        raise SettingsError(f"caption takes a list of PIL images, not one {type(images).__name__}")
    images = list(images)
    for image in images:
        if not isinstance(image, Image.Image):
            raise SettingsError(
                f"caption takes PIL images, not {type(image).__name__}; make one with PIL.Image.fromarray"
            )
    return [np.asarray(image.convert("RGB")) for image in images]
