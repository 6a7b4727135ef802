"""Text on pictures, in any script: each character in the first of the installed fonts that has it.

The fonts come with two packages that hold nothing else: Noto Sans with its scripts, symbols and emoji, and WenQuanYi
Micro Hei for Chinese, Japanese and Korean. Where they are not installed, Pillow's own font has the Latin letters.
Letters are joined and reordered, as Arabic and Devanagari need it, where Pillow finds the library FriBiDi.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from PIL import ImageDraw, ImageFont

_PACKAGES: Final = {"manimgx_fonts": "*.ttf", "paperang_p2_fonts_cjk": "fonts/*.ttc"}
_FIRST: Final = "NotoSans["  # how the name of the font begins that most of a text is set in
_NO_CHARACTER: Final = "\U0010ffff"  # every font shows it as it shows what it lacks
_BOLD: Final = 700  # on the axis of weights, where a font has one


class Lettering:
    """Text of one size in pixels and one weight."""

    def __init__(self, size: int, *, bold: bool = False) -> None:
        self.size, self.bold = size, bold
        self.line = round(size * 1.4)  # pixels from one line to the next

    def wrap(self, text: str, width: int) -> list[str]:
        """``text`` in lines of at most ``width`` pixels: broken at spaces, and inside a word where it has to be."""
        lines: list[str] = []
        for word in _clean(text).split():
            if lines and self.width(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
            else:
                lines += self._pieces(word, width)
        return lines

    def width(self, text: str) -> float:
        """How many pixels wide the text is, in one line."""
        return sum(font.getlength(part) for font, part in self._runs(text))

    def draw(self, onto: ImageDraw.ImageDraw, x: float, y: float, text: str, fill: str) -> None:
        """Write one line; ``x`` and ``y`` are its upper left corner, in pixels."""
        runs = list(self._runs(_clean(text)))
        if next(filter(None, map(_direction, text)), "left") == "right":
            runs.reverse()  # a line that is read from the right; within a part, Pillow orders the letters
        for font, part in runs:
            onto.text((x, y + self.size), part, fill=fill, font=font, anchor="ls")
            x += font.getlength(part)

    def _pieces(self, word: str, width: int) -> Iterator[str]:
        """``word`` in pieces of at most ``width`` pixels; a mark stays with its letter."""
        piece = ""
        for character in word:
            if piece and not _joins(character) and self.width(piece + character) > width:
                yield piece
                piece = ""
            piece += character
        yield piece

    def _runs(self, text: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        """``text`` in parts that one font can show."""
        font, part, direction = None, "", ""
        for character in text:
            direction = _direction(character) or direction
            # Spaces and digits between words that are read from the right have to be ordered with them.
            among = direction == "right" and not _direction(character)
            stays = font is not None and (_joins(character) or (among and _has(font, character)))
            found = font if stays else _font_of(character, self.size, self.bold)
            if font is not None and found is not font:
                yield font, part
                part = ""
            font, part = found, part + character
        if font is not None:
            yield font, part


def _clean(text: str) -> str:
    return "".join(" " if unicodedata.category(character) == "Cc" else character for character in text)


def _direction(character: str) -> str:
    """From where a letter is read; empty for what has no direction of its own."""
    return {"L": "left", "R": "right", "AL": "right"}.get(unicodedata.bidirectional(character), "")


def _joins(character: str) -> bool:
    """Whether it is a mark on the character before it, or joins two."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")


@cache
def _font_of(character: str, size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """The first font that has ``character``; the first of all when none has it."""
    fonts = (_open(file, size, bold) for file in _files())
    return next((font for font in fonts if _has(font, character)), _open(_files()[0], size, bold))


@cache
def _has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    return bytes(font.getmask(character)) != bytes(font.getmask(_NO_CHARACTER))


@cache
def _files() -> tuple[Path | None, ...]:
    """The files of the fonts, the first to be asked first; None is Pillow's own font."""
    files: list[Path] = []
    for package, pattern in _PACKAGES.items():
        found = find_spec(package)
        for folder in (found.submodule_search_locations or []) if found else []:
            files += sorted(Path(folder).glob(pattern), key=lambda file: (not file.name.startswith(_FIRST), file.name))
    return (*(file for file in files if "Italic" not in file.name), None)


@cache
def _open(file: Path | None, size: int, bold: bool) -> ImageFont.FreeTypeFont:
    if file is None:
        return ImageFont.load_default(size)  # type: ignore[return-value]
    font = ImageFont.truetype(str(file), size)
    if bold:
        with suppress(OSError, NotImplementedError):  # a font of one weight
            font.set_variation_by_axes([_BOLD])
    return font
