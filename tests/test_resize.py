"""The resize matrices against Pillow's own bicubic resize."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dnp.engine.errors import SettingsError
from dnp.runtime.captioning.resize import resize, resize_matrices

SIZES = [(64, 64, 64), (512, 512, 384), (768, 512, 384), (512, 768, 384), (64, 64, 384), (200, 300, 100),
         (1080, 1920, 384), (30, 17, 64), (128, 128, 64), (64, 64, 128), (1, 1, 64), (1, 900, 32), (385, 383, 384),
         (2000, 3, 64), (300, 300, 100), (2048, 2048, 16)]  # fmt: skip


def assert_equals_pillow(image, size):
    bicubic = Image.Resampling.BICUBIC
    height, width = image.shape[:2]
    columns_first = Image.fromarray(image).resize((size, height), bicubic).resize((size, size), bicubic)
    result = resize(image, size)
    np.testing.assert_array_equal(result, np.asarray(columns_first))
    if height <= max(width, size):  # otherwise Pillow 13 takes the rows first
        np.testing.assert_array_equal(result, np.asarray(Image.fromarray(image).resize((size, size), bicubic)))


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
@pytest.mark.parametrize("kind", ["noise", "gradient", "black and white"])
def test_equals_pillow(height, width, size, kind):
    rng = np.random.default_rng(height * 7 + width * 3 + size)
    if kind == "noise":
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
    elif kind == "gradient":
        ramp = np.add.outer(np.linspace(0, 150, height), np.linspace(0, 105, width))
        image = np.stack([ramp, 255 - ramp, ramp[:, ::-1]], -1).astype(np.uint8)
    else:
        image = rng.integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255)
    assert_equals_pillow(image, size)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_equals_pillow_at_any_size(height, width, size, seed):
    assert_equals_pillow(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8), size)


def test_equal_sizes_are_the_identity():
    for matrix in resize_matrices(48, 48, 48):
        np.testing.assert_array_equal(matrix, np.eye(48, dtype=np.float32))


def test_shapes_and_types():
    columns, rows = resize_matrices(20, 30, 8)
    assert columns.shape == (30, 8)
    assert rows.shape == (8, 20)
    assert columns.dtype == rows.dtype == np.float32
    np.testing.assert_allclose(columns.sum(0), 1, atol=1e-6)


@pytest.mark.parametrize("sizes", [(0, 4, 4), (4, -1, 4), (4, 4, 0), (4.0, 4, 4), (True, 4, 4), ("4", 4, 4)])
def test_refuses_bad_sizes(sizes):
    with pytest.raises(SettingsError, match="positive whole number"):
        resize_matrices(*sizes)
