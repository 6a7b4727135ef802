"""Pictures for the wire: written by a bounded pool of threads, so that neither the loop nor the engine waits."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from dnp.engine.errors import SettingsError
from dnp.runtime.pictures import UNREADABLE, png, upright
from dnp.serving.errors import ApiError

T = TypeVar("T")
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # that are read
MAX_PIXELS: Final = 16_000_000  # of all images that a request brings; 48 MB as RGB


class Encoder:
    """Writes and reads pictures off the loop, as many at once as there are threads; the others queue."""

    def __init__(self, threads: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1), "dnp-pictures")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    async def encode(
        self,
        pixels: npt.NDArray[np.uint8],
        form: str,
        quality: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """uint8 ``[H, W, 3]`` as base64 of a PNG, which carries ``settings``, or of a JPEG or WebP of ``quality``."""
        return await self._run(lambda: base64.b64encode(_written(pixels, form, quality, settings)).decode())

    async def decode(self, text: str, most: int = MAX_PIXELS) -> Image.Image:
        """The RGB image in base64 or a data URL, of ``most`` pixels. Raises ApiError for anything else."""
        return await self._run(lambda: _read(text, most))

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _written(
    pixels: npt.NDArray[np.uint8], form: str, quality: int | None, settings: Mapping[str, Any] | None
) -> bytes:
    image = Image.fromarray(pixels)
    if form == "png":
        return png(image, settings)
    buffer = io.BytesIO()
    image.save(buffer, form, quality=100 if quality is None else quality)
    return buffer.getvalue()


def _read(text: str, most: int) -> Image.Image:
    if text.startswith(("http:", "https:", "file:")):
        raise _no_image("is a link, and this server fetches nothing; send the file itself in base64")
    if text.startswith("data:"):
        header, comma, text = text.partition(",")
        if not comma or not header.endswith(";base64"):
            raise _no_image("is a data URL without ;base64; send data:image/png;base64,…")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _no_image(f"is no base64 ({error}); encode the file's bytes") from None
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > most:
                raise _no_image(
                    f"has {image.width} x {image.height} pixels, and all images of a request have at most "
                    f"{MAX_PIXELS / 1e6:g} million; shrink it, or send fewer at once"
                )
            return upright(image, "the image")
    except SettingsError as error:
        raise ApiError(400, "invalid_image", str(error), "image") from None
    except UnidentifiedImageError:
        raise _no_image("is no image that is read here; send a PNG, JPEG or WebP") from None
    except UNREADABLE as error:
        raise _no_image(f"cannot be read ({error}); send it anew") from None


def _no_image(message: str) -> ApiError:
    return ApiError(400, "invalid_image", f"the image {message}", "image")
