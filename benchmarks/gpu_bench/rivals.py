"""Who is measured: diffusers in PyTorch, eager and compiled, and this engine on each backend that runs on a GPU.

All make the same pictures: the same weights in fp16, the same noise, DDIM, both branches of guidance in one call. What
a contender imports it imports in ``load``.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "a large red circle left of a small blue square on a plain yellow background"
GUIDANCE, DNS_GUIDANCE = 7.5, 1.0
KERNEL_RUNS = 5  # steps that are profiled
Step = Callable[[], Any]


class Contender(ABC):
    """One way to run the model. ``job`` in ``open`` has the folders, the device, and the sizes of a request."""

    packages: tuple[str, ...] = ()

    @abstractmethod
    def load(self) -> None:
        """Import the libraries."""

    @abstractmethod
    def open(self, job: dict[str, Any]) -> None:
        """Load what a plain image needs at least."""

    @abstractmethod
    def plain(self, images: int, seed: int) -> np.ndarray:
        """Images of the prompt against the empty one, uint8 ``[B, H, W, 3]``, image i from the noise of seed + i."""

    @abstractmethod
    def dnp(self, images: int, seed: int) -> dict[str, Any]:
        """A whole DNP request for so many images; tells ``tokens``, those of the longest caption."""

    @abstractmethod
    def step(self, batch: int) -> tuple[Step, Step, Step]:
        """For steps of ``batch`` images: what puts them back to the first one, what launches one, and what waits."""

    @abstractmethod
    def runs_on(self) -> str:
        """What computes, in its own words."""

    def versions(self) -> dict[str, str]:
        found = {}
        for package in self.packages:
            with suppress(PackageNotFoundError):
                found[package] = version(package)
        return found

    def kernels(self, batch: int) -> list[dict[str, Any]]:
        """Name, milliseconds a step and launches a step of every kernel, the longest first; by PyTorch's profiler,
        which sees those of every library in its process.
        """
        import torch

        begin, step, wait = self.step(batch)
        for _ in range(4):
            step()
        begin()
        wait()
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CUDA] if torch.cuda.is_available() else [kinds.CPU]) as profile:
            for _ in range(KERNEL_RUNS):
                step()
            wait()
        found: dict[str, list[float]] = {}
        for event in profile.events():
            entry = found.setdefault(event.name, [0.0, 0.0])
            entry[0] += event.device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
            entry[1] += 1
        rows = [
            {"name": name, "ms": us / 1e3 / KERNEL_RUNS, "launches": count / KERNEL_RUNS}
            for name, (us, count) in found.items()
            if us
        ]
        return sorted(rows, key=lambda row: -row["ms"])


class Diffusers(Contender):
    """diffusers' pipeline, and BLIP by transformers; eager, or UNet and decoder by ``torch.compile``."""

    packages = ("torch", "diffusers", "transformers", "triton")

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled

    def load(self) -> None:
        import torch
        from diffusers import StableDiffusionPipeline
        from transformers import BlipForConditionalGeneration

        self._torch, self._kind, self._blip_kind = torch, StableDiffusionPipeline, BlipForConditionalGeneration

    def open(self, job: dict[str, Any]) -> None:
        torch = self._torch
        self._job, self._device = job, job["device"]
        self._dtype = torch.float16 if self._device == "cuda" else torch.float32
        self._pipeline = self._kind.from_pretrained(job["model"], torch_dtype=self._dtype, safety_checker=None)
        self._pipeline.to(self._device).set_progress_bar_config(disable=True)
        self._captioner: Any = None
        if self._compiled:
            for module in (self._pipeline.unet, self._pipeline.vae):
                module.to(memory_format=torch.channels_last)
            how = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
            self._pipeline.unet = torch.compile(self._pipeline.unet, **how)
            self._pipeline.vae.decode = torch.compile(self._pipeline.vae.decode, **how)

    def plain(self, images: int, seed: int) -> np.ndarray:
        return self._images([PROMPT] * images, [""] * images, GUIDANCE, seed)

    def dnp(self, images: int, seed: int) -> dict[str, Any]:
        # eps(p) + g·(eps(∅) − eps(p)) with g = s + 1 is DNS
        least = self._images([""] * images, [PROMPT] * images, DNS_GUIDANCE + 1, seed)
        texts, tokens = self._captions(least)
        self._images([PROMPT] * images, texts, GUIDANCE, seed)
        return {"tokens": tokens}

    def step(self, batch: int) -> tuple[Step, Step, Step]:
        torch = self._torch
        unet, like = self._pipeline.unet, {"device": self._device, "dtype": self._dtype}
        generator = torch.Generator(self._device).manual_seed(0)
        config = unet.config
        size = config.sample_size
        x = torch.randn(2 * batch, config.in_channels, size, size, generator=generator, **like)
        context = torch.randn(2 * batch, 77, config.cross_attention_dim, generator=generator, **like)
        if self._compiled:
            x = x.contiguous(memory_format=torch.channels_last)
        at = torch.tensor(500, device=self._device)

        def step() -> None:
            with torch.no_grad():
                unet(x, at, context, return_dict=False)

        return lambda: None, step, self._wait

    def runs_on(self) -> str:
        return "torch.compile, reduce-overhead, channels last" if self._compiled else "eager"

    def ceiling(self) -> dict[str, Any]:
        """Floating-point operations of a step of one image, by PyTorch's own count; and the most of them in a second
        that a large product of fp16 matrices reaches here.
        """
        torch = self._torch
        from torch.utils.flop_counter import FlopCounterMode

        _, step, wait = self.step(1)
        with FlopCounterMode(display=False) as counter:
            step()
        side = 8192 if self._device == "cuda" else 64
        a, b = (torch.randn(side, side, device=self._device, dtype=self._dtype) for _ in range(2))
        rates = []
        for _ in range(10):
            wait()
            started = time.perf_counter()
            for _ in range(10):
                a @ b
            wait()
            rates.append(10 * 2 * side**3 / (time.perf_counter() - started))
        return {"operations": counter.get_total_flops(), "per_second": float(np.median(rates[2:]))}

    def _images(self, prompts: list[str], negatives: list[str], guidance: float, seed: int) -> np.ndarray:
        generators = [self._torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
        result = self._pipeline(
            prompts, negative_prompt=negatives, guidance_scale=guidance, generator=generators,
            num_inference_steps=self._job["steps"], height=self._job["pixels"], width=self._job["pixels"],
            output_type="np",
        )  # fmt: skip
        return np.rint(result.images * 255).astype(np.uint8)

    def _captions(self, images: np.ndarray) -> tuple[list[str], int]:
        torch = self._torch
        if self._captioner is None:
            from transformers import BertTokenizer, BlipImageProcessor

            folder = self._job["captioner"]
            self._captioner = self._blip_kind.from_pretrained(folder, dtype=self._dtype).to(self._device).eval()
            self._processor = BlipImageProcessor.from_pretrained(folder)
            vocabulary = str(Path(folder) / "vocab.txt")
            self._words = BertTokenizer(vocabulary, bos_token="[DEC]", additional_special_tokens=["[ENC]"])
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            ids = self._captioner.generate(
                pixel_values=pixels.to(self._device, self._dtype), num_beams=1, max_length=self._job["tokens"]
            )
        return [self._words.decode(row, skip_special_tokens=True).strip() for row in ids], int(ids.shape[1])

    def _wait(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()


class Ours(Contender):
    """``dnp.Pipeline`` on one backend, from plans or, where ``planned`` is false, without."""

    packages = ("dnp-engine", "onnxruntime-gpu", "onnxruntime", "tensorrt", "cuda-bindings", "numpy")

    def __init__(self, backend: str, planned: bool = True) -> None:
        self._backend, self._planned = backend, planned

    def load(self) -> None:
        from dnp import Pipeline

        self._kind = Pipeline

    def open(self, job: dict[str, Any]) -> None:
        self._job = job
        plans = Path(job["plans"]) if self._planned else Path(job["plans"]) / "none"
        self._pipeline = self._kind.open(job["bundle"], self._backend, plans=plans)

    def plain(self, images: int, seed: int) -> np.ndarray:
        result = self._request(images, seed, self._job["steps"], dnp=False)
        pixels: np.ndarray = result.arrays
        return pixels

    def dnp(self, images: int, seed: int) -> dict[str, Any]:
        settings = {"dns_steps": self._job["steps"], "dns_sampler": "ddim", "dns_guidance": DNS_GUIDANCE}
        result = self._request(images, seed, self._job["steps"], max_length=self._job["tokens"], **settings)
        return {"phases": result.seconds, "negative": result.negatives[0][:200]}

    def step(self, batch: int) -> tuple[Step, Step, Step]:
        self._request(batch, 0, self._job["steps"], dnp=False)
        session = self._pipeline.sessions["denoise"]  # at the sizes of this request, and goes on from there
        state, index = (session.inputs[name] for name in ("state", "index"))
        noise = np.random.default_rng(0).standard_normal(state.shape, np.float32)

        def begin() -> None:  # steps beyond the last would make of the state what no request has
            state.write(noise)
            index.write(np.zeros(index.shape, np.int64))

        return begin, session.run, session.outputs["latents"].read

    def runs_on(self) -> str:
        found: str = self._pipeline.runs_on
        return found

    def _request(self, images: int, seed: int, steps: int, **settings: Any) -> Any:
        size = {"width": self._job["pixels"], "height": self._job["pixels"]}
        return self._pipeline(
            PROMPT, seed=seed, images=images, steps=steps, sampler="ddim", guidance=GUIDANCE, **size, **settings
        )


CONTENDERS: dict[str, tuple[str, Callable[[], Contender]]] = {  # the first ones are the peers
    "diffusers": ("diffusers, eager", lambda: Diffusers(compiled=False)),
    "diffusers-compiled": ("diffusers, torch.compile", lambda: Diffusers(compiled=True)),
    "cuda": ("dnp-engine, `cuda` with plans", lambda: Ours("cuda")),
    "cuda-plain": ("dnp-engine, `cuda` without", lambda: Ours("cuda", planned=False)),
    "tensorrt": ("dnp-engine, `tensorrt`", lambda: Ours("tensorrt")),
}
PEER, EAGER = "diffusers-compiled", "diffusers"


def installed() -> list[str]:
    """The contenders whose libraries are there."""
    return [name for name in CONTENDERS if name != "tensorrt" or find_spec("tensorrt") is not None]


def make(name: str) -> Contender:
    """The contender, nothing imported."""
    return CONTENDERS[name][1]()
