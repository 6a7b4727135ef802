"""The contenders by name, in the order in which they are shown; the first is what the others are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    """How to make one contender, and where.

    Attributes:
        title: its name in a table.
        about: what has to be known to read its figures, for the notes under the table.
        environment: the virtual environment it runs in, ``requirements/<environment>.txt``.
        kind: module and class in this package, made with ``arguments``.
        works: what it can do, of ``steps``, ``image`` and ``dnp``.
        converted: the name in ``FORMATS`` of its own format of the weights, if it has one.
        sizes: the models it can run.
        needs: processor flags of which one must be there for it to be worth more than a few steps.
        scales: whether it is timed at other batches and sizes too.
    """

    title: str
    about: str
    environment: str
    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    works: tuple[str, ...] = ("image", "dnp")
    converted: str = ""
    sizes: tuple[str, ...] = ("default", "sd15")
    needs: tuple[str, ...] = ()
    scales: bool = True

    def make(self) -> Any:
        """The contender, not yet loaded."""
        return self.type()(**self.arguments)

    def type(self) -> Any:
        """Its class."""
        module, name = self.kind.split(":")
        return getattr(import_module(f"contenders.{module}"), name)


# Formats of weights by the folder they lie in: the environment that writes them, and module and class to ``convert``.
FORMATS: Mapping[str, tuple[str, str]] = {
    "optimum-onnx": ("optimum-onnx", "pipelines:OptimumOnnx"),
    "optimum-intel": ("optimum-intel", "pipelines:OptimumIntel"),
}

CONTENDERS: Mapping[str, Entry] = {
    "diffusers": Entry(
        title="diffusers, eager, fp32",
        about="PyTorch; captions by transformers, also PyTorch",
        environment="main",
        kind="pipelines:Diffusers",
    ),
    "diffusers-bf16": Entry(
        title="diffusers, eager, bf16",
        about="on a processor without bf16 units only a few steps, of the default model",
        environment="main",
        kind="pipelines:Diffusers",
        arguments={"dtype": "bfloat16"},
        needs=("avx512_bf16", "amx_bf16"),
        scales=False,
    ),
    "diffusers-compile": Entry(
        title="diffusers, torch.compile, fp32",
        about="UNet and VAE decoder compiled, by the first image; with an empty cache in the first round only",
        environment="main",
        kind="pipelines:Diffusers",
        arguments={"compiled": True},
        scales=False,
    ),
    "optimum-onnx": Entry(
        title="optimum-onnx, ONNX Runtime",
        about="has no BLIP: captions by transformers in PyTorch",
        environment="optimum-onnx",
        kind="pipelines:OptimumOnnx",
        converted="optimum-onnx",
    ),
    "optimum-intel": Entry(
        title="optimum-intel, OpenVINO",
        about="has no BLIP: captions by transformers in PyTorch",
        environment="optimum-intel",
        kind="pipelines:OptimumIntel",
        converted="optimum-intel",
    ),
    "openvino-genai": Entry(
        title="openvino-genai, C++ loop",
        about="has no BLIP: captions by transformers in PyTorch",
        environment="optimum-intel",
        kind="native:OpenVinoGenai",
        converted="optimum-intel",
    ),
    "stable-diffusion-cpp": Entry(
        title="stable-diffusion.cpp, ggml",
        about="the published architecture only; weights as stored, fp16; own vocabulary, DDIM with trailing steps, "
        "so its picture is another; captions by transformers in PyTorch",
        environment="stable-diffusion-cpp",
        kind="native:StableDiffusionCpp",
        sizes=("sd15",),
    ),
    "network-onnxruntime": Entry(
        title="the network alone, ONNX Runtime",
        about="our `denoise` graph called in a loop with the library's defaults: no pipeline",
        environment="main",
        kind="ours:Network",
        arguments={"library": "onnxruntime"},
        works=("steps",),
        scales=False,
    ),
    "network-openvino": Entry(
        title="the network alone, OpenVINO",
        about="our `denoise` graph called in a loop with the library's defaults: no pipeline",
        environment="main",
        kind="ours:Network",
        arguments={"library": "openvino"},
        works=("steps",),
        scales=False,
    ),
    "dnp-cpu": Entry(
        title="dnp-engine, `cpu`",
        about="one request for all of DNP, captions by its own graphs; opened from plans (`dnp build --backend cpu`)",
        environment="main",
        kind="ours:Ours",
        arguments={"backend": "cpu"},
    ),
    "dnp-openvino": Entry(
        title="dnp-engine, `openvino`",
        about="one request for all of DNP, captions by its own graphs",
        environment="main",
        kind="ours:Ours",
        arguments={"backend": "openvino"},
    ),
}
FIRST = next(iter(CONTENDERS))
