"""Pictures as files: their names, what may be replaced, and the text on sheets."""

from __future__ import annotations

import shutil
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from dnp.engine.errors import OutputError
from dnp.runtime.lettering import Lettering
from dnp.runtime.pictures import SHEETS, file_name, kinds_of, output_folder, outputs, png, sheet
from dnp.runtime.request import Request

MADE_WITH = {"bundle": "0" * 16, "backend": "cpu", "precision": None, "runs_on": "cpu (a library 1.0, threads: 2)"}
WIDE = "a very detailed picture of a lighthouse in a storm, " * 6
MISSING = "\U0010fffe"  # no character: what a font shows for it, it shows for all that it lacks


def request(prompt="a red circle", **settings):
    full = {"height": 64, "width": 64, "dns_seed": settings.get("seed", 0), "steps": 3, "guidance": 2.0}
    return Request(prompt, **{**full, **settings})


def planned(folder, *arguments, kinds=None, made_with=MADE_WITH, **settings):
    asked = request(*arguments, **settings)
    return outputs(folder, asked, made_with, kinds or kinds_of(asked))


def made(files):
    """The files of ``outputs``, written."""
    for path, settings in files.items():
        path.write_bytes(png(Image.new("RGB", (8, 8)), settings))


@given(st.text(min_size=1), st.text(min_size=1))
@example("\N{CAT FACE}\N{ROCKET}", ".")
@example("x" * 81, "x" * 82)
@example("a cat", "A cat")
@example("a cat", "a cat!")
@example("a-cat", "a cat")
@example("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}")
def test_two_prompts_never_share_a_name_on_any_file_system(one, two):
    names = [unicodedata.normalize("NFC", file_name(text).lower()) for text in (one, two)]
    assert (names[0] == names[1]) == (one == two)
    for text in (one, two):
        assert 0 < len(file_name(text).encode()) <= 80
        assert not set(file_name(text)) & set('/\\:*?"<>|\0 .')


def test_a_plain_prompt_is_its_own_name():
    assert file_name("a large red circle") == "a-large-red-circle"


@pytest.mark.parametrize("change", [{}, {"images": 4}, {"compare": True}])
def test_the_same_picture_may_be_made_again(tmp_path, change):
    made(planned(tmp_path, images=2, **{k: v for k, v in change.items() if k != "images"}))
    with output_folder(tmp_path, planned(tmp_path, **{"images": 2, **change})):
        pass


def test_an_image_of_several_is_the_one_that_its_seed_gives_alone(tmp_path):
    made(planned(tmp_path, images=3, seed=4))
    with output_folder(tmp_path, planned(tmp_path, seed=6)):
        pass
    with pytest.raises(OutputError, match="dns_seed"), output_folder(tmp_path, planned(tmp_path, seed=6, dns_seed=0)):
        pass


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": 4}, r"same prompt with other settings \(steps\)"),
        ({"guidance": 3.0, "sampler": "euler"}, r"\(sampler, guidance\)"),
        ({"made_with": {**MADE_WITH, "bundle": "1" * 16}}, r"\(bundle\)"),
        ({"made_with": {**MADE_WITH, "backend": "openvino"}}, r"\(backend\)"),
    ],
)
def test_other_settings_are_not_replaced_unasked(tmp_path, change, told):
    made(planned(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match=told), output_folder(tmp_path, planned(tmp_path, **change)):
        raise AssertionError("the work began")
    with output_folder(tmp_path, planned(tmp_path, **change), overwrite=True):
        pass
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", SHEETS)
def test_a_sheet_of_more_images_is_another_sheet(tmp_path, kind):
    made(planned(tmp_path, kinds=[kind], images=2))
    with output_folder(tmp_path, planned(tmp_path, kinds=[kind], images=2)):
        pass
    more = planned(tmp_path, kinds=[kind], images=3)
    with pytest.raises(OutputError, match=r"\(images\)"), output_folder(tmp_path, more):
        pass


@pytest.mark.parametrize("what", ["another prompt", "somebody's text", "a picture without settings", "a dead link"])
def test_what_is_not_ours_is_not_replaced_unasked(tmp_path, what):
    files = planned(tmp_path)
    path = next(iter(files))
    if what == "another prompt":
        made({path: {**files[path], "request": {**files[path]["request"], "prompt": "a blue circle"}}})
    elif what == "somebody's text":
        path.write_text("mine")
    elif what == "a picture without settings":
        Image.new("RGB", (8, 8)).save(path)
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=r"--overwrite") as caught, output_folder(tmp_path, files):
        raise AssertionError("the work began")
    assert ("another prompt: 'a blue circle'" in str(caught.value)) == (what == "another prompt")
    with output_folder(tmp_path, files, overwrite=True):
        pass


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "new/a.webp"])
def test_a_folder_is_not_called_like_a_picture(tmp_path, name):
    with pytest.raises(OutputError, match="name the folder"), output_folder(tmp_path / name):
        pass
    assert not any(tmp_path.iterdir())
    (tmp_path / "there.png").mkdir()
    with output_folder(tmp_path / "there.png"):  # somebody does
        pass


@pytest.mark.parametrize(("length", "fits"), [(3900, True), (4000, False)])
def test_a_path_that_is_too_long_for_the_names_is_known_before(tmp_path, length, fits):
    deep = tmp_path
    while len(str(deep)) < length:
        deep /= "d" * 20
    deep.mkdir(parents=True)
    with (
        pytest.raises(ZeroDivisionError if fits else OutputError),
        output_folder(deep, planned(deep, WIDE, seed=2**62)),
    ):
        raise ZeroDivisionError("the work began")
    assert not list(deep.iterdir())


def test_a_full_disk_is_known_before(tmp_path, monkeypatch):
    files = planned(tmp_path / "new")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 20_000, 20_000))
    with pytest.raises(OutputError, match=r"0\.0 MB left"), output_folder(tmp_path / "new", files):
        raise AssertionError("the work began")
    assert not list(tmp_path.iterdir())


def shown(text, **settings):
    return np.asarray(sheet([[(None, text)]], cell=300, **settings))


@pytest.mark.parametrize(
    "text",
    [
        "большой красный круг",
        "μεγάλος κόκκινος κύκλος",
        "đường tròn lớn",
        "赤い円と四角",
        "红色的大圆",
        "큰 빨간 원",
        "دائرة حمراء",
        "עיגול אדום",
        "लाल गोला",
        "วงกลม",
        "🐱🚀★♥",
        "∅ → σ ≤ −",
    ],
)
def test_every_character_is_in_a_font(text):
    from PIL import ImageDraw

    def drawn(character):
        page = Image.new("L", (64, 64), "white")
        Lettering(32).draw(ImageDraw.Draw(page), 8, 8, character, "black")
        return page.tobytes()

    letters = {c for c in text if unicodedata.category(c)[0] in "LNS"}
    pictures = {drawn(c) for c in letters}
    assert len(pictures) == len(letters)
    assert drawn(MISSING) not in pictures


@pytest.mark.parametrize("text", [WIDE, "x" * 400, "红色的大圆在蓝色小方块的左边" * 12, "большой красный круг " * 20])
def test_long_text_is_wrapped_and_nothing_is_cut(text):
    letters = Lettering(14)
    lines = letters.wrap(text, 300)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(letters.width(line) <= 300 for line in lines)
    for page in (shown(text), shown("", title=text), shown("", titles=[text]), shown("", headings=[text])):
        assert (page[:, -6:] == 255).all()  # nothing reaches the edge
        dark = np.flatnonzero((page < 128).any(axis=(1, 2)))
        assert dark[-1] - dark[0] > 14 * (len(lines) - 1)


def test_a_sheet_shows_its_title():
    assert shown("", title="a red circle").tobytes() != shown("", title="a red square").tobytes()


def test_without_the_fonts_latin_text_is_still_shown(monkeypatch):
    from dnp.runtime import lettering

    monkeypatch.setattr(lettering, "_PACKAGES", {"no_such_package": "*.ttf"})
    for cached in (lettering._files, lettering._font_of):
        cached.cache_clear()
    try:
        assert (shown("a red circle") < 128).any()
    finally:
        for cached in (lettering._files, lettering._font_of):
            cached.cache_clear()
