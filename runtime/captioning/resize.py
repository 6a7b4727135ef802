"""Pillow's bicubic resize as two constant matrices: the resize inputs of the ``encode_image`` graph.

Matched, bit for bit: Pillow's ``resize(..., BICUBIC)`` on 8-bit images (``Resample.c``): Keys' cubic with a = −½,
widened when shrinking, weights rounded to 22 fractional bits, each pass rounded half up and clipped to 0..255. The
columns come first, as in every Pillow before 13; Pillow 13 takes the rows first when it shrinks an image that is
taller than wide, which gives such an image slightly other pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dnp.engine.errors import SettingsError

MAX_SIDE = 32_768  # pixels: a matrix has as many columns
_FRACTION = 2.0**22  # Pillow keeps 32 − 8 − 2 bits behind the point


def resize_matrices(height: int, width: int, size: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The matrices that resize an image of ``height`` × ``width`` to ``size`` × ``size``.

    Returns ``columns`` float32 ``[width, size]`` and ``rows`` float32 ``[size, height]``, both read-only. Every weight
    is a multiple of 2⁻²², which float32 holds exactly. Raises SettingsError when a length is no positive integer,
    or beyond ``MAX_SIDE``.
    """
    for name, value in (("height", height), ("width", width), ("size", size)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise SettingsError(f"image {name} must be a positive whole number, not {value!r}")
        if value > MAX_SIDE:
            raise SettingsError(f"image {name} is {value}, at most {MAX_SIDE} pixels are read; shrink the image first")
    return _weights(int(width), int(size)).T, _weights(int(height), int(size))


def resize(image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """``image`` uint8 ``[H, W, C]`` as uint8 ``[size, size, C]``: the definition that the graph follows.

    Float64 holds every product and sum exactly.
    """
    columns, rows = resize_matrices(image.shape[0], image.shape[1], size)
    planes: npt.NDArray[np.float64] = image.transpose(2, 0, 1).astype(np.float64)  # [C, H, W]
    planes = np.clip(np.floor(planes @ columns + 0.5), 0, 255)
    planes = np.clip(np.floor(rows @ planes + 0.5), 0, 255)
    resized: npt.NDArray[np.uint8] = planes.transpose(1, 2, 0).astype(np.uint8)
    return resized


@lru_cache(maxsize=16)
def _weights(source: int, target: int) -> npt.NDArray[np.float32]:
    """``[target, source]``: how much each source pixel gives to each target pixel. Rows sum to one."""
    scale = source / target
    stretch = max(scale, 1.0)  # antialiasing: the filter covers at least one target pixel
    center = (np.arange(target) + 0.5) * scale
    first = np.maximum(np.trunc(center - 2 * stretch + 0.5), 0).astype(np.int64)
    last = np.minimum(np.trunc(center + 2 * stretch + 0.5), source).astype(np.int64)  # one past
    taps = first[:, None] + np.arange(int(np.ceil(2 * stretch)) * 2 + 1)  # [target, taps]
    weight = np.where(taps < last[:, None], _cubic((taps - center[:, None] + 0.5) / stretch), 0.0)
    weight /= weight.sum(axis=1, keepdims=True)
    weight = np.trunc(weight * _FRACTION + np.copysign(0.5, weight)) / _FRACTION

    matrix = np.zeros((target, source), np.float32)
    inside = taps < source
    matrix[np.nonzero(inside)[0], taps[inside]] = weight[inside]
    matrix.flags.writeable = False
    return matrix


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' cubic convolution kernel with a = −½, zero beyond two pixels."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
