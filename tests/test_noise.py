"""The noise is torch's own, for every size, seed and way of splitting the draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dnp.engine.errors import SettingsError
from dnp.runtime.sampling.noise import TorchNoise

TOLERANCE = 1e-6
SEEDS = st.integers(-(2**63), 2**64 - 1)


def torch_randn(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for shape in shapes]


def assert_same_sequence(seed: int, *shapes: tuple[int, ...]) -> None:
    ours = TorchNoise(seed)
    for expected, shape in zip(torch_randn(seed, *shapes), shapes, strict=True):
        actual = ours.randn(shape)
        assert actual.dtype == np.float32
        assert actual.shape == shape
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@given(SEEDS, st.lists(st.integers(1, 70) | st.integers(1, 4000), min_size=1, max_size=6))
@example(0, [16384])
@example(2**32, [16384])
@example(2**64 - 1, [15, 16, 17, 15])  # an odd small draw leaves a spare value, which outlives a large draw
@example(-1, [1, 1, 1, 64, 1])
def test_any_seed_and_any_split_equals_torch(seed: int, sizes: list[int]) -> None:
    assert_same_sequence(seed, *((size,) for size in sizes))


def test_every_small_size_equals_torch() -> None:
    for size in range(65):
        assert_same_sequence(size, (size,), (3,), (size,))


@pytest.mark.parametrize("shape", [(4, 64, 64), (1, 4, 64, 64), (4, 7, 9), (4, 1, 1), (3, 1, 5), ()])
def test_shapes_equal_torch(shape: tuple[int, ...]) -> None:
    assert_same_sequence(11, shape, shape)


def test_a_million_values_stay_within_the_tolerance() -> None:
    """The tails too: the largest radius that 24 bits can give is 5.8."""
    assert_same_sequence(123, (2**20,))


@pytest.mark.parametrize("seed", [True, False, np.bool_(True), 1.0, 1.5, math.nan, "1", None, 2**64, -(2**63) - 1])
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    with pytest.raises(SettingsError, match=r"seed is .*whole number from"):
        TorchNoise(seed)


def test_numpy_integers_are_seeds() -> None:
    np.testing.assert_array_equal(TorchNoise(np.int64(3)).randn((32,)), TorchNoise(3).randn((32,)))
