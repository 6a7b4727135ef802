"""How the network's outputs for the roles of a place become one: plain guidance, and the methods that need sums.

Each of the methods is scalars of a place times its outputs, and changes nothing where its columns are neutral.
Shapes: P places; outputs ``[P, C, h, w]``, scalars ``[P, 1, 1, 1]``, all float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from dnp.engine.bundle import columns

_TINY: Final = 1e-12  # below it, a norm or a deviation divides as if it were this


def combine(outputs: Sequence[torch.Tensor], row: torch.Tensor, *, methods: bool) -> torch.Tensor:
    """o_0 + w (o_1 − o_0), and + v (o_2 − o_0) where there is a third role.

    Args:
        outputs: o_k by role: of the negative prompt, of the prompt, and of a third one if there is one.
        row: the places' rows of their tables, ``[P, ROW]``.
        methods: whether the columns of the guidance methods are heeded.
    """
    negative, prompt, *thirds = outputs
    w, v = _scalar(row, columns.GUIDANCE), _scalar(row, columns.THIRD)
    if not methods:
        guided = negative + w * (prompt - negative)
        for third in thirds:
            guided = guided + v * (third - negative)
        return guided
    guided = _projected(negative, prompt, row, w)
    for third in thirds:
        guided = guided + v * _perpendicular(third - negative, prompt - negative, row)
    guided = guided * _capped(_norm(prompt), _norm(guided), _scalar(row, columns.NORM_CAP))
    share = _scalar(row, columns.RESCALE)  # arXiv 2305.08891, section 3.4
    return guided * (share * _deviation(prompt) / _deviation(guided).clamp(min=_TINY) + 1 - share)


def _projected(negative: torch.Tensor, prompt: torch.Tensor, row: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """CFG-Zero*, arXiv 2503.18886, and adaptive projected guidance without momentum, arXiv 2410.02416."""
    # How much of the negative is in the prompt's. The exporter drops an addition of 1e-8, as diffusers has it.
    best = _dot(prompt, negative) / _dot(negative, negative).clamp(min=1e-8)
    negative = negative * (1 + _scalar(row, columns.ZERO_STAR) * (best - 1))
    change = prompt - negative
    limit = _scalar(row, columns.NORM_LIMIT)
    change = change * torch.where(limit > 0, (limit / _norm(change).clamp(min=_TINY)).clamp(max=1), 1.0)
    along = _dot(change, prompt) / _dot(prompt, prompt).clamp(min=_TINY**2)
    return negative + w * (change - (1 - _scalar(row, columns.PARALLEL)) * along * prompt)


def _perpendicular(third: torch.Tensor, prompt: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """What of ``third`` does not lie along ``prompt``: Perp-Neg, arXiv 2304.04968."""
    along = _dot(third, prompt) / _dot(prompt, prompt).clamp(min=_TINY**2)
    return third - _scalar(row, columns.PERPENDICULAR) * along * prompt


def _capped(allowed: torch.Tensor, norm: torch.Tensor, cap: torch.Tensor) -> torch.Tensor:
    """What brings ``norm`` to at most ``cap`` times ``allowed``; 1 where there is no cap."""
    return torch.where(cap > 0, (cap * allowed / norm.clamp(min=_TINY)).clamp(max=1), 1.0)


def _scalar(row: torch.Tensor, column: int) -> torch.Tensor:
    return row[:, column, None, None, None]


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum((1, 2, 3), keepdim=True)


def _norm(a: torch.Tensor) -> torch.Tensor:
    return _dot(a, a).sqrt()


def _deviation(a: torch.Tensor) -> torch.Tensor:
    """The standard deviation, but for a factor that is the same for all of a shape."""
    return _norm(a - a.mean((1, 2, 3), keepdim=True))
