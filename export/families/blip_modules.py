"""BLIP (Li et al., arXiv 2201.12086) as the two modules of the contract, over transformers' own submodules.

``EncodeImage`` and ``CaptionStep`` are what is exported. ``OriginalEncoder`` and ``OriginalDecoder`` give the same
outputs by transformers' own forward code, and are what the exports are compared with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation.logits_process import LogitsProcessorList, MinLengthLogitsProcessor


class EncodeImage(nn.Module):
    """uint8 image → resize, normalisation, vision transformer → the decoder's cross-attention keys and values.

    ``mean`` and ``std`` are per channel, for pixels scaled to 0..1.
    """

    def __init__(self, vision: nn.Module, decoder: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.vision = vision
        self.cross = nn.ModuleList(layer.crossattention.self for layer in _layers(decoder))
        self.mean, self.std = mean, std  # no buffers: half() would round them

    def forward(
        self, image: torch.Tensor, resize_columns: torch.Tensor, resize_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two tensors ``[B, layers, heads, T, d]`` in the module's precision.

        ``image`` uint8 ``[B, H, W, 3]``, ``resize_columns`` float32 ``[W, V]``, ``resize_rows`` float32 ``[V, H]``.
        """
        vision: Any = self.vision
        pixels = resize_exactly(image, resize_columns, resize_rows)
        pixels = normalise(pixels, self.mean, self.std)
        x = _tokens(vision.embeddings, pixels)
        for layer in vision.encoder.layers:
            x = x + _self_attention(layer.self_attn, layer.layer_norm1(x))
            x = x + layer.mlp(layer.layer_norm2(x))
        return _cross_projections(list(self.cross), vision.post_layernorm(x))


class CaptionStep(nn.Module):
    """The token at ``position`` of each sequence in, the next one chosen and written beside it, over M positions.

    The sequences of an image, its beams, are adjacent, and read that image's cross-attention keys in place: the cross
    caches have one entry per image, and a beam is one more query. Slots from ``position`` on are never read, so
    stale caches do no harm. Token ``eos`` ends a caption.
    """

    def __init__(self, decoder: nn.Module, eos: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.eos = eos

    def forward(
        self,
        tokens: torch.Tensor,
        position: torch.Tensor,
        prompt_length: torch.Tensor,
        min_length: torch.Tensor,
        parent: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        cross_keys: torch.Tensor,
        cross_values: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """``logits`` float32 ``[B, vocab]``, ``next_tokens``, ``next_position`` and the caches as they were given.

        ``tokens`` int64 ``[B, M]``; ``position``, ``prompt_length``, ``min_length``, ``parent`` int64 ``[B]``, of which
        ``parent`` orders the caches alone; ``keys``, ``values`` ``[B, layers, heads, M, d]``; the cross caches
        ``[images, layers, heads, T, d]`` with ``B`` a multiple of ``images``.
        """
        token = tokens.gather(1, position[:, None]).squeeze(1)
        decoder: Any = self.decoder
        embeddings, head = decoder.bert.embeddings, decoder.cls.predictions
        x = embeddings.word_embeddings(token) + embeddings.position_embeddings(position)
        x = embeddings.LayerNorm(x)  # [B, C]

        slots = torch.arange(keys.shape[3], device=keys.device)[:, None]  # [M, 1]
        here = slots == position[:, None, None, None]  # [B, 1, M, 1]
        before = slots < position[:, None, None, None]
        zero = torch.zeros((), dtype=keys.dtype, device=keys.device)
        past = [cache.index_select(0, parent) for cache in (keys, values)]
        visible = (here | before).transpose(2, 3)  # [B, 1, 1, M]

        written: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for index, layer in enumerate(_layers(decoder)):
            own, cross = layer.attention, layer.crossattention
            for cache, into, project in zip(past, written, (own.self.key, own.self.value), strict=True):
                old = torch.where(before, cache[:, index], zero)
                into.append(torch.where(here, _heads(own.self, project(x), 1), old))  # [B, heads, M, d]
            context = _attend(_heads(own.self, own.self.query(x), 1), written[0][-1], written[1][-1], visible)
            x = own.output(context.reshape(x.shape), x)

            query = _heads(cross.self, cross.self.query(x), -1, cross_keys.shape[0])  # [images, heads, beams, d]
            context = _attend(query, cross_keys[:, index], cross_values[:, index])
            x = cross.output(context.transpose(1, 2).reshape(x.shape), x)
            x = layer.output(layer.intermediate(x), x)

        # Logits in float32: fp16 has a step of 1/128 at 10, which would tie the best candidates.
        x = head.transform(x).float()
        logits = F.linear(x, head.decoder.weight.float(), head.decoder.bias.float())
        chosen = _choose(logits, self.eos, position, min_length)
        next_position = position + 1
        free = (next_position[:, None] == slots.T) & (next_position >= prompt_length)[:, None]  # [B, M]
        next_tokens = torch.where(free, chosen[:, None], tokens)
        return logits, next_tokens, next_position, torch.stack(written[0], 1), torch.stack(written[1], 1)


class OriginalEncoder(nn.Module):
    """The outputs of ``EncodeImage`` by transformers' own vision model; the resize in float64, where it is exact."""

    def __init__(self, vision: nn.Module, decoder: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.vision = vision
        self.cross = nn.ModuleList(layer.crossattention.self for layer in _layers(decoder))
        self.mean, self.std = mean, std

    def forward(
        self, image: torch.Tensor, resize_columns: torch.Tensor, resize_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``EncodeImage.forward``."""
        pixels = image.double().permute(0, 3, 1, 2)
        pixels = (pixels @ resize_columns.double() + 0.5).floor().clamp(0, 255)
        pixels = (resize_rows.double() @ pixels + 0.5).floor().clamp(0, 255)
        states = self.vision(pixel_values=normalise(pixels.float(), self.mean, self.std)).last_hidden_state
        return _cross_projections(list(self.cross), states)


class OriginalDecoder(nn.Module):
    """The outputs of ``CaptionStep`` by transformers' own text decoder and its growing caches, one row at a time."""

    def __init__(self, decoder: nn.Module, eos: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.eos = eos

    def forward(
        self,
        tokens: torch.Tensor,
        position: torch.Tensor,
        prompt_length: torch.Tensor,
        min_length: torch.Tensor,
        parent: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        cross_keys: torch.Tensor,
        cross_values: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """As ``CaptionStep.forward``."""
        logits, next_keys, next_values = [], torch.zeros_like(keys), torch.zeros_like(values)
        next_tokens = tokens.clone()
        beams = len(tokens) // len(cross_keys)
        for row in range(len(tokens)):
            image, origin, length = row // beams, int(parent[row]), int(position[row])
            own, cross = DynamicCache(), DynamicCache()
            for index in range(keys.shape[1]):
                if length:
                    past = keys[origin, index, :, :length], values[origin, index, :, :length]
                    own.update(past[0][None], past[1][None], index)
                cross.update(cross_keys[image, None, index], cross_values[image, None, index], index)
            cache = EncoderDecoderCache(own, cross)
            states = torch.zeros(1, cross_keys.shape[3], 1)  # not read: the cross cache is full
            output = self.decoder(
                input_ids=next_tokens[row, length].reshape(1, 1),
                encoder_hidden_states=states,
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(output.logits[0, -1])
            following = length + 1
            if prompt_length[row] <= following < tokens.shape[1]:
                short: Any = LogitsProcessorList([MinLengthLogitsProcessor(int(min_length[row]), self.eos)])
                scores: Any = short(torch.zeros(1, following, dtype=torch.int64), output.logits[:, -1].clone())
                next_tokens[row, following] = scores.argmax()
            grown: Any = cache.self_attention_cache.layers
            for index, layer in enumerate(grown):
                next_keys[row, index, :, : length + 1] = layer.keys[0]
                next_values[row, index, :, : length + 1] = layer.values[0]
        return torch.stack(logits), next_tokens, position + 1, next_keys, next_values


def resize_exactly(image: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``image`` uint8 ``[B, H, W, 3]`` as float32 ``[B, 3, V, V]`` of whole numbers 0..255, equal to Pillow's.

    Pillow's weights have 22 fractional bits, too many for a float32 sum to round as integers would. In two parts of
    11 significant bits, every product and sum is exact, also on units that multiply in TF32.
    """

    def part(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        high = (matrix * 1024.0).round() / 1024.0
        return high, matrix - high

    def rounded(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        whole = (high + 0.5).floor()
        return (whole + (high + 0.5 - whole + low).floor()).clamp(0.0, 255.0)

    pixels = image.float().permute(0, 3, 1, 2)  # TensorRT transposes no uint8
    pixels = rounded(*(pixels @ half for half in part(columns)))
    return rounded(*(half @ pixels for half in part(rows)))


def normalise(pixels: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """0..255 ``[B, 3, V, V]`` to the vision model's range."""
    return (pixels / 255.0 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _tokens(embeddings: Any, pixels: torch.Tensor) -> torch.Tensor:
    """``[B, 3, V, V]`` to ``[B, T, C]`` in the precision of the weights: a token of the class, and one for each patch.

    That of the class is added, not repeated for every image, which would ask how many there are.
    """
    convolve = embeddings.patch_embedding
    patches = convolve(pixels.to(convolve.weight.dtype)).flatten(2).transpose(1, 2)
    first = F.pad(embeddings.class_embedding, (0, 0, 0, patches.shape[1]))
    return F.pad(patches, (0, 0, 1, 0)) + (first + embeddings.position_embedding)


def _layers(decoder: nn.Module) -> Any:
    return decoder.bert.encoder.layer  # type: ignore[union-attr]


def _choose(logits: torch.Tensor, eos: int, position: torch.Tensor, min_length: torch.Tensor) -> torch.Tensor:
    """The likeliest token ``[B]`` of ``logits [B, vocab]``, ``eos`` only where ``min_length`` tokens are reached."""
    early = (position + 1 < min_length)[:, None]
    ends = torch.arange(logits.shape[1], device=logits.device)[None] == eos
    return torch.where(early & ends, torch.finfo(logits.dtype).min, logits).argmax(-1)


def _heads(attention: Any, x: torch.Tensor, tokens: int, batch: int = -1) -> torch.Tensor:
    """``[..., heads · d]`` → ``[batch, heads, tokens, d]``."""
    shape = (batch, tokens, attention.num_attention_heads, attention.attention_head_size)
    return x.reshape(shape).transpose(1, 2)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention in matmul, float32 softmax, matmul: the form that TensorRT fuses. Shapes ``[B, heads, tokens, d]``."""
    scores: torch.Tensor = ((query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)).float()
    if visible is not None:
        scores = torch.where(visible, scores, torch.tensor(-1e9))
    return scores.softmax(-1).to(values.dtype) @ values


def _self_attention(attention: Any, x: torch.Tensor) -> torch.Tensor:
    """The vision transformer's attention, ``[B, T, C]`` to the same; query, key and value are one projection."""
    batch, tokens, width = x.shape
    split = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, width // attention.num_heads)
    query, keys, values = split.permute(2, 0, 3, 1, 4).unbind(0)
    projected: torch.Tensor = attention.projection(
        _attend(query, keys, values).transpose(1, 2).reshape(batch, tokens, width)
    )
    return projected


def _cross_projections(cross: list[Any], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each decoder layer's keys and values of the image tokens ``[B, T, C]``: two of ``[B, layers, heads, T, d]``."""
    tokens = states.shape[1]
    keys = torch.stack([_heads(layer, layer.key(states), tokens) for layer in cross], 1)
    return keys, torch.stack([_heads(layer, layer.value(states), tokens) for layer in cross], 1)
