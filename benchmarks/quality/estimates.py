"""The figures' statistics: means with intervals, paired differences, a Fréchet distance, a spread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its 95 % bootstrap interval. It covers the prompts drawn, one trained model only."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: npt.ArrayLike) -> Estimate:
    """The mean of ``values [N]`` and its percentile bootstrap interval; of differences, when they are paired.

    Raises ValueError when there are no values.
    """
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("there are no values to take the mean of")
    rng = np.random.default_rng(0)
    means = np.concatenate([rng.choice(values, (500, len(values))).mean(axis=1) for _ in range(RESAMPLES // 500)])
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def frechet_distance(features: Floats, reference: Floats) -> float:
    """The Fréchet distance between Gaussians fitted to two sets of features ``[N, D]`` (Heusel et al. 2017, eq. 6).

    It is biased upwards in small sets: compare only sets of the same size. Raises ValueError when a set has fewer
    than two rows.
    """
    if min(len(features), len(reference)) < 2:
        raise ValueError(f"a covariance takes two rows or more, not {min(len(features), len(reference))}")
    mean, covariance = features.mean(0), np.cov(features, rowvar=False)
    other_mean, other_covariance = reference.mean(0), np.cov(reference, rowvar=False)
    # The trace of the root of a product of covariances: its eigenvalues are real and not negative but for rounding.
    root = np.sqrt(np.clip(np.linalg.eigvals(covariance @ other_covariance).real, 0, None)).sum()
    return float(np.square(mean - other_mean).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * root)


def spread(features: Floats) -> Floats:
    """Mean Euclidean distance between the samples of each prompt: ``[prompts, samples, D]`` to ``[prompts]``.

    Raises ValueError when a prompt has fewer than two samples.
    """
    samples = features.shape[1]
    if samples < 2:
        raise ValueError(f"a distance takes two samples or more, not {samples}")
    distances = np.linalg.norm(features[:, :, None] - features[:, None], axis=-1)
    return np.asarray(distances.sum(axis=(1, 2)) / (samples * (samples - 1)))
