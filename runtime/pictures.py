"""Pictures as files: their names and what may be replaced, settings inside the PNG, and sheets of labelled pictures."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageOps, PngImagePlugin, UnidentifiedImageError

from dnp.engine.errors import OutputError, SettingsError
from dnp.engine.system.files import new_folder, refuse_folder, write_together
from dnp.engine.system.interrupts import uninterrupted
from dnp.runtime.lettering import Lettering
from dnp.runtime.request import Request

METADATA_KEY = "dnp"
UNREADABLE: Final = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError)
"""What Pillow raises for files that are no images, damaged, or too large."""
MAX_PIXELS = 64_000_000  # of an image that is read: a photograph of the largest cameras, 200 MB as RGB
SHEETS: Final = ("compared", "explored")  # the kinds that show all images of a request, in one file
_PICTURES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp"})  # what nobody calls a folder
_NAME_BYTES: Final = 80  # of the part of a file name that comes from the prompt

Files = Mapping[Path, Mapping[str, Any]]


def outputs(folder: Path, request: Request, made_with: Mapping[str, Any], kinds: Sequence[str]) -> dict[Path, Any]:
    """The files that a resolved request will give, each with the settings that its picture will carry.

    They are called ``<prompt>-<seed>-<kind>.png``, with a file for each image of each kind, and one of a sheet.
    ``made_with`` is the pipeline's.
    """
    files = {}
    for kind in kinds:
        for index in [None] if kind in SHEETS else range(request.images):
            path = folder / f"{file_name(request.prompt)}-{request.seed + (index or 0)}-{kind}.png"
            files[path] = settings_inside(request, made_with, kind, index)
    return files


def settings_inside(
    request: Request, made_with: Mapping[str, Any], kind: str, index: int | None, negative: str | None = None
) -> dict[str, Any]:
    """What a picture of a resolved request carries; ``negative`` is its n*, once that is known."""
    found = {"request": request.to_dict(), "kind": kind, "index": index, **made_with, "version": _version()}
    return found if negative is None else {**found, "negative": negative}


@cache  # finding and reading the distribution's metadata takes longer than writing a small picture
def _version() -> str:
    return version("dnp-engine")


def kinds_of(request: Request) -> list[str]:
    """The kinds of pictures that a request gives, the final images first: ``dnp`` or ``plain``, ``dns``, ``plain``."""
    kinds = ["dnp" if request.dnp else "plain"]
    if request.runs_dns:
        kinds.append("dns")
    if request.compare and request.dnp:
        kinds.append("plain")
    return kinds


@contextmanager
def output_folder(path: Path, files: Files | None = None, *, overwrite: bool = False) -> Iterator[None]:
    """Inside the block ``path`` is a folder that can be written to; folders made for work that failed are taken away.

    ``files`` are those of ``outputs``. What is there in the place of one is replaced when it is the same picture, made
    before, or with ``overwrite``.

    Raises OutputError, before any work, when the folder cannot be one, a file cannot be written or must not be
    replaced, or the disk has no room for them.
    """
    files = files or {}
    if path.suffix.lower() in _PICTURES and not path.is_dir():
        raise OutputError(
            f"{str(path)!r} would be a folder with a picture's name; name the folder, files name themselves"
        )
    with ExitStack() as stack:
        place = path
        try:
            stack.enter_context(new_folder(path))
            with tempfile.TemporaryFile(dir=path):
                pass
            for place in files:
                refuse_folder(place)
            there = [file for file in files if os.path.lexists(file)]
            for file in there if not overwrite else []:
                _require_same(file, files[file])
            if new := files.keys() - there:
                place = max(new, key=lambda file: len(os.fsencode(file)))
                with uninterrupted():
                    place.touch(exist_ok=False)
                    place.unlink()
        except OutputError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a path that no folder can have
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise OutputError(f"cannot write to {str(place)!r}: {reason}; name another folder") from error
        most = sum(3 * s["request"]["height"] * s["request"]["width"] for s in files.values())  # PNG makes it less
        free = shutil.disk_usage(path).free
        if most > free:
            raise OutputError(
                f"{str(path)!r} is on a disk with {free / 1e6:.1f} MB left, and the pictures may take {most / 1e6:.1f} "
                "MB; make room, ask for fewer, or name another folder"
            )
        yield


def _require_same(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises OutputError unless the file at ``path`` is the picture that ``settings`` will give again."""
    try:
        with _opened(path) as image:
            found = _stored(image)
    except SettingsError:
        found = None
    remedy = "name another folder, or have it replaced (--overwrite; overwrite=True)"
    if found is None:
        raise OutputError(f"{path} is there already, and is no picture that dnp wrote; {remedy}")
    before, now = _shows(found), _shows(settings)
    if before.get("prompt") != now["prompt"]:
        raise OutputError(f"{path} shows another prompt: {before.get('prompt')!r:.200}; {remedy}")
    others = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    if others:
        raise OutputError(f"{path} shows the same prompt with other settings ({', '.join(others)}); {remedy}")


def _shows(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a picture what it is, as one level of names; how many others were made with it does not."""
    request = dict(settings["request"])
    index = settings.get("index")
    if isinstance(index, int):
        for name in ("seed", "dns_seed"):
            if isinstance(request.get(name), int):
                request[name] += index
        for name in ("images", "compare"):
            request.pop(name, None)
    made_with = ("kind", "bundle", "backend", "precision")
    return {**request, **{name: settings.get(name) for name in made_with}}


def write_atomically(path: Path, data: bytes) -> None:
    """``write_together`` of one file."""
    write_together({path: data})


def png(image: Image.Image, settings: Mapping[str, Any] | None = None) -> bytes:
    """PNG bytes of ``image`` with ``settings`` as JSON in a text chunk; the same bytes for the same arguments."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt(METADATA_KEY, json.dumps(dict(settings), ensure_ascii=False, sort_keys=True, allow_nan=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def open_image(path: Path) -> Image.Image:
    """An image file as an RGB image, rotated as its EXIF says. Raises SettingsError when it is none."""
    with _opened(path) as image:
        return upright(image, str(path))


def upright(image: Image.Image, name: str) -> Image.Image:
    """An image as RGB, rotated as its EXIF says. Raises SettingsError, about ``name``, for pixels of other kinds."""
    turned = ImageOps.exif_transpose(image)
    if turned.mode in ("F", "I", "I;16"):
        raise SettingsError(f"{name} has no 8-bit colours (mode {turned.mode}); convert it to RGB first")
    return turned.convert("RGB")


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
    except UNREADABLE as error:
        raise SettingsError(f"{path} cannot be read as an image: {error}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings inside a PNG that ``save`` wrote. Raises SettingsError when there are none."""
    with _opened(path) as image:
        image.load()  # a picture cut short reproduces nothing
        settings = _stored(image)
    if settings is None:
        raise SettingsError(
            f"{path} carries no settings of ours: the dnp command and Result.save write them into their PNG files, and "
            "what edits or converts a picture may drop them; name the file as it was written"
        )
    return settings


def _stored(image: Image.Image) -> dict[str, Any] | None:
    """The settings inside an image file; None when there are none of ours."""
    text = image.info.get(METADATA_KEY)
    try:
        settings = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(settings, dict) or not isinstance(settings.get("request"), dict):
        return None
    texts = ("backend", "precision", "bundle", "runs_on", "version")
    return settings if all(isinstance(settings.get(key), str | None) for key in texts) else None


def save(files: Files, images: Mapping[str, Sequence[Image.Image]], negatives: Sequence[str]) -> list[Path]:
    """Write the pictures that ``files`` asks for, as ``outputs`` gave them, or none of them.

    ``images`` are by their kinds, one of a sheet; ``negatives`` are n* of each image. Each picture carries the settings
    that reproduce it. Returns the paths. Raises OutputError.
    """
    written = {}
    for path, settings in files.items():
        kind, index = settings["kind"], settings["index"]
        if index is None:
            written[path] = png(images[kind][0], settings)
        else:
            written[path] = png(images[kind][index], {**settings, "negative": negatives[index]})
    write_together(written)
    return list(written)


def file_name(prompt: str) -> str:
    """A prompt as the safe beginning of a file name, another one for every prompt.

    It is the prompt's words where that tells it all. Otherwise (capitals, punctuation, more than 80 bytes) it is as
    many of them as there is room for, and 8 hexadecimal digits of the prompt's SHA-256.
    """
    normal = unicodedata.normalize("NFC", prompt.lower())  # some file systems know no other form, nor capitals
    words = re.sub(r"[^\w]+", "-", normal).strip("-_")
    if words.replace("-", " ") == prompt and len(words.encode()) <= _NAME_BYTES:
        return words
    digits = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    words = words.encode()[: _NAME_BYTES - len(digits) - 1].decode(errors="ignore").strip("-_")
    return f"{words or 'image'}-{digits}"


def sheet(
    rows: Sequence[Sequence[tuple[Image.Image | None, str]]],
    *,
    title: str = "",
    headings: Sequence[str] = (),
    titles: Sequence[str] = (),
    cell: int = 192,
) -> Image.Image:
    """A picture of pictures: a ``title``, column ``headings``, and ``rows`` of (image, caption below it), each under
    its own one of ``titles``.

    Images are scaled to ``cell`` pixels: by whole factors and unblurred when they are smaller. Text is wrapped.
    """
    text, bold = Lettering(14), Lettering(16, bold=True)
    gap, space = 12, 6  # pixels between the parts of the page; between a picture and its text
    columns = max(len(row) for row in rows)
    width = gap + columns * (cell + gap)
    # Each block of text is its place on the page, its letters, and its lines.
    blocks: list[tuple[int, int, Lettering, list[str], str]] = []
    pictures: list[tuple[int, int, Image.Image]] = []
    y = gap

    def write(x: int, y: int, letters: Lettering, words: str, wide: int, fill: str = "black") -> int:
        """Lay out some text; returns its height in pixels."""
        lines = letters.wrap(words, wide)
        blocks.append((x, y, letters, lines, fill))
        return letters.line * len(lines)

    if title:
        y += write(gap, y, bold, title, width - 2 * gap) + gap
    if headings:
        y += max(write(gap + i * (cell + gap), y, bold, words, cell) for i, words in enumerate(headings)) + space
    for number, row in enumerate(rows):
        if titles:
            y += write(gap, y, bold, titles[number], width - 2 * gap) + space
        below = 0
        for column, (image, words) in enumerate(row):
            x = gap + column * (cell + gap)
            if image is not None:
                picture = _fit(image, cell)
                pictures.append((x + (cell - picture.width) // 2, y + (cell - picture.height) // 2, picture))
            if words:
                below = max(below, space + write(x, y + cell + space, text, words, cell, "#333333"))
        y += cell + below + gap
    page = Image.new("RGB", (width, y), "white")
    draw = ImageDraw.Draw(page)
    for x, top, picture in pictures:
        page.paste(picture, (x, top))
    for x, top, letters, lines, fill in blocks:
        for i, line in enumerate(lines):
            letters.draw(draw, x, top + i * letters.line, line, fill)
    return page


def _fit(image: Image.Image, cell: int) -> Image.Image:
    longest = max(image.size)
    if longest <= cell:
        factor = cell // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize(
        (max(1, image.width * cell // longest), max(1, image.height * cell // longest)), Image.Resampling.LANCZOS
    )
