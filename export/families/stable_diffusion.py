"""Stable Diffusion 1.x as three graphs: ``encode_text``, ``denoise`` and ``decode_latents``.

Latent diffusion: arXiv 2112.10752; classifier-free guidance: arXiv 2207.12598; diffusion-negative sampling,
which is the same step with the sign of w reversed: arXiv 2411.05473.
Shapes: B batch, N slots, C h w latents, L D text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dnp.engine.bundle import columns
from dnp.engine.errors import ExportError
from dnp.export.families.lora import check_fit, merge
from dnp.export.families.source import Source
from dnp.export.fp16.precision import Precision, dtype_of, in_precision
from dnp.export.graph import Array, Dims, GraphExport, Tensor
from dnp.export.loading import load_model, warnings_refused

# The largest error allowed, by graph and precision; see GraphExport.bounds. Images are in grey levels.
BOUNDS: Mapping[str, Mapping[Precision, float]] = {
    "encode_text": {"fp32": 1e-4, "fp16": 2e-2},
    "denoise": {"fp32": 1e-4, "fp16": 2e-2},
    "decode_latents": {"fp32": 1, "fp16": 8},
}


class EncodeText(nn.Module):
    """``ids`` int64 ``[B, L]`` to the context ``[B, L, D]``, the text encoder's last hidden state."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """See the class."""
        context: torch.Tensor = self.text_encoder(input_ids=ids).last_hidden_state
        return context.float()


class Denoise(nn.Module):
    """One sampler step for each sample, whichever sampler it uses: see the architecture's "denoise".

    Only the UNet computes in the bundle's precision. State, table and the combination of the guidance
    branches are float32, and weighted sums are not written as matrix products, which GPUs round to TF32.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        state: torch.Tensor,
        index: torch.Tensor,
        table: torch.Tensor,
        noise: torch.Tensor,
        base_context: torch.Tensor,
        prompt_context: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[B, N, C, h, w]``, ``[B]``, ``[B, rows, 30]``, ``[B, draws, C, h, w]``, twice ``[B, L, D]`` to
        ``next_state [B, N, C, h, w]``, ``next_index [B]`` and ``latents [B, C, h, w]``.
        """
        row = _entry(table, index)
        z = _entry(noise, index)
        t, w = row[:, columns.TIMESTEP], row[:, columns.GUIDANCE]
        E, B, C = (_over_latents(row[:, part]) for part in (columns.INPUT, columns.OUTPUT, columns.NOISE))
        A = _over_latents(row[:, columns.STATE].reshape(-1, columns.SLOTS, columns.SLOTS))

        x = (E * state).sum(1)
        o = self._guided(x, t, _over_latents(w), base_context, prompt_context)
        next_state = (A * state.unsqueeze(1)).sum(2) + B * o.unsqueeze(1) + C * z.unsqueeze(1)
        return next_state, index + 1, next_state[:, 0]

    def _guided(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        w: torch.Tensor,
        base_context: torch.Tensor,
        prompt_context: torch.Tensor,
    ) -> torch.Tensor:
        """Both branches in one call, base first; w is any number, of either sign."""
        dtype = dtype_of(self.unet)
        x = x.to(dtype)
        context = torch.cat([base_context, prompt_context]).to(dtype)
        outputs = self.unet(torch.cat([x, x]), torch.cat([t, t]), context, return_dict=False)[0].float()
        ob, op = outputs.reshape(2, *x.shape).unbind(0)
        guided: torch.Tensor = ob + w * (op - ob)
        return guided


class DecodeLatents(nn.Module):
    """Latents ``[B, C, h, w]``, scaled as the UNet has them, to an image uint8 ``[B, f·h, f·w, 3]``."""

    def __init__(self, vae: Any, scaling: float) -> None:
        super().__init__()
        self.vae = vae
        self.scaling = scaling

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """See the class. Rounds to even, as numpy does; TensorRT wants the uint8 cast to be last."""
        vae: Any = self.vae
        image: torch.Tensor = vae.decode((latents / self.scaling).to(dtype_of(vae)), return_dict=False)[0]
        levels = ((image.float() / 2 + 0.5).clamp(0, 1) * 255).round()
        return levels.permute(0, 2, 3, 1).to(torch.uint8)


def encode_text(source: Source, precision: Precision) -> GraphExport:
    """The text encoder's graph."""
    module = EncodeText(_load(source, "text_encoder")).eval()
    ids = Tensor(("batch", source.length), "int64")

    def fresh(rng: np.random.Generator, dims: Dims) -> dict[str, Array]:
        return {"ids": rng.integers(0, source.vocabulary, ids.resolve(dims))}

    return GraphExport(
        name="encode_text",
        module=in_precision(module, precision),
        inputs={"ids": ids},
        outputs={"context": Tensor(("batch", source.length, source.dim))},
        fresh_inputs=fresh,
        example={"batch": 2},
        checks=[{"batch": 3}, {"batch": 1}],
        bounds={"context": BOUNDS["encode_text"][precision]},
        reference=None if precision == "fp32" else module,
    )


def denoise(source: Source, precision: Precision) -> GraphExport:
    """The step graph."""
    module = Denoise(_load(source, "unet")).eval()
    m = source.multiple
    latents = (source.channels, "height", "width")
    state = Tensor(("batch", columns.SLOTS, *latents))
    context = Tensor(("batch", source.length, source.dim))
    bound = BOUNDS["denoise"][precision]
    inputs = {
        "state": state,
        "index": Tensor(("batch",), "int64"),
        "table": Tensor(("batch", "rows", columns.ROW)),
        "noise": Tensor(("batch", "draws", *latents)),
        "base_context": context,
        "prompt_context": context,
    }

    def fresh(rng: np.random.Generator, dims: Dims) -> dict[str, Array]:
        arrays: dict[str, Array] = {
            name: rng.standard_normal(tensor.resolve(dims), dtype=np.float32) for name, tensor in inputs.items()
        }
        arrays["index"] = rng.integers(0, dims["rows"] + 2, dims["batch"])  # the end is past, too
        table = arrays["table"]
        table *= 0.5
        table[..., columns.TIMESTEP] = rng.uniform(0, 999, table.shape[:2])
        table[..., columns.GUIDANCE] = rng.choice([-3.0, 0.0, 1.0, 7.5], table.shape[:2])
        return arrays

    return GraphExport(
        name="denoise",
        module=in_precision(module, precision),
        inputs=inputs,
        outputs={
            "next_state": state,
            "next_index": Tensor(("batch",), "int64"),
            "latents": Tensor(("batch", *latents)),
        },
        fresh_inputs=fresh,
        example={"batch": 2, "rows": 3, "draws": 2, "height": 2 * m, "width": 2 * m},
        checks=[
            {"batch": 3, "rows": 5, "draws": 5, "height": 3 * m, "width": 2 * m},
            {"batch": 1, "rows": 1, "draws": 1, "height": source.height, "width": source.width},
        ],
        bounds={"next_state": bound, "next_index": 0, "latents": bound},
        reference=None if precision == "fp32" else module,
        multiples={"height": m, "width": m},
        traced={"batch": 31},  # from 64 rows on, diffusers makes a copy for the sake of an old CUDA bug
    )


def decode_latents(source: Source, precision: Precision) -> GraphExport:
    """The VAE decoder's graph; the encoder is not needed."""
    module = DecodeLatents(_load(source, "vae"), source.scaling).eval()
    f, m = source.pixels, source.multiple
    latents = Tensor(("batch", source.channels, "height", "width"))

    def fresh(rng: np.random.Generator, dims: Dims) -> dict[str, Array]:
        return {"latents": rng.standard_normal(latents.resolve(dims), dtype=np.float32)}

    return GraphExport(
        name="decode_latents",
        module=in_precision(module, precision),
        inputs={"latents": latents},
        outputs={"image": Tensor(("batch", f"{f}*height", f"{f}*width", 3), "uint8")},
        fresh_inputs=fresh,
        example={"batch": 2, "height": 2 * m, "width": 2 * m},
        checks=[
            {"batch": 3, "height": 3 * m, "width": 2 * m},
            {"batch": 1, "height": source.height, "width": source.width},
        ],
        bounds={"image": BOUNDS["decode_latents"][precision]},
        reference=None if precision == "fp32" else module,
    )


# In this order; each is called when its turn has come, so that one model at a time is in memory.
GRAPHS: Mapping[str, Callable[[Source, Precision], GraphExport]] = {
    "encode_text": encode_text,
    "denoise": denoise,
    "decode_latents": decode_latents,
}


def check_loras_fit(source: Source) -> None:
    """Raises ExportError, before any weight is loaded, for LoRAs that change what the models of ``source`` lack."""
    import diffusers
    import transformers

    if not source.loras:
        return
    try:
        with warnings_refused(source.folder), torch.device("meta"):
            models: dict[str, Any] = {
                "text_encoder": transformers.CLIPTextModel(
                    transformers.CLIPTextConfig.from_dict(source.configs["text_encoder"])
                ),
                "unet": diffusers.UNet2DConditionModel.from_config(source.configs["unet"]),
            }
    except ExportError:
        raise
    except Exception as error:  # whatever the libraries find wrong with a configuration
        raise ExportError(f"the models in {source.folder} cannot be built: {error}") from error
    for component, model in models.items():
        check_fit(model, component, source.loras)


def _entry(sequences: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``sequences[b, min(index[b], n − 1)]``: ``[B, n, ...]`` and ``[B]`` to ``[B, ...]``, as one Gather."""
    batch, n = sequences.shape[:2]
    entry = torch.arange(batch, device=index.device) * n + index.clamp(max=n - 1)
    return sequences.flatten(0, 1).index_select(0, entry)


def _over_latents(weights: torch.Tensor) -> torch.Tensor:
    """Weights ``[B, ...]`` that multiply latents ``[..., C, h, w]``."""
    return weights[..., None, None, None]


def _load(source: Source, component: str) -> Any:
    """A component in float32, from safetensors and nothing else, with every weight it needs."""
    import diffusers
    import transformers

    kinds: dict[str, Any] = {
        "text_encoder": transformers.CLIPTextModel,
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
    }
    dtype = "dtype" if component == "text_encoder" else "torch_dtype"
    model = load_model(
        kinds[component],
        source.folder / component,
        variant=source.variants[component],
        **{dtype: torch.float32},
    )
    for lora in source.loras:
        merge(model, component, lora)
    return model
