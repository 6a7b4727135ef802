"""What a contender is: four methods, and the DNP request as those write it who have a text-to-image pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from job import Job, Point

Pixels = npt.NDArray[np.uint8]
Mark = Callable[[], None]  # to be called after each denoising step


class Contender(ABC):
    """One way to run the model. What it imports, it imports in ``load``, so that the import can be timed."""

    packages: tuple[str, ...] = ()  # whose versions count

    @classmethod
    def convert(cls, job: Job, out: Path) -> None:
        """Write the weights in this contender's own format to ``out``, before anything is timed."""
        raise NotImplementedError(f"{cls.__name__} reads the folders of diffusers itself")

    @abstractmethod
    def load(self) -> None:
        """Import the libraries."""

    @abstractmethod
    def open(self, job: Job) -> None:
        """Load all that a DNP request needs, to compute in float32 on ``job.threads`` threads."""

    @abstractmethod
    def image(self, prompt: str, negative: str, guidance: float, point: Point, mark: Mark) -> Pixels:
        """Images of ``prompt`` against ``negative``, uint8 ``[B, H, W, 3]``, from the noise of ``job.seed``."""

    @abstractmethod
    def caption(self, image: Pixels) -> str:
        """``image``, uint8 ``[H, W, 3]``, in words: by greedy search of at most ``job.caption_tokens``."""

    def dnp(self, job: Job, mark: Mark) -> tuple[Pixels, str]:
        """A whole DNP request: the final image ``[H, W, 3]`` and n*.

        ``pipeline("", negative_prompt=p, guidance_scale=s + 1)`` is DNS:
        eps(p) + (s + 1)·(eps(∅) − eps(p)) = eps(∅) + s·(eps(∅) − eps(p)).
        """
        least = self.image("", job.prompt, job.dns_guidance + 1.0, job.point, mark)[0]
        negative = self.caption(least)
        return self.image(job.prompt, negative, job.guidance, job.point, mark)[0], negative

    def inside(self) -> float | None:
        """Seconds spent so far in the inference library's own run; None where that is not told."""
        return None

    def versions(self) -> dict[str, str]:
        """The installed version of each package that counts."""
        found = {}
        for package in self.packages:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "absent"
        return found


class Captioner:
    """BLIP in PyTorch, by transformers: what a user of a pipeline without a captioner has."""

    def __init__(self, folder: str, tokens: int, dtype: Any = None) -> None:
        import torch
        from transformers import BertTokenizer, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

        self._tokens = tokens
        self._dtype = torch.float32 if dtype is None else dtype
        # By their names: what a newer library wrote into the folder's configuration, an older one may not know.
        vocabulary = str(Path(folder) / "vocab.txt")
        tokenizer = BertTokenizer(vocabulary, bos_token="[DEC]", additional_special_tokens=["[ENC]"])
        self._processor = BlipProcessor(BlipImageProcessor.from_pretrained(folder), tokenizer)
        self._model = BlipForConditionalGeneration.from_pretrained(folder, dtype=self._dtype).eval()

    def __call__(self, image: Pixels) -> str:
        """The caption of ``image`` uint8 ``[H, W, 3]``."""
        import torch

        inputs = self._processor(images=image, return_tensors="pt")
        with torch.inference_mode():
            ids = self._model.generate(
                pixel_values=inputs["pixel_values"].to(self._dtype), num_beams=1, max_length=self._tokens
            )
        text: str = self._processor.decode(ids[0], skip_special_tokens=True)
        return text.strip()
