"""Peers whose loop is C++: openvino-genai and stable-diffusion.cpp. Neither has BLIP, so PyTorch captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from job import Job, Point

from contenders.base import Captioner, Contender, Mark, Pixels


class OpenVinoGenai(Contender):
    """openvino-genai's ``Text2ImagePipeline`` on the folder that optimum-intel exported."""

    packages = ("openvino-genai", "openvino", "torch", "transformers")

    def load(self) -> None:
        import openvino_genai
        from transformers import BlipForConditionalGeneration  # noqa: F401

        self._genai = openvino_genai

    def open(self, job: Job) -> None:
        import torch

        torch.set_num_threads(job.threads)
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": job.threads}
        self._pipeline = self._genai.Text2ImagePipeline(str(Path(job.converted) / "optimum-intel"), "CPU", **settings)
        self._seed = job.seed
        self._caption = Captioner(job.captioner, job.caption_tokens)

    def image(self, prompt: str, negative: str, guidance: float, point: Point, mark: Mark) -> Pixels:
        def callback(step: int, steps: int, latent: Any) -> bool:
            mark()
            return False

        result = self._pipeline.generate(
            prompt,
            negative_prompt=negative,
            guidance_scale=guidance,
            num_inference_steps=point.steps,
            width=point.pixels,
            height=point.pixels,
            num_images_per_prompt=point.batch,
            generator=self._genai.TorchGenerator(self._seed),
            callback=callback,
        )
        return np.array(result.data, np.uint8)

    def caption(self, image: Pixels) -> str:
        return self._caption(image)


class StableDiffusionCpp(Contender):
    """stable-diffusion.cpp by its Python package: weights as they are stored, its own tokenizer and vocabulary."""

    packages = ("stable-diffusion-cpp-python", "torch", "transformers")

    def load(self) -> None:
        from stable_diffusion_cpp import StableDiffusion
        from transformers import BlipForConditionalGeneration  # noqa: F401

        self._kind = StableDiffusion

    def open(self, job: Job) -> None:
        import torch

        torch.set_num_threads(job.threads)
        self._mark: Mark = lambda: None
        self._seed = job.seed
        self._pipeline = self._kind(
            model_path=job.model, n_threads=job.threads, rng_type="cpu", vae_decode_only=True, verbose=False
        )
        self._caption = Captioner(job.captioner, job.caption_tokens)

    def image(self, prompt: str, negative: str, guidance: float, point: Point, mark: Mark) -> Pixels:
        def progress(step: int, steps: int, seconds: float) -> None:
            if step and steps == point.steps:
                mark()

        images = self._pipeline.generate_image(
            prompt=prompt,
            negative_prompt=negative,
            cfg_scale=guidance,
            sample_steps=point.steps,
            sample_method="ddim_trailing",
            width=point.pixels,
            height=point.pixels,
            batch_count=point.batch,
            seed=self._seed,
            progress_callback=progress,
        )
        return np.stack([np.asarray(image.convert("RGB")) for image in images])

    def caption(self, image: Pixels) -> str:
        return self._caption(image)
