"""Peers that have diffusers' own call: diffusers itself, optimum-onnx, optimum-intel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from job import Job, Point

from contenders.base import Captioner, Contender, Mark, Pixels


class DiffusersCall(Contender):
    """Whatever takes the arguments of diffusers' ``StableDiffusionPipeline``; captions by transformers in PyTorch."""

    _pipeline: Any
    _captioner: Any

    def image(self, prompt: str, negative: str, guidance: float, point: Point, mark: Mark) -> Pixels:
        import torch

        def on_step_end(pipeline: Any, index: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            mark()
            return {}

        result = self._pipeline(
            [prompt] * point.batch,
            negative_prompt=[negative] * point.batch,
            guidance_scale=guidance,
            num_inference_steps=point.steps,
            width=point.pixels,
            height=point.pixels,
            generator=[torch.Generator("cpu").manual_seed(self._seed + i) for i in range(point.batch)],
            output_type="np",
            callback_on_step_end=on_step_end,
        )
        return np.rint(np.asarray(result.images) * 255).astype(np.uint8)

    def caption(self, image: Pixels) -> str:
        text: str = self._captioner(image)
        return text

    def _ready(self, job: Job) -> None:
        """Quiet, with the noise of the job's seed, and the captioner beside the pipeline."""
        import torch

        torch.set_num_threads(job.threads)
        self._seed = job.seed
        self._pipeline.set_progress_bar_config(disable=True)
        self._captioner = Captioner(job.captioner, job.caption_tokens, getattr(self, "_dtype", None))


class Diffusers(DiffusersCall):
    """diffusers' pipeline in PyTorch: eager in ``dtype``, or with the UNet and the decoder compiled."""

    packages = ("torch", "diffusers", "transformers")

    def __init__(self, dtype: str = "float32", compiled: bool = False) -> None:
        self._wanted, self._compiled = dtype, compiled

    def load(self) -> None:
        import torch
        from diffusers import StableDiffusionPipeline
        from transformers import BlipForConditionalGeneration  # noqa: F401

        self._torch, self._kind = torch, StableDiffusionPipeline
        self._dtype = getattr(torch, self._wanted)

    def open(self, job: Job) -> None:
        self._pipeline = self._kind.from_pretrained(job.model, dtype=self._dtype)
        if self._compiled:
            self._pipeline.unet = self._torch.compile(self._pipeline.unet)
            self._pipeline.vae.decode = self._torch.compile(self._pipeline.vae.decode)
        self._ready(job)


class OptimumOnnx(DiffusersCall):
    """optimum-onnx's ``ORTStableDiffusionPipeline``; it has no class for BLIP, so PyTorch captions."""

    packages = ("optimum-onnx", "optimum", "onnxruntime", "torch", "diffusers", "transformers")

    @classmethod
    def convert(cls, job: Job, out: Path) -> None:
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        ORTStableDiffusionPipeline.from_pretrained(job.model, export=True).save_pretrained(out)

    def load(self) -> None:
        import onnxruntime
        from optimum.onnxruntime import ORTStableDiffusionPipeline
        from transformers import BlipForConditionalGeneration  # noqa: F401

        self._ort, self._kind = onnxruntime, ORTStableDiffusionPipeline

    def open(self, job: Job) -> None:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = job.threads
        self._pipeline = self._kind.from_pretrained(
            Path(job.converted) / "optimum-onnx", provider="CPUExecutionProvider", session_options=options
        )
        self._ready(job)


class OptimumIntel(DiffusersCall):
    """optimum-intel's ``OVStableDiffusionPipeline``, shapes left dynamic as exported; PyTorch captions."""

    packages = ("optimum-intel", "openvino", "torch", "diffusers", "transformers")

    @classmethod
    def convert(cls, job: Job, out: Path) -> None:
        from optimum.exporters.openvino import main_export
        from optimum.intel import OVConfig

        full = OVConfig(dtype="fp32")  # left to itself it compresses large models to 8 bits
        main_export(job.model, out, task="text-to-image", convert_tokenizer=True, ov_config=full)

    def load(self) -> None:
        from optimum.intel import OVStableDiffusionPipeline
        from transformers import BlipForConditionalGeneration  # noqa: F401

        self._kind = OVStableDiffusionPipeline

    def open(self, job: Job) -> None:
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(job.threads), "CACHE_DIR": ""}
        self._pipeline = self._kind.from_pretrained(
            Path(job.converted) / "optimum-intel", device="CPU", ov_config=settings
        )
        self._ready(job)
