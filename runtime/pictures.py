"""Pictures as files: settings inside the PNG, atomic writing, and sheets of labelled pictures to look at."""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from dnp.engine.errors import OutputError, SettingsError
from dnp.engine.system.files import new_folder, write_together
from dnp.runtime.request import Result

METADATA_KEY = "dnp"
MAX_PIXELS = 64_000_000  # of an image that is read: a photograph of the largest cameras, 200 MB as RGB


@contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Inside the block ``path`` is a folder that can be written to; folders made for work that failed are taken away.

    Raises OutputError, before any work, when it cannot be one.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(new_folder(path))
            with tempfile.TemporaryFile(dir=path):
                pass
        except (OSError, ValueError) as error:  # ValueError: a path that no folder can have
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise OutputError(f"cannot write to {str(path)!r}: {reason}; name another folder") from error
        yield


def write_atomically(path: Path, data: bytes) -> None:
    """``write_together`` of one file."""
    write_together({path: data})


def png(image: Image.Image, settings: dict[str, Any] | None = None) -> bytes:
    """PNG bytes of ``image`` with ``settings`` as JSON in a text chunk; the same bytes for the same arguments."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt(METADATA_KEY, json.dumps(settings, ensure_ascii=False, sort_keys=True, allow_nan=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def open_image(path: Path) -> Image.Image:
    """An image file as an RGB image, rotated as its EXIF says. Raises SettingsError when it is none."""
    from PIL import ImageOps

    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("F", "I", "I;16"):
            raise SettingsError(f"{path} has no 8-bit colours (mode {upright.mode}); convert it to RGB first")
        return upright.convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file of a bearable size, its pixels not read yet; what goes wrong in the block is a SettingsError."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise SettingsError(
                    f"{path} has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are read; shrink it first"
                )
            yield image
    except SettingsError:
        raise
    except FileNotFoundError as error:
        raise SettingsError(f"there is no image {path}") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read as an image: {error}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings inside a PNG that ``save`` wrote. Raises SettingsError when there are none."""
    with _opened(path) as image:
        image.load()  # a picture cut short reproduces nothing
        text = image.info.get(METADATA_KEY)
    try:
        settings = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict) or not isinstance(settings.get("request"), dict) or not _of_ours(settings):
        raise SettingsError(
            f"{path} carries no settings of ours; name a single picture that dnp wrote, not a sheet of several"
        )
    return settings


def _of_ours(settings: dict[str, Any]) -> bool:
    return all(isinstance(settings.get(key), str | None) for key in ("backend", "precision", "bundle"))


def save(result: Result, folder: Path, more: Mapping[Path, bytes] | None = None) -> list[Path]:
    """Write every image of ``result`` as ``<prompt>-<seed>-<kind>.png``, and the files of ``more``; or none of them.

    Kinds are ``dnp`` (or ``plain``), ``dns``, ``plain``; each picture carries the settings that reproduce it. Returns
    the paths, final images first, ``more`` last. Raises OutputError.
    """
    request = result.request
    kinds = [("dnp" if request.dnp else "plain", result.images)]
    if result.dns_arrays is not None and result.dns_arrays is not result.arrays:
        kinds.append(("dns", result.dns_images))
    elif result.dns_arrays is not None:
        kinds = [("dns", result.dns_images)]
    if result.plain_arrays is not None and request.dnp:
        kinds.append(("plain", result.plain_images))
    files: dict[Path, bytes] = {}
    for kind, images in kinds:
        for i, image in enumerate(images):
            path = folder / f"{file_name(request.prompt)}-{request.seed + i}-{kind}.png"
            settings = {
                "request": request.to_dict(),
                "kind": kind,
                "index": i,
                "negative": result.negatives[i],
                "bundle": result.bundle,
                "backend": result.backend,
                "precision": result.precision,
                "runs_on": result.runs_on,
            }
            files[path] = png(image, settings)
    files |= more or {}
    write_together(files)
    return list(files)


def file_name(prompt: str) -> str:
    """A prompt as the safe beginning of a file name."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return words.encode()[:80].decode(errors="ignore").strip("-_") or "image"


def sheet(
    rows: Sequence[Sequence[tuple[Image.Image | None, str]]],
    *,
    headings: Sequence[str] = (),
    titles: Sequence[str] = (),
    cell: int = 192,
) -> Image.Image:
    """A picture of pictures: ``rows`` of (image, caption below it), column ``headings``, row ``titles`` above each.

    Images are scaled to ``cell`` pixels: by whole factors and unblurred when they are smaller.
    """
    font, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    gap = 12
    columns = max(len(row) for row in rows)
    text_lines = [max((len(_wrap(text, font, cell)) for _, text in row), default=0) for row in rows]
    line = 17
    row_heights = [
        (line + 8 if titles else 0) + cell + (6 + line * lines if lines else 0) + gap for lines in text_lines
    ]
    top = gap + (line + 8 if headings else 0)
    page = Image.new("RGB", (gap + columns * (cell + gap), top + sum(row_heights)), "white")
    draw = ImageDraw.Draw(page)
    for column, heading in enumerate(headings):
        draw.text((gap + column * (cell + gap), gap), heading, fill="black", font=bold)
    y = top
    for number, row in enumerate(rows):
        if titles:
            draw.text((gap, y), titles[number], fill="black", font=bold)
            y += line + 8
        for column, (image, text) in enumerate(row):
            x = gap + column * (cell + gap)
            if image is not None:
                picture = _fit(image, cell)
                page.paste(picture, (x + (cell - picture.width) // 2, y + (cell - picture.height) // 2))
            for i, words in enumerate(_wrap(text, font, cell)):
                draw.text((x, y + cell + 6 + i * line), words, fill="#333333", font=font)
        y += row_heights[number] - (line + 8 if titles else 0)
    return page


def _fit(image: Image.Image, cell: int) -> Image.Image:
    longest = max(image.size)
    if longest <= cell:
        factor = cell // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize(
        (max(1, image.width * cell // longest), max(1, image.height * cell // longest)), Image.Resampling.LANCZOS
    )


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
