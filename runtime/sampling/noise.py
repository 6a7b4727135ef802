"""torch's CPU normal generator, reproduced in numpy.

A seed must give the image that diffusers gives for it, and diffusers draws its latents with
``torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))``. Running a model needs no torch, so
the sequence is made here: a 32-bit Mersenne twister (Matsumoto & Nishimura 1998) under the Box-Muller
transform (1958), in the two layouts that ATen uses for large and for small tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from dnp.engine.errors import SettingsError

Floats = npt.NDArray[np.float32]

BLOCK = 16
"""ATen fills tensors of 16 values or more in blocks: 8 radii and 8 angles become 8 cosines and 8 sines."""


class TorchNoise:
    """One ``torch.Generator("cpu")``: successive draws continue one sequence.

    ``seed`` is an integer from -2**63 to 2**64 - 1, as torch takes it; only its low 32 bits matter, because
    torch seeds the twister with those alone. Raises SettingsError for anything else.
    """

    def __init__(self, seed: int) -> None:
        self.seed = check_seed(seed)
        # An integer seed of RandomState is Knuth's initialisation (init_genrand), which is torch's too.
        self._twister = np.random.RandomState(self.seed & 0xFFFFFFFF)
        self._spare: float | None = None  # the sine that belongs to the last cosine drawn one by one

    def randn(self, shape: Sequence[int]) -> Floats:
        """Standard normal float32 of ``shape``, ``torch.randn(shape, generator=g)`` to within 1e-6."""
        size = math.prod(shape)
        if size >= BLOCK:
            return self._blocks(size).reshape(shape)
        return np.array([self._scalar() for _ in range(size)], np.float32).reshape(shape)

    def _bits(self, count: int) -> npt.NDArray[np.uint32]:
        bits: npt.NDArray[np.uint32] = self._twister.randint(0, 2**32, size=count, dtype=np.uint32)
        return bits

    def _uniform(self, count: int) -> Floats:
        """Values in [0, 1) with 24 random bits each, all a float32 can hold evenly."""
        uniform: Floats = (self._bits(count) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)
        return uniform

    def _blocks(self, size: int) -> Floats:
        whole = size - size % BLOCK
        uniform = self._uniform(size)
        normal = np.empty(size, np.float32)
        normal[:whole] = _box_muller(uniform[:whole])
        if whole < size:  # the last 16 values are drawn anew, over the end of the block before
            normal[-BLOCK:] = _box_muller(self._uniform(BLOCK))
        return normal

    def _scalar(self) -> float:
        """One value as ATen draws it for a small tensor: in double precision, in pairs, the second kept.

        The kept value outlives the call, and larger draws in between: it belongs to the generator.
        """
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        high0, low0, high1, low1 = (int(b) for b in self._bits(4))
        angle = ((high0 << 32 | low0) & (2**53 - 1)) * 2.0**-53
        radius = ((high1 << 32 | low1) & (2**53 - 1)) * 2.0**-53
        r = math.sqrt(-2.0 * math.log1p(-radius))
        self._spare = r * math.sin(2.0 * math.pi * angle)
        return r * math.cos(2.0 * math.pi * angle)


def _box_muller(uniform: Floats) -> Floats:
    """Uniform [n·16] → normal [n·16], within 5e-7 of torch's vector code (x86 with AVX2 or AVX-512).

    The angle is rounded to float32 before its cosine, as that code does; torch's scalar code does not, so
    torch differs from itself by 2.5e-6 between processors. The radius is computed in double precision: in
    single precision its error alone would be as large as the rest.
    """
    u = uniform.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(-2.0 * np.log(1.0 - u[:, 0].astype(np.float64)))
    theta = np.float32(2.0 * math.pi) * u[:, 1]
    normal = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)
    return np.asarray(normal, np.float32).reshape(-1)


def check_seed(seed: Any) -> int:
    """``seed`` as a plain int, or SettingsError when torch would not take it (or when it is a bool)."""
    remedy = "give a whole number from -2**63 to 2**64 - 1; 0 is valid"
    if isinstance(seed, bool | np.bool_):
        raise SettingsError(f"the seed is {seed!r}, which is no number: {remedy}")
    try:
        value = index(seed)
    except TypeError:
        raise SettingsError(f"the seed is {seed!r}, which is no whole number: {remedy}") from None
    if not -(2**63) <= value < 2**64:
        raise SettingsError(f"the seed is {value}, which does not fit in 64 bits: {remedy}")
    return value
