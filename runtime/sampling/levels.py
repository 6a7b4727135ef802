"""Noise levels: how far between data and noise latents are, and levels spaced between two of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

KARRAS_RHO = 7.0
BETA_SHAPE = 0.6
"""Both parameters of the beta distribution by which noise levels are spaced, of arXiv 2407.12173."""


class Level(NamedTuple):
    """One noise level, ``x = alpha x_0 + sigma eps``: ``alpha² + sigma² = 1`` in diffusion, ``alpha + sigma = 1`` in a
    flow.
    """

    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma/alpha, what k-diffusion and Karras et al. call sigma."""
        return self.sigma / self.alpha

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha/sigma), the time of the DPM-Solver papers."""
        return math.log(self.alpha / self.sigma)

    @classmethod
    def of_alpha_bar(cls, alpha_bar: float) -> Level:
        """The level of a DDPM timestep."""
        return cls(math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar))

    @classmethod
    def of_ratio(cls, ratio: float) -> Level:
        """The level at which sigma/alpha is ``ratio``."""
        alpha = 1.0 / math.sqrt(ratio * ratio + 1.0)
        return cls(alpha, ratio * alpha)

    @classmethod
    def of_flow(cls, sigma: float) -> Level:
        """The level of a flow: as far as ``sigma`` from data to noise."""
        return cls(1.0 - sigma, sigma)


CLEAN = Level(1.0, 0.0)


def spaced(kind: str, steps: int, low: float, high: float) -> Floats:
    """``steps`` noise levels from ``high`` to ``low``, [steps]: values of sigma/alpha, or a flow's sigmas.

    ``kind``: ``karras``, even in the seventh root (arXiv 2206.00364, equation 5); ``exponential`` and ``lu``, even
    in the logarithm (2206.00927); ``beta``, quantiles of a beta distribution (2407.12173).
    """
    ramp = np.linspace(0, 1, steps)
    if kind == "karras":
        first, last = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
        return np.asarray((first + ramp * (last - first)) ** KARRAS_RHO, np.float64)
    if kind == "beta":
        return low + _beta_quantiles(1 - ramp) * (high - low)
    return np.asarray(np.exp(np.linspace(math.log(high), math.log(low), steps)), np.float64)


def _beta_quantiles(shares: Floats) -> Floats:
    """The quantiles [n] of the symmetric beta distribution with both parameters BETA_SHAPE.

    By bisection of its power series on the lower half, where that converges to the last bit.
    """
    a, lower = BETA_SHAPE, np.minimum(shares, 1 - shares)
    n = np.arange(1, 64)
    terms = np.concatenate([[1.0], np.cumprod((n - a) / n)]) / (a + np.arange(64))
    scale = math.gamma(2 * a) / math.gamma(a) ** 2
    low, high = np.zeros_like(lower), np.full_like(lower, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = scale * middle**a * np.polynomial.polynomial.polyval(middle, terms) < lower
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.asarray(np.where(shares <= 0.5, low, 1 - low), np.float64)
