"""Stable Diffusion as three graphs: ``encode_text``, ``denoise`` and ``decode_latents``.

Latent diffusion: arXiv 2112.10752; classifier-free guidance: arXiv 2207.12598; diffusion-negative sampling,
which is the same step with the sign of w reversed: arXiv 2411.05473.
Shapes: P places, R rows, B batch, N slots, C h w latents, L D text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dnp.engine.bundle import columns
from dnp.engine.bundle.contract import Signature
from dnp.engine.errors import ExportError
from dnp.export.families.any_size import take_any_size
from dnp.export.families.guidance import combine
from dnp.export.families.lora import check_fit, merge
from dnp.export.families.source import Source
from dnp.export.fp16.precision import Precision, dtype_of
from dnp.export.graph import Array, Dims, GraphExport
from dnp.export.loading import load_model, warnings_refused

# The largest error allowed, by graph and precision; see GraphExport.bounds. Images are in grey levels.
BOUNDS: Mapping[str, Mapping[Precision, float]] = {
    "encode_text": {"fp32": 1e-4, "fp16": 2e-2},
    "denoise": {"fp32": 1e-4, "fp16": 2e-2},
    "decode_latents": {"fp32": 1, "fp16": 8},
}


class EncodeText(nn.Module):
    """``ids`` int64 ``[B, L]``, one tensor for each text encoder, to what the UNet is conditioned on.

    The embeddings ``[B, L, D]`` are the encoders' hidden states beside one another. L is a multiple of ``window``, what
    an encoder takes at once; every window is encoded by itself. ``pooled`` adds a second output ``[B, E]``: the last
    encoder's projection of the first window.
    """

    def __init__(self, encoders: Sequence[Any], layers: Sequence[int | None], window: int, *, pooled: bool) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.layers = layers  # which hidden state; None is the last one, normalised
        self.window = window
        self.pooled = pooled

    def forward(
        self, ids: torch.Tensor, ids_2: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Embeddings, and the pooled text where the family has it; the end token's place is found in the ids."""
        hidden = []
        given = [tokens for tokens in (ids, ids_2) if tokens is not None]
        for encoder, layer, tokens in zip(self.encoders, self.layers, given, strict=True):
            output = encoder(input_ids=tokens.reshape(-1, self.window), output_hidden_states=layer is not None)
            state = output.last_hidden_state if layer is None else output.hidden_states[layer]
            hidden.append(state.reshape(*tokens.shape, state.shape[-1]))
        embeddings = torch.cat(hidden, -1).float()
        if not self.pooled:
            return embeddings
        last = output.last_hidden_state.reshape(*tokens.shape, output.last_hidden_state.shape[-1])
        return embeddings, self._projection(encoder, last[:, : self.window], tokens[:, : self.window]).float()

    def _projection(self, encoder: Any, last: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """transformers' ``text_embeds``, which looks up the end token with a Range that no CUDA graph can hold."""
        end = encoder.config.eos_token_id
        # The end token has the largest id; in configurations that say 2, from before transformers asked for it.
        marks = tokens if end == 2 else tokens == end
        projected: torch.Tensor = encoder.text_projection(_entry(last, marks.to(torch.int32).argmax(-1)))
        return projected


class Denoise(nn.Module):
    """One sampler step for each place, whichever sampler it uses: see ``engine/bundle/columns.py``.

    Only the UNet computes in the bundle's precision. State, table and the combination of the guidance
    branches are float32, and weighted sums are not written as matrix products, which GPUs round to TF32.
    """

    def __init__(self, unet: Any, *, methods: bool = False) -> None:
        super().__init__()
        self.unet = take_any_size(unet)
        self.methods = methods
        self.embedding = unet.config.time_cond_proj_dim  # channels of the guidance scale's, where it is an input

    def forward(
        self,
        state: torch.Tensor,
        index: torch.Tensor,
        table: torch.Tensor,
        noise: torch.Tensor,
        row_place: torch.Tensor,
        row_role: torch.Tensor,
        place_rows: torch.Tensor,
        embeddings: torch.Tensor,
        pooled: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``next_state [P, N, C, h, w]``, ``next_index [P]``, ``latents`` and ``clean_latents [P, C, h, w]``."""
        row = _entry(table, index)
        z = _entry(noise, row[:, columns.DRAW].to(torch.int64))
        A = _over_latents(row[:, columns.STATE].reshape(-1, columns.SLOTS, columns.SLOTS))
        B, B0, C, E, P = (_over_latents(row[:, part]) for part in _VECTORS)
        q = _over_latents(row[:, columns.CLEAN_OUTPUT])

        x = (E * state).sum(1)
        bank = row_place * embeddings.shape[1] + row_role
        conditioning = [_of_rows(part, bank) for part in (embeddings, pooled, sizes) if part is not None]
        o_r = self._network(x.index_select(0, row_place), row.index_select(0, row_place), *conditioning)
        # A place that stands still reads another's rows, which may hold no numbers: 0 times those were none either.
        moves = _over_latents(row[:, columns.ADVANCE] > 0)
        outputs = [torch.where(moves, o_r.index_select(0, rows), 0.0) for rows in place_rows.unbind(1)]
        o = combine(outputs, row, methods=self.methods)

        changed = B * o.unsqueeze(1) + B0 * outputs[0].unsqueeze(1) + C * z.unsqueeze(1)
        next_state = (A * state.unsqueeze(1)).sum(2) + changed
        next_index = index + row[:, columns.ADVANCE].to(torch.int64)
        return next_state, next_index, next_state[:, 0], (P * state).sum(1) + q * o

    def _network(
        self,
        x: torch.Tensor,
        row: torch.Tensor,
        embeddings: torch.Tensor,
        pooled: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The UNet for all rows at once, float32 in and out."""
        dtype = dtype_of(self.unet)
        extra: dict[str, Any] = {}
        if pooled is not None:
            extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}  # joined, and cast by the UNet
        if self.embedding:
            extra["timestep_cond"] = guidance_embedding(row[:, columns.EMBEDDED], self.embedding).to(dtype)
        t = row[:, columns.TIMESTEP]
        output: torch.Tensor = self.unet(x.to(dtype), t, embeddings.to(dtype), return_dict=False, **extra)[0]
        return output.float()


class DecodeLatents(nn.Module):
    """Latents ``[P, C, h, w]``, scaled as the UNet has them, of the places ``decoded`` to images.

    Images are uint8 ``[B, f·h, f·w, 3]``.
    """

    def __init__(self, vae: Any, scaling: float) -> None:
        super().__init__()
        self.vae = vae
        self.scaling = scaling

    def forward(self, latents: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """Images; rounds to even, as numpy does, and casts to uint8 last, as TensorRT wants it."""
        vae: Any = self.vae
        chosen = latents.index_select(0, decoded) / self.scaling
        image: torch.Tensor = vae.decode(chosen.to(dtype_of(vae)), return_dict=False)[0]
        levels = ((image.float() / 2 + 0.5).clamp(0, 1) * 255).round()
        return levels.permute(0, 2, 3, 1).to(torch.uint8)


def encode_text(source: Source, signature: Signature, precision: Precision) -> GraphExport:
    """The text encoder's graph."""
    encoders = source.family.encoders
    models = [_load(source, encoder.folder) for encoder in encoders]
    layers = [encoder.layer for encoder in encoders]
    module = EncodeText(models, layers, source.length, pooled=source.pooled is not None).eval()

    def fresh(rng: np.random.Generator, dims: Dims) -> dict[str, Array]:
        """Any ids of each encoder's vocabulary."""
        return {
            name: rng.integers(0, source.configs[encoder.folder]["vocab_size"], ids.resolve(dims))
            for encoder, (name, ids) in zip(encoders, signature.inputs.items(), strict=True)
        }

    return GraphExport(
        name="encode_text",
        module=module,
        signature=signature,
        fresh_inputs=fresh,
        example={"batch": 3, "tokens": 2 * source.length},
        checks=[{"batch": 3, "tokens": source.length}, {"batch": 1, "tokens": 3 * source.length}],
        bounds=dict.fromkeys(signature.outputs, BOUNDS["encode_text"][precision]),
        precision=precision,
        multiples={"tokens": source.length},
    )


def denoise(source: Source, signature: Signature, precision: Precision) -> GraphExport:
    """The step graph."""
    module = Denoise(_load(source, "unet"), methods=source.methods).eval()
    length, bound = source.length, BOUNDS["denoise"][precision]

    def fresh(rng: np.random.Generator, dims: Dims) -> dict[str, Array]:
        inputs = signature.inputs
        floats = {name: tensor for name, tensor in inputs.items() if tensor.dtype == "float32"}
        arrays: dict[str, Array] = {
            name: rng.standard_normal(tensor.resolve(dims), dtype=np.float32) for name, tensor in floats.items()
        }
        below = {"index": "steps", "row_place": "places", "place_rows": "rows"}
        for name, symbol in below.items():
            arrays[name] = rng.integers(0, dims[symbol], inputs[name].resolve(dims))
        roles = inputs["place_rows"].resolve(dims)[1]
        arrays["row_role"] = rng.integers(0, roles, dims["rows"])
        table = arrays["table"]
        table *= 0.5
        table[..., columns.TIMESTEP] = rng.uniform(0, 999, table.shape[:2])
        table[..., columns.GUIDANCE] = rng.choice([-3.0, 0.0, 1.0, 7.5], table.shape[:2])
        table[..., columns.ADVANCE] = rng.integers(0, 2, table.shape[:2])
        table[..., columns.DRAW] = rng.integers(0, dims["noise_steps"], table.shape[:2])
        table[..., columns.RESCALE :] = np.abs(table[..., columns.RESCALE :])
        if "sizes" in arrays:
            arrays["sizes"] = rng.integers(0, 1025, arrays["sizes"].shape).astype(np.float32)
        return {name: arrays[name] for name in inputs}

    least = 2 ** (source.levels - 1) + 1  # which the innermost blocks see as 2
    own = {"tokens": length, "height": source.height, "width": source.width}
    return GraphExport(
        name="denoise",
        module=module,
        signature=signature,
        fresh_inputs=fresh,
        example={"places": 2, "rows": 5, "steps": 3, "noise_steps": 2, "tokens": 2 * length, "height": 16, "width": 18},
        checks=[
            {"places": 3, "rows": 4, "steps": 5, "noise_steps": 3, "tokens": 2 * length, "height": 13, "width": 10},
            {"places": 1, "rows": 1, "steps": 1, "noise_steps": 1, **own},
        ],
        bounds={name: 0 if tensor.dtype == "int64" else bound for name, tensor in signature.outputs.items()},
        precision=precision,
        multiples={"tokens": length},
        # From 64 rows on, diffusers makes a copy for the sake of an old CUDA bug; torch takes a size of 1 for fixed.
        traced={"rows": (1, 63), "height": (least, 1 << 16), "width": (least, 1 << 16)},
    )  # fmt: skip


def decode_latents(source: Source, signature: Signature, precision: Precision) -> GraphExport:
    """The VAE decoder's graph; the encoder is not needed."""
    precision = "fp32" if source.float32_decoder else precision
    module = DecodeLatents(_load(source, "vae"), source.scaling).eval()

    def fresh(rng: np.random.Generator, dims: Dims) -> dict[str, Array]:
        latents = signature.inputs["latents"]
        return {
            "latents": rng.standard_normal(latents.resolve(dims), dtype=np.float32),
            "decoded": rng.integers(0, dims["places"], dims["batch"]),
        }

    return GraphExport(
        name="decode_latents",
        module=module,
        signature=signature,
        fresh_inputs=fresh,
        example={"places": 3, "batch": 2, "height": 8, "width": 8},
        checks=[
            {"places": 2, "batch": 3, "height": 5, "width": 8},
            {"places": 1, "batch": 1, "height": source.height, "width": source.width},
        ],
        bounds=dict.fromkeys(signature.outputs, BOUNDS["decode_latents"][precision]),
        precision=precision,
    )


# In this order; each is called when its turn has come, so that one model at a time is in memory.
GRAPHS: Mapping[str, Callable[[Source, Signature, Precision], GraphExport]] = {
    "encode_text": encode_text,
    "denoise": denoise,
    "decode_latents": decode_latents,
}

_VECTORS = (columns.OUTPUT, columns.NEGATIVE_OUTPUT, columns.NOISE, columns.INPUT, columns.CLEAN_STATE)


def check_loras_fit(source: Source) -> None:
    """Raises ExportError, before any weight is loaded, for LoRAs that change what the models of ``source`` lack."""
    import diffusers
    import transformers

    if not source.loras:
        return
    unet: Any = diffusers.UNet2DConditionModel
    try:
        with warnings_refused(source.folder), torch.device("meta"):
            models: dict[str, Any] = {
                encoder.folder: getattr(transformers, encoder.kind)(
                    transformers.CLIPTextConfig.from_dict(dict(source.configs[encoder.folder]))
                )
                for encoder in source.family.encoders
            }
            models["unet"] = unet.from_config(source.configs["unet"])
    except ExportError:
        raise
    except Exception as error:  # whatever the libraries find wrong with a configuration
        raise ExportError(f"the models in {source.folder} cannot be built: {error}") from error
    check_fit(models, source.loras)


def _entry(sequences: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``sequences[p, index[p]]``: ``[P, n, ...]`` and ``[P]`` to ``[P, ...]``.

    As GatherElements: that needs no Range, and ONNX Runtime's GatherND copies from the host whenever it is run on a
    GPU, which no CUDA graph can hold.
    """
    entry = index.reshape(-1, *[1] * (sequences.dim() - 1)).expand(-1, 1, *sequences.shape[2:])
    return sequences.gather(1, entry).squeeze(1)


def _of_rows(bank: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """A bank ``[P, roles, ...]`` to its ``entries`` ``[R, ...]``, counted place by place."""
    return bank.flatten(0, 1).index_select(0, entries)


def guidance_embedding(w: torch.Tensor, channels: int) -> torch.Tensor:
    """The guidance scale less 1, ``[R]``, as ``[R, channels]`` for networks that take it: arXiv 2310.04378."""
    half = channels // 2
    angles = 1000 * w[:, None] * torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
    return functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, channels % 2))


def _over_latents(weights: torch.Tensor) -> torch.Tensor:
    """Weights ``[P, ...]`` that multiply latents ``[..., C, h, w]``."""
    return weights[..., None, None, None]


def _load(source: Source, component: str) -> Any:
    """A component in float32, from safetensors and nothing else, with every weight it needs."""
    import diffusers
    import transformers

    kinds: dict[str, Any] = {
        **{encoder.folder: getattr(transformers, encoder.kind) for encoder in source.family.encoders},
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
    }
    dtype = "torch_dtype" if component in ("unet", "vae") else "dtype"
    model = load_model(
        kinds[component],
        source.folder / component,
        variant=source.variants[component],
        **{dtype: torch.float32},
    )
    for lora in source.loras:
        merge(model, component, lora)
    return model
